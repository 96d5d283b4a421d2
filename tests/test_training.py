"""Edge cases of one update: nothing to train on, ranks without data, non-finite values, reference, checkpoints."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from megatron_dypo.checkpoint.manager import Counters
from megatron_dypo.config.schema import Optimizer
from megatron_dypo.config.stages import learning_rate
from megatron_dypo.objectives.correction import Correction
from megatron_dypo.records import Regime
from tests.batches import make_config, make_groups, trace_ids
from tests.ranks import run_ranks


def build(world_parallel: dict, **sections):
    """Return (config, policy) on this rank."""
    from megatron_dypo.models.shape import model_shape
    from megatron_dypo.models.sharding import random_weights
    from megatron_dypo.policy.policy import Policy
    from megatron_dypo.runtime import distributed

    config = make_config(parallel=world_parallel, **sections)
    layout = distributed.init(config.parallel)
    model = model_shape(config.model)
    return config, Policy(config, model, layout, random_weights(model, seed=1))


def weights_of(policy) -> dict:
    return {name: tensor.clone() for name, tensor in policy.named_tensors()}


def one_step(parallel: dict, kind: str) -> dict:
    """Return the result of a step on a batch reduced to ``kind``, on this rank."""
    from megatron_dypo.training.minibatch import build_minibatches
    from megatron_dypo.training.passes import logprob_passes
    from megatron_dypo.training.step import StepContext, run_updates

    config, policy = build(parallel)
    groups = make_groups()
    if kind == "easy":
        groups = [group for group in groups if group.regime == Regime.EASY]
    elif kind == "one-hard":
        groups = [group for group in groups if group.regime == Regime.HARD][:1]
        groups[0].teacher_indices = (0,)
    elif kind == "hard-without-teacher":
        groups = [group for group in groups if group.regime == Regime.HARD]
        for group in groups:
            group.teacher_indices = ()
    elif kind == "one-mid":
        groups = [group for group in groups if group.regime == Regime.MID][:1]
    before = weights_of(policy)
    minibatches = build_minibatches(policy.layout, groups, config, trace_ids)
    _, offender = logprob_passes(policy, minibatches, config)
    outcome = run_updates(policy, minibatches, config, StepContext(1, 1e-3))
    changed = any((tensor != before[name]).any().item() for name, tensor in policy.named_tensors())
    batches = len(minibatches[0].batches)
    return {
        "metrics": outcome.metrics,
        "empty": outcome.empty,
        "changed": changed,
        "batches": batches,
        "offender": offender,
    }


@pytest.mark.parametrize("kind", ["easy", "hard-without-teacher"])
@pytest.mark.parametrize("parallel", [{}, {"pipeline": 2}], ids=str)
def test_batch_with_nothing_to_train_on_is_an_empty_step(parallel, kind):
    for result in run_ranks(2, one_step, parallel, kind):
        assert result == {"metrics": {}, "empty": True, "changed": False, "batches": 0, "offender": None}


@pytest.mark.parametrize("kind", ["one-hard", "one-mid"])
def test_ranks_without_data_still_take_part(kind):
    """One sequence (or four) for four data-parallel ranks: equal numbers of micro-batches, same result everywhere."""
    results = run_ranks(4, one_step, {}, kind)
    assert len({result["batches"] for result in results}) == 1 and results[0]["batches"] >= 1
    assert all(result["changed"] and result["metrics"] == results[0]["metrics"] for result in results)
    assert results[0]["metrics"]["train/grad_norm"] > 0


def non_finite_gradient() -> dict:
    from megatron_dypo.training.minibatch import build_minibatches
    from megatron_dypo.training.passes import logprob_passes
    from megatron_dypo.training.step import StepContext, run_updates

    config, policy = build({}, rollout={"correction": "truncate"})
    groups = make_groups()
    before = weights_of(policy)
    minibatches = build_minibatches(policy.layout, groups, config, trace_ids)
    logprob_passes(policy, minibatches, config)
    if policy.layout.rank == 1:  # one rank's engine log-probs become bad: the truncated correction weights by them
        minibatches[0].logp["rollout"][0][0] = float("nan")
    outcome = run_updates(policy, minibatches, config, StepContext(1, 1e-3))
    changed = any((tensor != before[name]).any().item() for name, tensor in policy.named_tensors())
    return {"skipped": outcome.skipped, "changed": changed, "version": policy.version}


def test_non_finite_gradient_on_one_rank_is_applied_on_none():
    for result in run_ranks(2, non_finite_gradient):
        assert "gradient norm nan" in result["skipped"]
        assert not result["changed"] and result["version"] == 0


def skipped_for_weights() -> str:
    """Return the reason for skipping a step that one rank's weights spoil."""
    from megatron_dypo.training.step import StepContext, update_policy

    config, policy = build({"tensor": 2})
    if policy.layout.rank == 1:
        policy.parameters["decoder.layers.1.self_attention.linear_qkv.weight"].data[-1, 0] = float("nan")
    groups = make_groups()
    return update_policy(policy, groups, config, trace_ids, StepContext(1, 1e-3)).skipped


