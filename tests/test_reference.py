"""The frozen reference: the same log-probs wherever it is, no copy of the policy, no allocation after one swap."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import pytest

from tests.batches import make_config, make_groups, trace_ids
from tests.ranks import run_ranks

STEPS = 4
CHUNK, STAGE = 5000, 1 << 10  # bytes: most weights are in several pieces, and cross chunks' borders


def copied():
    """The definition: copy every weight before the pass and after it."""
    import torch

    from megatron_dypo.policy.reference import OnDevice

    class Copied(OnDevice):
        def swap(self) -> None:
            with torch.no_grad():
                for name, parameter in self._parameters.items():
                    current = parameter.detach().clone()
                    parameter.copy_(self._kept[name])
                    self._kept[name].copy_(current)

    return Copied


def allocated(action: Callable[[], object]) -> int:
    """Return the bytes of all storages that ``action`` creates."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            tensors = lambda tree: [x.untyped_storage() for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]  # noqa: E731
            given = {storage.data_ptr() for storage in tensors((args, kwargs))}
            sizes.extend(s.nbytes() for s in tensors(result) if s.data_ptr() not in given)
            return result

    with Watch():
        action()
    return sum(sizes)


def runs(shape: str, sections: dict) -> dict:
    """Return per place of the reference: metrics, bits of weights and reference after updates, swaps' allocations."""
    from megatron_dypo.models.shape import model_shape
    from megatron_dypo.models.sharding import random_weights
    from megatron_dypo.policy import host_memory, reference
    from megatron_dypo.policy.policy import Policy
    from megatron_dypo.runtime import distributed
    from megatron_dypo.training.step import StepContext, update_policy

    host_memory.CHUNK, reference.STAGE = CHUNK, STAGE
    reference.PLACES["copied"] = copied()
    digest = lambda tensor: hashlib.sha256(tensor.detach().float().numpy().tobytes()).hexdigest()  # noqa: E731
    layout, found = None, {}
    for place in ("copied", "device", "host"):
        config = make_config(shape, **sections, objective={"kl_coef": 0.1, "reference": "every:3"})
        config.model.reference_on = place
        layout = layout or distributed.init(config.parallel)
        policy = Policy(config, model_shape(config.model), layout, random_weights(model_shape(config.model), seed=1))
        metrics, bytes_before = [], getattr(policy.reference, "host_bytes", 0)
        for step in range(1, STEPS + 1):
            policy.refresh_reference(step)
            outcome = update_policy(policy, make_groups(seed=step), config, trace_ids, StepContext(1, 1e-2))
            assert outcome.skipped is None and not outcome.empty
            metrics.append(outcome.metrics)
        found[place] = {
            "metrics": metrics,
            "weights": {name: digest(tensor) for name, tensor in policy.named_tensors()},
            "reference": {name: digest(policy.reference.read(name)) for name in policy.parameters},
            "swap": [allocated(policy.reference.swap) for _ in range(2)],
            "refresh": allocated(policy.keep_reference),
            "host": (bytes_before, getattr(policy.reference, "host_bytes", 0)),
            "bytes": sum(parameter.nbytes for parameter in policy.parameters.values()),
        }
    return found


BF16 = {"model": {"dtype": "bf16"}}
DISTRIBUTED = {"optimizer": {"distributed": True}}
CASES = [
    pytest.param(1, "llama-tied", BF16, marks=pytest.mark.faults),
    (2, "llama-tied", BF16 | DISTRIBUTED),
    (2, "qwen3", DISTRIBUTED | {"parallel": {"tensor": 2, "sequence_parallel": True}}),
    (2, "llama-tied", {"parallel": {"pipeline": 2, "virtual_pipeline": 2}}),
    (2, "qwen3_moe", DISTRIBUTED | {"parallel": {"expert": 2}}),
]


@pytest.mark.parametrize(("world", "shape", "sections"), CASES, ids=str)
def test_device_and_host_reference_are_the_copied_one_bit_for_bit_and_swaps_allocate_nothing(world, shape, sections):
    for found in run_ranks(world, runs, shape, sections):
        copied, device, host = (found[place] for place in ("copied", "device", "host"))
        assert any(metrics["loss/kl"] > 1e-4 for metrics in copied["metrics"]), "reference and policy differ"
        for what in ("metrics", "weights", "reference"):
            assert device[what] == copied[what], f"device: {what}"
            assert host[what] == copied[what], f"host: {what}"
        assert device["swap"] == [0, 0] and device["refresh"] == 0
        assert host["swap"] == [2 * STAGE] * 2 and host["refresh"] == 0, "the two staging buffers on the device"
        assert host["host"][0] == host["host"][1] == -(-host["bytes"] // CHUNK) * CHUNK, "one copy, in whole chunks"
