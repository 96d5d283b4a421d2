"""No layer makes the host wait for the device: a pass's number of waits does not grow with its layers."""

from __future__ import annotations

import pytest
import torch

from tests.batches import make_config, make_groups, trace_ids
from tests.ranks import run_ranks

LAYERS = 2, 4


def waits_of_passes(shape: str, sections: dict) -> dict[str, list[dict[str, int]]]:
    """Return pass -> for each number of layers: how often the host waits, by line."""
    from megatron_dypo.models.shape import model_shape
    from megatron_dypo.models.sharding import random_weights
    from megatron_dypo.policy.policy import Policy
    from megatron_dypo.runtime import distributed
    from megatron_dypo.training.minibatch import build_minibatches
    from megatron_dypo.training.passes import logprob_passes
    from megatron_dypo.training.step import StepContext, run_updates
    from tests.waits import Waits, device_is_marked

    found: dict[str, list] = {"logprobs": [], "update": []}
    layout = None
    for layers in LAYERS:
        config = make_config(shape, **sections, objective={"reference": "previous"})
        config.model.shape = config.model.shape.model_copy(update={"num_layers": layers})
        layout = layout or distributed.init(config.parallel)
        model = model_shape(config.model)
        policy = Policy(config, model, layout, random_weights(model, seed=1))
        (work,) = build_minibatches(layout, make_groups(), config, trace_ids)
        with device_is_marked():
            with Waits(policy.parameters.values()) as waits:
                policy.logprobs(work.rollouts)
            found["logprobs"].append(dict(waits.where))
            logprob_passes(policy, [work], config)
            with Waits(policy.parameters.values()) as waits:
                run_updates(policy, [work], config, StepContext(1, 1e-3))
            found["update"].append(dict(waits.where))
        found["micro-batches"] = [{"rollouts": len(work.rollouts)}] * 2
    return found


@pytest.mark.parametrize(
    ("world", "shape", "sections"),
    [
        (1, "llama", {}),
        (1, "qwen3_moe", {"policy": {"routing_replay": "old", "aux_loss": 0.1}}),
        (2, "llama", {"parallel": {"pipeline": 2}}),
        (2, "llama", {"parallel": {"context": 2}}),
        (2, "llama", {"parallel": {"tensor": 2, "sequence_parallel": True}, "model": {"recompute": "full"}}),
    ],
    ids=["dense", "mixture", "pipeline", "context", "tensor"],
)
def test_the_host_waits_as_often_for_many_layers_as_for_few(world, shape, sections):
    """Except in a mixture's layers, for the sizes of Megatron-Core's all-to-all.

    In a pass over a micro-batch these are two selections by mask (not in 0.19), and copies of two counts.
    """
    for rank, found in enumerate(run_ranks(world, waits_of_passes, shape, sections)):
        batches = found.pop("micro-batches")[0]["rollouts"]
        for name, (few, many) in found.items():
            more = {line: count - few.get(line, 0) for line, count in many.items() if count > few.get(line, 0)}
            sizes = [more.pop(line) for line in list(more) if "at transformer/moe/" in line]
            assert not more, f"rank {rank}, {name}: with {LAYERS[1]} layers instead of {LAYERS[0]}"
            if name == "logprobs":
                each = sum(sizes) / (LAYERS[1] - LAYERS[0]) / batches
                assert each in ((2, 4) if shape == "qwen3_moe" else (0,)), f"rank {rank}"


def test_a_wait_is_seen_and_a_host_value_is_none():
    from tests.waits import DEVICE, Waits

    weight, host = torch.ones(3), torch.ones(3)
    with Waits([weight]) as waits:
        host.tolist(), host.sum().item(), bool(host[0] > 0), host.nonzero(), host.cpu()
        assert waits.count == 0
        moved = host.clone().to(DEVICE)
        for wait in (
            lambda: (weight * 2).tolist(),
            lambda: weight.sum().item(),
            lambda: bool(weight[0] > 0),
            lambda: weight.nonzero(),
            lambda: host[weight > 0],
            lambda: weight[host > 0],
            lambda: moved.to("cpu"),
            lambda: torch.zeros(2, device=DEVICE).cpu(),
            lambda: torch.tensor([1, 2], device=DEVICE).tolist(),
            lambda: host.repeat_interleave(weight.long()),
        ):
            before = waits.count
            wait()
            assert waits.count > before
