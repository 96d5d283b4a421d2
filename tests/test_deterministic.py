"""``trainer.deterministic``: what it sets, that training goes through under it, and that on the CPU no bit changes."""

from __future__ import annotations

import hashlib

import pytest

from tests.batches import make_config, make_groups, trace_ids
from tests.ranks import run_ranks

STEPS = 3


def updates(parallel: dict, deterministic: bool) -> tuple[dict, list[dict]]:
    """(digest of every weight, each step's metrics) after a few updates from the same seed, on this rank."""
    import torch

    from megatron_dypo.convert.stream import random_weights
    from megatron_dypo.policy.policy import Policy
    from megatron_dypo.policy.shape import model_shape
    from megatron_dypo.runtime import deterministic as mode
    from megatron_dypo.runtime import distributed
    from megatron_dypo.runtime.stopwatch import Stopwatch
    from megatron_dypo.update import update_policy

    config = make_config(parallel=parallel)
    config.trainer.deterministic = deterministic
    if deterministic:
        mode.enable()
    assert torch.are_deterministic_algorithms_enabled() == deterministic
    layout = distributed.init(config.parallel)
    shape = model_shape(config.model)
    policy = Policy(config, shape, layout, random_weights(shape, seed=1))
    assert policy.chunks[0].config.deterministic_mode == deterministic
    metrics = []
    for step in range(STEPS):
        outcome = update_policy(policy, make_groups(seed=step), config, trace_ids, 1e-2, Stopwatch())
        assert outcome.skipped is None and not outcome.empty
        metrics.append(outcome.metrics)
    digests = {
        name: hashlib.sha256(tensor.cpu().float().numpy().tobytes()).hexdigest()
        for name, tensor in policy.named_tensors()
    }
    return digests, metrics


@pytest.mark.parametrize("parallel", [{}, {"tensor": 2}], ids=["data", "tensor"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_on_the_cpu_the_mode_changes_no_bit(ranks, parallel):
    if ranks < parallel.get("tensor", 1):
        pytest.skip("needs a rank for each shard")
    with_mode, without = (run_ranks(ranks, updates, parallel, mode) for mode in (True, False))
    assert with_mode == without


def vllm_is_let_be() -> list[bool]:
    import torch

    from megatron_dypo.runtime import deterministic as mode

    mode.enable()
    seen = [torch.are_deterministic_algorithms_enabled()]
    with pytest.raises(KeyError), mode.not_enforced():
        seen.append(torch.are_deterministic_algorithms_enabled())
        raise KeyError
    return [*seen, torch.are_deterministic_algorithms_enabled()]


def test_torchs_refusal_is_off_inside_vllm_and_on_again_after_it_even_after_an_error():
    assert run_ranks(1, vllm_is_let_be) == [[True, False, True]]