def test_a_step_skipped_for_weights_that_are_not_finite_names_them():
    for skipped in run_ranks(2, skipped_for_weights):
        assert skipped.startswith("NaN or infinite weights: model.layers.1.self_attn.v_proj.weight; so prompt ")


def reference_swap() -> bool:
    """Return whether the reference gives its own log-probs, and the policy returns bit for bit."""
    from megatron_dypo.training.minibatch import build_minibatches
    from megatron_dypo.training.passes import logprob_passes
    from megatron_dypo.training.step import StepContext, run_updates

    config, policy = build({"tensor": 2})
    groups = make_groups()
    minibatches = build_minibatches(policy.layout, groups, config, trace_ids)
    logprob_passes(policy, minibatches, config)
    first = [logp.clone() for logp in minibatches[0].logp["old"]]
    run_updates(policy, minibatches, config, StepContext(1, 1e-2))
    trained = weights_of(policy)
    logprob_passes(policy, minibatches, config)
    same_reference = all((a == b).all().item() for a, b in zip(first, minibatches[0].logp["reference"], strict=True))
    moved = any((a != b).any().item() for a, b in zip(first, minibatches[0].logp["old"], strict=True))
    intact = all((tensor == trained[name]).all().item() for name, tensor in policy.named_tensors())
    return same_reference and moved and intact


def test_reference_swap_is_bit_exact():
    assert run_ranks(2, reference_swap) == [True, True]


# -------------------------------------------------------------------------------- agreement with the rollout engine

CAP, FLOOR = 1.2, 0.9


def gaps(sample: int, tokens: int) -> np.ndarray:
    """Return log(old / engine) per token: all decades from 1e-5 on, both signs, and a mean that CAP may cut or not."""
    cycle = np.array([0.0, 3e-5, 3e-5, 3e-4, 3e-3, -3e-2, 0.3, 2.0, -2.0, 1.5, 0.5, 0.5])
    return (-1) ** sample * np.resize(cycle, tokens)


def trained_logprobs() -> dict[tuple[int, int], np.ndarray]:
    """Return the policy's log-probs of each trained response, by group and sample."""
    from megatron_dypo.training.minibatch import build_minibatches
    from megatron_dypo.training.passes import logprob_passes

    config, policy = build({})
    (work,) = build_minibatches(policy.layout, make_groups(), config, trace_ids)
    logprob_passes(policy, [work], config)
    found = {}
    for batch, old_N in zip(work.rollouts, work.logp["old"], strict=True):
        for place, old in zip(batch.places, batch.split(old_N), strict=True):
            found[work.sequences[place].group, work.sequences[place].sample] = old.numpy()
    return found


def agreement(parallel: dict, old: dict[tuple[int, int], np.ndarray]) -> dict[str, dict[str, float]]:
    """Return the metrics of a step in three updates whose engine differs by ``gaps``, under each correction."""
    from megatron_dypo.training.minibatch import build_minibatches
    from megatron_dypo.training.passes import logprob_passes

    several = {"updates_per_rollout": 3}
    config, policy = build(parallel, objective=several, rollout={"correction_cap": CAP})
    policy.version = 9
    groups = make_groups()
    for (g, i), old_t in old.items():
        groups[g].responses[i].logprobs = (old_t - gaps(i, len(old_t))).astype(np.float32)
        groups[g].responses[i].weight_version = 9 - i if g % 2 else 9 + i  # a replay may be ahead of the policy
    minibatches = build_minibatches(policy.layout, groups, config, trace_ids)
    results = {}
    config.rollout.correction_floor = FLOOR
    for correction in ("none", "truncate", "mask", "icepop"):
        for level in ("token", "sequence"):
            config.rollout.correction, config.objective.ratio_level = correction, level
            results[f"{correction} {level}"], offenders = logprob_passes(policy, minibatches, config)
            assert offenders is None
    return results


@pytest.fixture(scope="module")
def old_logprobs() -> dict[tuple[int, int], np.ndarray]:
    return run_ranks(1, trained_logprobs)[0]


