"""The warm-up leaves nothing behind but compiled code; and a policy in bf16 trains, dense or a mixture."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch

from tests.batches import make_config, make_groups, trace_ids
from tests.ranks import run_ranks


def build(shape: str, sections: dict):
    from megatron_dypo.models.shape import model_shape
    from megatron_dypo.models.sharding import random_weights
    from megatron_dypo.policy.policy import Policy
    from megatron_dypo.runtime import distributed

    config = make_config(shape, **sections)
    layout = distributed.init(config.parallel)
    model = model_shape(config.model)
    return config, Policy(config, model, layout, random_weights(model, seed=1))


def train(config, policy, steps: int) -> list[dict]:
    from megatron_dypo.training.step import StepContext, update_policy

    outcomes = [
        update_policy(policy, make_groups(seed=step), config, trace_ids, StepContext(1, 1e-2)) for step in range(steps)
    ]
    assert all(outcome.skipped is None and not outcome.empty for outcome in outcomes)
    return [outcome.metrics for outcome in outcomes]


def digests(policy) -> dict[str, str]:
    return {
        name: hashlib.sha256(tensor.float().numpy().tobytes()).hexdigest() for name, tensor in policy.named_tensors()
    }


def with_and_without(shape: str, sections: dict, warm: bool) -> tuple:
    from megatron_dypo.training.passes import warm_up

    config, policy = build(shape, sections)
    if warm:
        before = digests(policy)
        assert warm_up(policy, config) > 0
        assert digests(policy) == before and policy.version == 0
        assert not any(parameter.main_grad.any() for parameter in policy.parameters.values())
        assert policy.routing_metrics() == {}
    return train(config, policy, 2), digests(policy)


@pytest.mark.parametrize(
    ("world", "shape", "sections"),
    [
        (1, "qwen3_moe", {"policy": {"routing_replay": "old", "aux_loss": 0.1}}),
        (2, "llama", {"parallel": {"pipeline": 2}}),
    ],
    ids=["mixture", "pipeline"],
)
def test_a_run_is_the_same_bit_for_bit_with_and_without_it(world, shape, sections):
    warmed, cold = (run_ranks(world, with_and_without, shape, sections, warm) for warm in (True, False))
    assert warmed == cold


def compilations(shape: str) -> list[int]:
    """Return torch's compiled graphs after the warm-up, and after two steps; traced, but not made into machine code."""
    from megatron.core.fusions import fused_bias_swiglu as fused
    from torch._dynamo.utils import counters

    import megatron_dypo.policy.attention as attention
    import megatron_dypo.policy.model as model
    from megatron_dypo.policy.attention import rotate
    from megatron_dypo.training.passes import warm_up

    rotation = torch.compile(rotate, backend="eager")
    attention.rotation = lambda compiled: rotation if compiled else rotate
    for name in ("swiglu", "swiglu_back", "weighted_swiglu", "weighted_swiglu_back"):
        function = getattr(fused, name)._torchdynamo_orig_callable
        setattr(fused, name, torch.compile(function, backend="eager"))
    chosen = model.choose
    model.choose = lambda *arguments: chosen(*arguments)._replace(compiled=True)
    config, policy = build(shape, {})
    graphs = lambda: counters["stats"]["unique_graphs"]  # noqa: E731
    warm_up(policy, config)
    found = [graphs()]
    train(config, policy, 2)
    return [*found, graphs()]


def test_nothing_is_compiled_in_a_step():
    """Whatever its numbers of tokens."""
    ((warmed, trained),) = run_ranks(1, compilations, "llama")
    assert warmed == trained >= 6, "SwiGLU forward and backward, and RoPE: for one size, and for any"


def in_bf16(shape: str) -> dict:
    """Make a step in bf16, and return how far its log-probs are from fp32's."""
    from megatron_dypo.training.minibatch import build_minibatches

    found = {}
    for dtype in ("fp32", "bf16"):
        config, policy = build(shape, {"model": {"dtype": dtype}}) if not found else again(found["policy"], dtype)
        found["policy"] = policy
        (work,) = build_minibatches(policy.layout, make_groups(), config, trace_ids)
        found[dtype] = torch.cat(policy.logprobs(work.rollouts))
    before = digests(policy)
    metrics = train(config, policy, 2)
    gap = (found["fp32"] - found["bf16"]).abs()
    types = {parameter.dtype for parameter in policy.parameters.values()}
    changed = sum(before[name] != digest for name, digest in digests(policy).items())
    return {"gap": (gap.mean().item(), gap.max().item()), "metrics": metrics, "types": types, "changed": changed}


def again(policy, dtype: str):
    """Return the same policy in another type; the process groups stay."""
    from megatron_dypo.models.sharding import random_weights
    from megatron_dypo.policy.policy import Policy

    config = policy.config.model_copy(update={"model": policy.config.model.model_copy(update={"dtype": dtype})})
    return config, Policy(config, policy.shape, policy.layout, random_weights(policy.shape, seed=1))


@pytest.mark.parametrize("shape", ["llama", "qwen3_moe"])
def test_a_policy_in_bf16_takes_its_steps_close_to_fp32s(shape):
    (found,) = run_ranks(1, in_bf16, shape)
    assert found["types"] <= {torch.bfloat16, torch.float32} and torch.bfloat16 in found["types"]
    assert found["changed"] > 0
    assert all(math.isfinite(value) for metrics in found["metrics"] for value in metrics.values())
    mean, largest = found["gap"]
    assert 0 < mean < 0.02 and largest < (1.0 if "moe" in shape else 0.3)  # nats; a few tokens go to other experts
