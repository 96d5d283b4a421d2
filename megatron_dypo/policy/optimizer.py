"""Adam's state by parameter, for each of mcore's optimizers; and the settings of an optimizer step.

The plain optimizer holds the state of whole parameters, the distributed one that of a slice [start, end) of each
flattened parameter. mcore's own checkpointing fails for the distributed one under torch's Adam: it expects a step count
where only Apex's and Transformer Engine's have one. So the state is read here, parameter by parameter. The step count
itself is the policy's ``adam_steps``: both advance by one with every applied update.

torch's Adam counts steps in a tensor per parameter: on the host, or if it is fused on the parameter's device. Apex's
and Transformer Engine's FusedAdam count in a number per group. The saved state has neither and loads into both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from megatron_dypo.config.schema import Optimizer

MOMENTS = ("exp_avg", "exp_avg_sq")
MASTER = "fp32_param"


@dataclass(frozen=True)
class Part:
    """Elements [start, end) of a flattened parameter whose Adam state this rank holds.

    ``main`` is what Adam updates: the parameter (fp32), its fp32 master copy (bf16), or the slice of either.
    """

    start: int
    end: int
    main: Tensor
    inner: torch.optim.Optimizer
    has_master: bool

    @property
    def names(self) -> tuple[str, ...]:
        return (*MOMENTS, MASTER) if self.has_master else MOMENTS

    def flat(self, name: str) -> Tensor:
        """Return one of ``names`` as a flat view [end - start]."""
        tensor = self.main.detach() if name == MASTER else self.inner.state[self.main][name]
        return tensor.reshape(-1)

    @torch.no_grad()
    def restore(self, values: dict[str, Tensor], steps: int) -> None:
        """Set the state from flat tensors [end - start] by name, after ``steps`` applied updates."""
        state = self.inner.state[self.main]
        for name in MOMENTS:
            state[name] = values[name].to(self.main.device).reshape(self.main.shape).clone()
        self._count(steps)
        if self.has_master:
            self.main.copy_(values[MASTER].reshape(self.main.shape))

    @torch.no_grad()
    def begin_anew(self) -> None:
        """Reset moments and steps in place; a master copy is unchanged."""
        for name in MOMENTS:
            self.inner.state[self.main][name].zero_()
        self._count(0)

    def _count(self, steps: int) -> None:
        """Set the number of applied updates for Adam's bias correction."""
        state = self.inner.state[self.main]
        if isinstance(self.inner, torch.optim.Adam):  # includes AdamW
            fused = self.inner.param_groups[0]["fused"]
            state["step"] = torch.tensor(float(steps), device=self.main.device if fused else "cpu")
        else:
            for group in self.inner.param_groups:
                group["step"] = steps


def inner_optimizers(optimizer) -> list[torch.optim.Optimizer]:
    """Return the torch, Apex or Transformer Engine optimizers inside mcore's; none if a rank has no parameters."""
    members = getattr(optimizer, "chained_optimizers", [optimizer])
    return [member.optimizer for member in members if member.optimizer is not None]


def set_hyperparameters(optimizer, settings: Optimizer, lr: float) -> None:
    """Set the next update's hyperparameters, of any stage of the run; mcore would keep those it was built with."""
    for group in optimizer.param_groups:
        group["lr"] = lr
        group["weight_decay"] = settings.weight_decay * group["wd_mult"]
        group["betas"], group["eps"] = tuple(settings.betas), settings.eps
    for member in getattr(optimizer, "chained_optimizers", [optimizer]):
        member.config.clip_grad = settings.clip_grad


def fuse(optimizer) -> None:
    """Make torch's Adam, if mcore uses it, update in one kernel.

    Its other form on CUDA allocates a list as large as one moment of all parameters: 4 bytes per parameter at every
    step.
    """
    for inner in inner_optimizers(optimizer):
        if isinstance(inner, torch.optim.Adam):
            for group in inner.param_groups:
                group["foreach"], group["fused"] = False, True


def adam_parts(optimizer, parameters: Mapping[str, torch.nn.Parameter]) -> dict[str, Part]:
    """Return the part of each named parameter that this rank's ``optimizer`` holds, omitting those it does not."""
    parts = {}
    members = []
    for mcore in getattr(optimizer, "chained_optimizers", [optimizer]):
        updated = {id(main) for group in mcore.optimizer.param_groups for main in group["params"]}
        members.append((mcore, mcore.optimizer, updated))
    for name, parameter in parameters.items():
        for mcore, inner, updated in members:
            if isinstance(mcore, DistributedOptimizer):
                place = mcore.model_param_group_index_map.get(parameter)
                if place is None:
                    continue
                group, order = place
                main, held = inner.param_groups[group]["params"][order], mcore._get_model_param_range_map(parameter)
                start, end = held["param"].start, held["param"].end
            else:
                main, start, end = getattr(parameter, "main_param", parameter), 0, parameter.numel()
                if id(main) not in updated:
                    continue
            parts[name] = Part(start, end, main, inner, has_master=main.dtype != parameter.dtype)
    return parts
