"""``trainer.deterministic``: its settings, training under it, and no changed bit on the CPU."""

from __future__ import annotations

import hashlib
from importlib import import_module
from importlib.util import find_spec

import pytest

from megatron_dypo.errors import UserError
from megatron_dypo.runtime.determinism import _CUDA_ENVIRONMENT, refuse_batch_invariance
from tests.batches import make_config, make_groups, trace_ids
from tests.ranks import run_ranks

STEPS = 3


def updates(parallel: dict, deterministic: bool) -> tuple[dict, list[dict]]:
    """Return (digest of every weight, each step's metrics) after a few updates from the same seed, on this rank."""
    import torch

    from megatron_dypo.models.shape import model_shape
    from megatron_dypo.models.sharding import random_weights
    from megatron_dypo.policy.policy import Policy
    from megatron_dypo.runtime import determinism as mode
    from megatron_dypo.runtime import distributed
    from megatron_dypo.training.step import StepContext, update_policy

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
        outcome = update_policy(policy, make_groups(seed=step), config, trace_ids, StepContext(1, 1e-2))
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

    from megatron_dypo.runtime import determinism as mode

    mode.enable()
    seen = [torch.are_deterministic_algorithms_enabled()]
    with pytest.raises(KeyError), mode.not_enforced():
        seen.append(torch.are_deterministic_algorithms_enabled())
        raise KeyError
    return [*seen, torch.are_deterministic_algorithms_enabled()]


def test_torchs_refusal_is_off_inside_vllm_and_on_again_after_it_even_after_an_error():
    assert run_ranks(1, vllm_is_let_be) == [[True, False, True]]


def what_batch_invariance_does(mode: str) -> tuple[dict, list[str]]:
    """Return (the trainer's variables afterwards, the exception) around vLLM's own start of that mode on a CPU."""
    import os

    from megatron_dypo.runtime import determinism

    place = "determinism" if find_spec("vllm.model_executor.determinism") else "layers"
    vllms = import_module(f"vllm.model_executor.{place}.batch_invariant")

    os.environ |= {"VLLM_BATCH_INVARIANT": mode} | determinism._CUDA_ENVIRONMENT
    raised = []
    try:
        with determinism.trainer_kept():
            vllms.init_batch_invariance()
    except RuntimeError as error:
        raised.append(str(error))
    return {name: os.environ[name] for name in determinism._CUDA_ENVIRONMENT}, raised


@pytest.mark.parametrize("mode", ["0", "1"])
def test_vllms_batch_invariant_mode_cannot_change_the_trainer_unseen(mode):
    """The mode replaces kernels, which is noticed; and the trainer's variables are kept."""
    ((variables, raised),) = run_ranks(1, what_batch_invariance_does, mode)
    assert variables == _CUDA_ENVIRONMENT
    assert len(raised) == int(mode)
    assert all("softmax" in line and "replaced torch's kernels" in line for line in raised)


def test_the_mode_asks_vllm_for_nothing_and_a_user_who_does_is_refused(monkeypatch):
    assert not any(name.startswith("VLLM") for name in _CUDA_ENVIRONMENT)
    for harmless in ("", "0"):
        monkeypatch.setenv("VLLM_BATCH_INVARIANT", harmless)
        refuse_batch_invariance("run.yaml")
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    with pytest.raises(UserError, match=r"^run.yaml: VLLM_BATCH_INVARIANT=1 .* rollout.engine: server$"):
        refuse_batch_invariance("run.yaml")
