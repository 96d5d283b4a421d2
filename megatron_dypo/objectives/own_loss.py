"""A user's own loss in place of the surrogate (``objective.loss_function``): its input and its result.

It runs unfused: log-probs and entropies of a micro-batch come from ``linear_logprob``, slopes from torch's autograd.
Legend: N loss tokens of a micro-batch's responses held by this rank; S responses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dypo.errors import TrainingError, UserError
from megatron_dypo.runtime.user_code import load_function

if TYPE_CHECKING:
    from megatron_dypo.config.schema import Objective


@dataclass(frozen=True)
class PolicyLossBatch:
    """Input of the function for one micro-batch of responses; log-probs and entropies in nats.

    ``log_prob`` and ``entropy`` [N] under the current policy are differentiable; ``old_log_prob``, ``rollout_log_prob``
    (the engine's) and ``ref_log_prob`` [N] (None if no term reads a reference) are not. ``advantages`` [N] are the
    recipe's. ``weights`` [N] multiply each token's loss afterwards: the term's share, every normaliser over the global
    batch, and the rollout correction. ``cu_seqlens`` [S + 1] are the responses' offsets among the N tokens: with
    context parallelism a rank holds a part of each response, maybe none of it, so compute sums over a response with
    ``sequence_sum`` or ``sequence_mean``. ``objective`` has the configuration's keys.
    """

    log_prob: Tensor
    entropy: Tensor
    old_log_prob: Tensor
    rollout_log_prob: Tensor
    ref_log_prob: Tensor | None
    advantages: Tensor
    weights: Tensor
    cu_seqlens: Tensor
    objective: Objective
    context_group: dist.ProcessGroup | None = None

    def sequence_sum(self, x_N: Tensor) -> Tensor:
        """Sum over all tokens of each response, including other ranks' [S]; differentiable.

        Collective with context parallelism: call it equally often on every rank, whatever the values.
        """
        sums_S = torch.segment_reduce(x_N.double(), "sum", offsets=self.cu_seqlens, initial=0)
        if self.context_group is not None:
            sums_S = _SumOverRanks.apply(sums_S, self.context_group)
        return sums_S.to(x_N.dtype)

    def sequence_mean(self, x_N: Tensor) -> Tensor:
        """Average over all tokens of each response [S], as ``sequence_sum`` sums."""
        return self.sequence_sum(x_N) / self.lengths

    def per_token(self, x_S: Tensor) -> Tensor:
        """Spread each response's value over its tokens [N]."""
        return x_S.repeat_interleave(self.cu_seqlens.diff(), output_size=len(self.log_prob))

    @cached_property
    def lengths(self) -> Tensor:
        """Return the loss tokens of each response [S], in ``log_prob``'s dtype. Collective, like ``sequence_sum``."""
        return self.sequence_sum(torch.ones_like(self.log_prob.detach()))


class _SumOverRanks(torch.autograd.Function):
    """All-reduce whose backward is one too: the loss is the sum of all ranks' losses."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, total = group, x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


@dataclass(frozen=True)
class OwnLoss:
    """A loaded function and its configured name ``named``."""

    named: str
    function: Callable[[PolicyLossBatch], Any]

    def __str__(self) -> str:
        return f"objective.loss_function: {self.named}"

    def __call__(self, batch: PolicyLossBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (each token's loss [N], metrics [N] by name); raise TrainingError for anything else."""
        try:
            result = self.function(batch)
        except Exception as error:  # a user's code may raise anything
            reason = str(error).partition("\n")[0]
            raise TrainingError(f"{self}: raised {type(error).__name__}: {reason}") from error
        loss_N, metrics = result if isinstance(result, tuple) and len(result) == 2 else (result, {})
        expected = f"a tensor {list(batch.log_prob.shape)} of {batch.log_prob.dtype}, a loss for each token"
        if not _is_like(loss_N, batch.log_prob):
            raise TrainingError(f"{self}: returned {_described(result)}; expected {expected}, or that and metrics")
        if not loss_N.requires_grad:
            raise TrainingError(f"{self}: returned a loss that depends on neither log_prob nor entropy")
        if not isinstance(metrics, dict):
            raise TrainingError(f"{self}: returned metrics as {_described(metrics)}; expected a dict")
        for name, values_N in metrics.items():
            if not isinstance(name, str) or not isinstance(values_N, Tensor) or values_N.shape != loss_N.shape:
                raise TrainingError(
                    f"{self}: metric {name!r}: {_described(values_N)}; expected a tensor {list(loss_N.shape)}, whose "
                    "mean over all tokens is logged"
                )
        return loss_N, {name: values_N.detach() for name, values_N in metrics.items()}

    def slopes(self, batch: PolicyLossBatch) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """Return (weighted loss summands, dL/dlogp, dL/dentropy, metrics), each [N]; the batch's graph is untouched."""
        leaves = batch.log_prob.detach().requires_grad_(), batch.entropy.detach().requires_grad_()
        with torch.enable_grad():
            fields = {name: getattr(batch, name) for name in PolicyLossBatch.__dataclass_fields__}
            loss_N, metrics = self(PolicyLossBatch(**fields | {"log_prob": leaves[0], "entropy": leaves[1]}))
            summands_N = batch.weights * loss_N
            dlogp_N, dentropy_N = torch.autograd.grad(
                summands_N.sum(), leaves, allow_unused=True, materialize_grads=True
            )
        return summands_N.detach(), dlogp_N, dentropy_N, metrics


@lru_cache(maxsize=4)
def load_own_loss(named: str) -> OwnLoss:
    """Import the function. Raises UserError, one line."""
    try:
        return OwnLoss(named, load_function(named))
    except Exception as error:  # a user's file may raise anything on import
        reason = str(error).partition("\n")[0]
        raise UserError(f"objective.loss_function: {named}: {type(error).__name__}: {reason}") from None


def try_out(own: OwnLoss, objective: Objective, has_reference: bool) -> None:
    """Call the function on a few made-up tokens. Raises UserError if training could not use its result."""
    counts = [5, 1, 7]
    log_prob_N = -torch.linspace(0.1, 3.0, sum(counts))
    drift_N = 0.3 * torch.cos(torch.arange(sum(counts)))
    advantages_S, cu_seqlens = torch.tensor([1.0, 0.0, -0.5]), torch.tensor([0, *accumulate(counts)])
    batch = PolicyLossBatch(
        log_prob=log_prob_N,
        entropy=torch.linspace(0.0, 2.0, sum(counts)),
        old_log_prob=log_prob_N + drift_N,
        rollout_log_prob=log_prob_N + drift_N,
        ref_log_prob=log_prob_N - drift_N if has_reference else None,
        advantages=advantages_S.repeat_interleave(cu_seqlens.diff()),
        weights=torch.full((sum(counts),), 1 / sum(counts)),
        cu_seqlens=cu_seqlens,
        objective=objective,
    )
    try:
        results = own.slopes(batch)[:3]
    except TrainingError as error:
        raise UserError(str(error)) from None
    if not all(bool(torch.isfinite(x_N).all()) for x_N in results):
        raise UserError(f"{own}: a loss or slope is NaN or infinite for ordinary log-probs")


def _is_like(x: Any, other: Tensor) -> bool:
    return isinstance(x, Tensor) and (x.shape, x.dtype, x.device) == (other.shape, other.dtype, other.device)


def _described(x: Any) -> str:
    if isinstance(x, Tensor):
        return f"a tensor {list(x.shape)} of {x.dtype} on {x.device}"
    return f"a {type(x).__name__}"
