"""No layer makes the host wait for the device: what a pass costs in waits does not grow with its layers."""

from __future__ import annotations

import pytest
import torch

from tests.batches import make_config, make_groups, trace_ids
from tests.ranks import run_ranks

LAYERS = 2, 4


def waits_of_passes(shape: str, sections: dict) -> dict[str, list[dict[str, int]]]:
    """pass -> for each number of layers: how often the host waits, by the line that does."""
    from megatron_dypo.convert.stream import random_weights
    from megatron_dypo.policy.policy import Policy
    from megatron_dypo.policy.shape import model_shape
    from megatron_dypo.runtime import distributed
    from megatron_dypo.update import logprob_passes, make_work
    from megatron_dypo.update.step import run_updates
    from tests.waits import Waits, device_is_marked

    found: dict[str, list] = {"logprobs": [], "update": []}
    layout = None
    for layers in LAYERS:
        config = make_config(shape, **sections, objective={"reference": "previous"})
        config.model.shape = config.model.shape.model_copy(update={"num_layers": layers})
        layout = layout or distributed.init(config.parallel)
        model = model_shape(config.model)
        policy = Policy(config, model, layout, random_weights(model, seed=1))
        (work,) = make_work(layout, make_groups(), config, trace_ids)
        with device_is_marked():
            with Waits(policy.parameters.values()) as waits:
                policy.logprobs(work.rollouts)
            found["logprobs"].append(dict(waits.where))
            logprob_passes(policy, [work], config)
            with Waits(policy.parameters.values()) as waits:
                run_updates(policy, [work], config, 1e-3)
            found["update"].append(dict(waits.where))
        found["micro-batches"] = [{"rollouts": len(work.rollouts)}] * 2
    return found


@pytest.mark.parametrize(
    ("world", "shape", "sections"),
    [
        (1, "llama", {}),
        (1, "qwen3_moe", {"policy": {"routing": "replay_old", "aux_loss": 0.1}}),
        (2, "llama", {"parallel": {"pipeline": 2}}),
        (2, "llama", {"parallel": {"context": 2}}),
        (2, "llama", {"parallel": {"tensor": 2, "sequence_parallel": True}, "model": {"recompute": "full"}}),
    ],
    ids=["dense", "mixture", "pipeline", "context", "tensor"],
)
def test_the_host_waits_as_often_for_many_layers_as_for_few(world, shape, sections):
    for rank, found in enumerate(run_ranks(world, waits_of_passes, shape, sections)):
        for name, (few, many) in found.items():
            more = {line: count for line, count in many.items() if count > few.get(line, 0)}
            if shape == "qwen3_moe":  # all-to-all needs sizes on the host: mcore copies them, and selects by a mask
                more = {line: count for line, count in more.items() if "at transformer/moe/" not in line}
            assert not more, f"rank {rank}, {name}: with {LAYERS[1]} layers instead of {LAYERS[0]}"


def test_a_mixtures_layer_waits_for_its_sizes_alone():
    """Of a pass over a micro-batch, in Megatron-Core: two selections by mask (not in 0.19), copies of two counts."""
    (found,) = run_ranks(1, waits_of_passes, "qwen3_moe", {})
    few, many = (sum(waits.values()) for waits in found["logprobs"])
    assert many - few in {n * (LAYERS[1] - LAYERS[0]) * found["micro-batches"][0]["rollouts"] for n in (2, 4)}


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