@pytest.mark.parametrize(
    ("world", "parallel"), [(1, {}), (2, {"tensor": 2}), (4, {"pipeline": 2, "context": 2})], ids=str
)
def test_agreement_metrics_count_every_trained_token_once(old_logprobs, world, parallel):
    by_response = [gaps(i, len(old)) for (_, i), old in old_logprobs.items()]
    every, bound = np.concatenate(by_response), math.log(CAP)
    capped = sum(len(gap) for gap in by_response if gap.mean() > bound)
    low = sum(len(gap) for gap in by_response if gap.mean() < math.log(FLOOR))
    assert 0 < capped < capped + low < len(every)
    assert low != sum(len(gap) for gap in by_response if gap.mean() < -bound), "another band than the default's"
    outside = (every > bound) | (every < math.log(FLOOR))
    expected = {
        "none token": None,
        "none sequence": None,
        "truncate token": (every > bound).mean(),
        "truncate sequence": capped / len(every),
        "mask token": outside.mean(),
        "mask sequence": (capped + low) / len(every),
        "icepop token": outside.mean(),
        "icepop sequence": (capped + low) / len(every),
    }
    below = {"token": (every < math.log(FLOOR)).mean(), "sequence": low / len(every)}
    edges = [0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1, np.inf]
    shares, _ = np.histogram(abs(every), edges)
    for results in run_ranks(world, agreement, parallel, old_logprobs):
        for case, metrics in results.items():
            assert metrics.get("rollout/corrected_frac") == expected[case], case
            kind, level = case.split()
            assert metrics.get("rollout/corrected_low_frac") == (below[level] if kind in ("mask", "icepop") else None)
            found = [value for name, value in metrics.items() if name.startswith("rollout/mismatch_share/")]
            assert found[2:] == (shares / len(every)).tolist()[2:]
            assert sum(found[:2]) == pytest.approx((every == 0).mean()), "equal but for rounding"
            assert metrics["rollout/mismatch_mean"] == pytest.approx(abs(every).mean(), abs=1e-5)
            assert metrics["rollout/mismatch_max"] == pytest.approx(2.0, abs=1e-5)
            assert metrics["rollout/staleness_mean"] == 1.5 and metrics["rollout/staleness_max"] == 3


@pytest.mark.parametrize("floor", [None, 0.5, 0.0])
@pytest.mark.parametrize("kind", ["truncate", "mask", "icepop"])
def test_a_correction_binds_where_the_weight_is_not_the_ratio_or_not_one(kind, floor):
    log_ratio = torch.linspace(-5, 70, 1501, dtype=torch.float64)
    correction = Correction(kind, cap=3.0, floor=floor)
    plain = torch.ones_like(log_ratio) if kind == "mask" else log_ratio.exp()
    assert torch.equal(correction.binds(log_ratio), correction.weight(log_ratio) != plain)
    low = {None: 1 / 3, 0.5: 0.5, 0.0: 0.0}[floor]
    assert torch.equal(correction.is_below(log_ratio), (log_ratio.exp() < low) & (kind != "truncate"))
    assert not Correction("none").binds(log_ratio).any()


def test_learning_rate_is_a_pure_function_of_the_step():
    linear = Optimizer(lr=1.0, min_lr=0.1, schedule="linear", schedule_steps=30, warmup_steps=10)
    assert learning_rate(1, linear) == 0.1 and learning_rate(10, linear) == 1.0
    assert learning_rate(20, linear) == pytest.approx(0.55) and learning_rate(30, linear) == pytest.approx(0.1)
    assert learning_rate(99, linear) == pytest.approx(0.1)
    cosine = linear.model_copy(update={"schedule": "cosine"})
    assert learning_rate(20, cosine) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 2)) / 2)
    assert learning_rate(12345, Optimizer(lr=0.5)) == 0.5


def decayed_by(steps: int) -> dict[str, float]:
    """Return the ratio of each weight to its start after updates with only weight decay."""
    config, policy = build({})
    config.optimizer.weight_decay = 0.5
    before = weights_of(policy)
    for _ in range(steps):
        policy.zero_gradients()
        policy.optimizer.zero_grad()
        policy.step(lr=0.1)
    return {name: float(tensor.norm() / before[name].norm()) for name, tensor in policy.named_tensors()}


def test_weight_decay_spares_norms():
    for name, ratio in run_ranks(1, decayed_by, 2)[0].items():
        expected = 1.0 if "norm" in name else (1 - 0.1 * 0.5) ** 2
        assert ratio == pytest.approx(expected, rel=1e-5), name


def test_a_row_of_skipped_steps_is_not_ended_by_empty_ones():

    counters = Counters()
    for step, (skipped, empty) in enumerate([(True, False), (False, True), (True, False)], start=1):
        counters.count(step, 0, skipped, empty)
    assert (counters.skipped_in_a_row, counters.skipped_steps, counters.empty_steps) == (2, 2, 1)
    counters.count(4, 1, skipped=False, empty=False)
    assert counters.skipped_in_a_row == 0
