"""Adam's state by parameter: one kind of Adam resumes another's checkpoint, and the fused one makes no copies."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ranks import run_ranks
from tests.test_checkpoint import DISTRIBUTED, Run
from tests.test_reference import allocated

KINDS = ("torch", "fused", "counted per group")


def counted_per_group():
    """Adam with the state layout and arguments of Apex's and Transformer Engine's FusedAdam."""
    import torch

    class FusedAdam(torch.optim.Optimizer):
        def __init__(self, params, lr, weight_decay, betas, eps, adam_w_mode):
            assert adam_w_mode
            super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps})

        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                group["step"] = group.get("step", 0) + 1
                below, above = (1 - beta ** group["step"] for beta in group["betas"])
                for p in group["params"]:
                    if p.grad is None:
                        continue
                    state = self.state[p]
                    if not state:
                        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                    state["exp_avg"].lerp_(p.grad, 1 - group["betas"][0])
                    state["exp_avg_sq"].lerp_(p.grad**2, 1 - group["betas"][1])
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    root = (state["exp_avg_sq"] / above).sqrt_().add_(group["eps"])
                    p.addcdiv_(state["exp_avg"] / below, root, value=-group["lr"])

    return FusedAdam


def run_of(kind: str, folder: str, parallel: dict, optimizer: dict, model: dict, seed: int = 1) -> Run:
    """Return a policy whose optimizer mcore built with this kind of Adam."""
    import megatron.core.optimizer as mcore
    from megatron.core.optimizer import distrib_optimizer

    from megatron_dypo.policy.optimizer import fuse

    plain = mcore.Adam, mcore.USING_PYTORCH_OPTIMIZER
    if kind == "counted per group":
        mcore.Adam, mcore.USING_PYTORCH_OPTIMIZER = distrib_optimizer.Adam, _ = counted_per_group(), False
    run = Run(folder, parallel, optimizer, seed=seed, model=model)
    mcore.Adam, mcore.USING_PYTORCH_OPTIMIZER = distrib_optimizer.Adam, _ = plain
    if kind == "fused":
        fuse(run.policy.optimizer)
    return run


def state_of(policy) -> dict:
    from megatron_dypo.policy.optimizer import adam_parts

    parts = adam_parts(policy.optimizer, policy.parameters)
    return {f"{name}/{kind}": part.flat(kind).clone() for name, part in parts.items() for kind in part.names}


def steps_of(policy) -> set[float]:
    """Return the optimizer's own counts."""
    from megatron_dypo.policy.optimizer import inner_optimizers

    counts = set()
    for inner in inner_optimizers(policy.optimizer):
        by_group = [group["step"] for group in inner.param_groups if "step" in group]
        counts |= {float(step) for step in by_group or [state["step"] for state in inner.state.values()]}
    return counts


def resumed(folder: str, parallel: dict, optimizer: dict, model: dict) -> list[tuple[str, str]]:
    """Save after an update with each kind, take two more with each kind from there; all agree with the first kind."""
    import torch

    done = []
    for first in KINDS:
        target = str(Path(folder) / first.replace(" ", "_"))
        run = run_of(first, target, parallel, optimizer, model)
        run.step(0)
        counters, state = run.save(1), state_of(run.policy)
        run.saver.finish(counters)
        run.step(1)
        expected = run.step(2)
        for then in KINDS:
            other = run_of(then, target, parallel, optimizer, model, seed=99)
            other.load()
            loaded = state_of(other.policy)
            assert loaded.keys() == state.keys() and all(torch.equal(loaded[name], state[name]) for name in state)
            assert steps_of(other.policy) == {1.0}, (first, then)
            other.step(1)
            found = other.step(2)
            assert steps_of(other.policy) == {3.0}, (first, then)
            near = {"rel": 1e-4, "abs": 1e-6} if not model else {"rel": 0.05, "abs": 1e-3}  # rounding differs
            assert found == pytest.approx(expected, **near), (first, then)
            if first == then:
                assert found == expected
            done.append((first, then))
    return done


@pytest.mark.parametrize(
    ("ranks", "parallel", "optimizer", "model"),
    [(1, {}, {}, {}), (2, {}, DISTRIBUTED, {"dtype": "bf16"})],
    ids=str,
)
def test_each_kind_of_adam_goes_on_from_each(ranks, parallel, optimizer, model, tmp_path):
    for done in run_ranks(ranks, resumed, str(tmp_path), parallel, optimizer, model):
        assert len(done) == len(KINDS) ** 2


def fused(folder: str) -> dict:
    """Return what an update allocates, fused and in torch's own form on CUDA, and the state while offloaded."""
    from megatron_dypo.policy.optimizer import inner_optimizers

    run = run_of("fused", folder, {}, {}, {})
    run.step(0)
    (inner,) = inner_optimizers(run.policy.optimizer)
    found = {"parameters": sum(parameter.numel() for parameter in run.policy.parameters.values())}
    run.policy.grad_norm()  # gives the optimizer its gradients
    found["fused"] = allocated(inner.step)
    steps = [state["step"] for state in inner.state.values()]
    with run.policy.offload.on_host():
        found["away"] = {step.untyped_storage().nbytes() for step in steps}
    found["back"] = {float(step) for step in steps}
    for group in inner.param_groups:
        group["foreach"], group["fused"] = True, False
    found["foreach"] = allocated(inner.step)
    return found


def test_a_fused_update_makes_no_copy_of_a_moment_and_its_step_counts_move_with_it(tmp_path):
    (found,) = run_ranks(1, fused, str(tmp_path))
    assert found["fused"] < 1000 < 4 * found["parameters"] <= found["foreach"]
    assert found["away"] == {0} and found["back"] == {2.0}
