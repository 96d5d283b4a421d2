"""Same rollouts, same weights: same loss and same gradient, whatever the layout and the micro-batch cut."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from tests.batches import make_config, make_groups, trace_ids
from tests.ranks import run_ranks


def train_steps(shape: str, budget: int, steps: int, sections: dict) -> dict:
    """``steps`` updates on made-up groups; this rank's metrics, first gradients and final weights as numpy."""
    from megatron_dypo.convert.stream import hf_tensors, random_weights
    from megatron_dypo.policy.policy import Policy
    from megatron_dypo.policy.shape import model_shape
    from megatron_dypo.runtime import distributed
    from megatron_dypo.update import logprob_passes, make_work, run_updates

    config = make_config(shape, budget, **sections)
    layout = distributed.init(config.parallel.tensor, config.parallel.pipeline, 60)
    model = model_shape(config.model)
    policy = Policy(config, model, layout, random_weights(model, seed=1))
    history, gradients = [], {}
    for step in range(steps):
        works = make_work(policy.layout, make_groups(seed=step), config, trace_ids)
        mismatch, offender = logprob_passes(policy, works, config)
        assert offender is None
        outcome = run_updates(policy, works, config, lr=1e-3)
        history.append(mismatch | outcome.metrics)
        if step == 0:
            main_grad = lambda parameter: parameter.main_grad  # noqa: E731
            tensors = hf_tensors(policy.gpt, model, layout, select=main_grad)
            gradients = {name: tensor.numpy().copy() for name, tensor in tensors}
    weights = {name: tensor.numpy().copy() for name, tensor in policy.named_tensors()}
    return {"history": history, "gradients": gradients, "weights": weights, "batches": len(works[0].rollouts)}


@functools.cache
def single_rank(shape: str, several_updates: bool) -> dict:
    sections = {"objective": {"updates_per_rollout": 3}} if several_updates else {}
    return run_ranks(1, train_steps, shape, 100_000, 3, sections)[0]


def assert_same(result: dict, reference: dict) -> None:
    for ours, theirs in zip(result["history"], reference["history"], strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert ours[name] == pytest.approx(value, rel=2e-4, abs=2e-6), name
        assert ours["loss/total"] == pytest.approx(theirs["loss/total"], rel=1e-5)
    for kind in ("gradients", "weights"):
        assert result[kind].keys() == reference[kind].keys()
        for name, theirs in reference[kind].items():
            gap = np.linalg.norm(result[kind][name].astype(np.float64) - theirs)
            assert gap <= 1e-5 * np.linalg.norm(theirs.astype(np.float64)) + 1e-9, f"{kind} of {name}"


LAYOUTS = [
    (1, {}),
    (2, {}),
    (4, {}),
    (2, {"tensor": 2}),
    (2, {"tensor": 2, "sequence_parallel": True}),
    (2, {"pipeline": 2}),
    (4, {"tensor": 2}),
    (4, {"tensor": 2, "pipeline": 2, "sequence_parallel": True}),
]


@pytest.mark.parametrize(("world", "parallel"), LAYOUTS, ids=str)
def test_loss_gradient_and_weights_layout_invariance(world, parallel):
    results = run_ranks(world, train_steps, "llama", 150, 3, {"parallel": parallel})
    for result in results:
        assert_same(result, single_rank("llama", False))


@pytest.mark.parametrize("shape", ["llama-tied", "qwen2-tied", "qwen3"])
@pytest.mark.parametrize("parallel", [{"tensor": 2, "sequence_parallel": True}, {"pipeline": 2}], ids=str)
def test_families_layout_invariance(shape, parallel):
    for result in run_ranks(2, train_steps, shape, 150, 3, {"parallel": parallel}):
        assert_same(result, single_rank(shape, False))


@pytest.mark.parametrize("budget", [60, 400])
def test_microbatch_invariance(budget):
    result = run_ranks(1, train_steps, "llama", budget, 3, {})[0]
    assert result["batches"] > 1
    assert_same(result, single_rank("llama", False))


def test_several_updates_per_rollout_layout_invariance():
    sections = {"objective": {"updates_per_rollout": 3}, "parallel": {"tensor": 2}}
    for result in run_ranks(4, train_steps, "llama", 150, 3, sections):
        assert_same(result, single_rank("llama", True))


@pytest.mark.parametrize("parallel", [{}, {"tensor": 2, "sequence_parallel": True}, {"pipeline": 2}], ids=str)
def test_first_ratio_is_exactly_one_and_first_kl_exactly_zero(parallel):
    """One packing plan serves the old, reference and training passes, so nothing differs in the last bit."""
    for result in run_ranks(2, first_step_log_ratios, parallel):
        assert result["largest"] == 0.0
        assert result["metrics"]["policy/clip_frac"] == 0.0
        assert result["metrics"]["loss/kl"] == 0.0


def first_step_log_ratios(parallel: dict) -> dict:
    """Largest |logp - old| and |logp - reference| seen by the training pass, and the step's metrics."""
    from megatron_dypo.objectives import TokenStreams

    largest, plain = [0.0], TokenStreams.terms

    def watched(self, logp_t, entropy_t, t):
        if self.reference_N is not None:
            largest.extend((logp_t - other[t]).abs().max().item() for other in (self.old_N, self.reference_N))
        return plain(self, logp_t, entropy_t, t)

    TokenStreams.terms = watched
    result = train_steps("llama", 150, 1, {"parallel": parallel})
    return {"largest": max(largest), "metrics": result["history"][0]}


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recompute_changes_nothing(recompute):
    result = run_ranks(1, train_steps, "llama", 100_000, 3, {"model": {"recompute": recompute}})[0]
    assert_same(result, single_rank("llama", False))
