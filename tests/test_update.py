"""One update at its edges: nothing to train on, ranks without data, non-finite values, reference, checkpoints."""

from __future__ import annotations

import math

import pytest

from megatron_dypo.checkpoint.counters import Counters
from megatron_dypo.config.schema import Optimizer
from megatron_dypo.policy.schedule import learning_rate
from megatron_dypo.records import Regime
from tests.batches import make_config, make_groups, trace_ids
from tests.ranks import run_ranks


def build(world_parallel: dict, **sections):
    """(config, policy) on this rank."""
    from megatron_dypo.convert.stream import random_weights
    from megatron_dypo.policy.policy import Policy
    from megatron_dypo.policy.shape import model_shape
    from megatron_dypo.runtime import distributed

    config = make_config(parallel=world_parallel, **sections)
    layout = distributed.init(config.parallel.tensor, config.parallel.pipeline, 60)
    model = model_shape(config.model)
    return config, Policy(config, model, layout, random_weights(model, seed=1))


def weights_of(policy) -> dict:
    return {name: tensor.clone() for name, tensor in policy.named_tensors()}


def one_step(parallel: dict, kind: str) -> dict:
    """A step on a batch reduced to ``kind``; what it did on this rank."""
    from megatron_dypo.update import logprob_passes, make_work, run_updates

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
    works = make_work(policy.layout, groups, config, trace_ids)
    _, offender = logprob_passes(policy, works, config)
    outcome = run_updates(policy, works, config, lr=1e-3)
    changed = any((tensor != before[name]).any().item() for name, tensor in policy.named_tensors())
    batches = len(works[0].rollouts) + len(works[0].teachers)
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
    from megatron_dypo.update import logprob_passes, make_work, run_updates

    config, policy = build({}, rollout={"correction": "truncate"})
    groups = make_groups()
    before = weights_of(policy)
    works = make_work(policy.layout, groups, config, trace_ids)
    logprob_passes(policy, works, config)
    if policy.layout.rank == 1:  # one rank's engine log-probs go bad: the truncated correction weighs by them
        works[0].logp["rollout"][0][0] = float("nan")
    outcome = run_updates(policy, works, config, lr=1e-3)
    changed = any((tensor != before[name]).any().item() for name, tensor in policy.named_tensors())
    return {"skipped": outcome.skipped, "changed": changed, "version": policy.version}


def test_non_finite_gradient_on_one_rank_is_applied_on_none():
    for result in run_ranks(2, non_finite_gradient):
        assert "gradient norm is nan" in result["skipped"]
        assert not result["changed"] and result["version"] == 0


def reference_swap() -> bool:
    """The reference goes in, gives its own log-probs, and the policy comes back bit for bit."""
    from megatron_dypo.update import logprob_passes, make_work, run_updates

    config, policy = build({"tensor": 2})
    groups = make_groups()
    works = make_work(policy.layout, groups, config, trace_ids)
    logprob_passes(policy, works, config)
    first = [logp.clone() for logp in works[0].logp["old"]]
    run_updates(policy, works, config, lr=1e-2)
    trained = weights_of(policy)
    logprob_passes(policy, works, config)
    same_reference = all((a == b).all().item() for a, b in zip(first, works[0].logp["reference"], strict=True))
    moved = any((a != b).any().item() for a, b in zip(first, works[0].logp["old"], strict=True))
    intact = all((tensor == trained[name]).all().item() for name, tensor in policy.named_tensors())
    return same_reference and moved and intact


def test_reference_swap_is_bit_exact():
    assert run_ranks(2, reference_swap) == [True, True]


def test_learning_rate_is_a_pure_function_of_the_step():
    linear = Optimizer(lr=1.0, min_lr=0.1, schedule="linear", schedule_steps=30, warmup_steps=10)
    assert learning_rate(1, linear) == 0.1 and learning_rate(10, linear) == 1.0
    assert learning_rate(20, linear) == pytest.approx(0.55) and learning_rate(30, linear) == pytest.approx(0.1)
    assert learning_rate(99, linear) == pytest.approx(0.1)
    cosine = linear.model_copy(update={"schedule": "cosine"})
    assert learning_rate(20, cosine) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 2)) / 2)
    assert learning_rate(12345, Optimizer(lr=0.5)) == 0.5


def checkpoint_round_trip(folder: str, parallel: dict) -> dict:
    """Save after one step, take two more; load into a new policy, take the same two: equal bit for bit?"""
    from pathlib import Path

    from megatron_dypo.checkpoint import checkpoint
    from megatron_dypo.checkpoint.folders import complete_steps, step_folder
    from megatron_dypo.convert.stream import random_weights
    from megatron_dypo.policy.policy import Policy
    from megatron_dypo.update import logprob_passes, make_work, run_updates

    run_dir = Path(folder)
    config, policy = build(parallel)

    def steps(policy, numbers) -> dict:
        for number in numbers:
            works = make_work(policy.layout, make_groups(seed=number), config, trace_ids)
            logprob_passes(policy, works, config)
            metrics = run_updates(policy, works, config, lr=1e-3).metrics
        return metrics

    steps(policy, [0])
    for number in (1, 2, 3):
        counters = Counters(step=number, weight_version=policy.version, skipped_steps=7)
        checkpoint.save(run_dir, policy, counters, keep=2)
    metrics = steps(policy, [1, 2])
    other = Policy(config, policy.shape, policy.layout, random_weights(policy.shape, seed=99))
    loaded = checkpoint.load(step_folder(run_dir, 3), other)
    again = steps(other, [1, 2])
    weights, others = weights_of(policy), weights_of(other)
    return {
        "kept": complete_steps(run_dir),
        "counters": loaded == Counters(step=3, weight_version=1, skipped_steps=7),
        "version": other.version == policy.version == 3,
        "metrics": metrics == again,
        "weights": all((weights[name] == others[name]).all().item() for name in weights),
    }


@pytest.mark.parametrize("parallel", [{}, {"tensor": 2, "sequence_parallel": True}, {"pipeline": 2}], ids=str)
def test_checkpoint_resumes_bit_equal_at_the_same_layout(parallel, tmp_path):
    for result in run_ranks(2, checkpoint_round_trip, str(tmp_path), parallel):
        assert result == {"kept": [2, 3], "counters": True, "version": True, "metrics": True, "weights": True}


def test_incomplete_checkpoints_are_ignored(tmp_path):
    from megatron_dypo.checkpoint.folders import complete_steps

    run_ranks(1, checkpoint_round_trip, str(tmp_path), {})
    newest = tmp_path / "checkpoints" / "step_3"
    data = next(newest.glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-1])
    assert complete_steps(tmp_path) == [2], "a truncated file"
    (tmp_path / "checkpoints" / "step_2" / "manifest.json").unlink()
    assert complete_steps(tmp_path) == [], "no manifest"


def reshard_reference(folder: str, parallel: dict, saving: bool) -> dict | bool:
    """Save at one layout; at another, load and return the reference's and the policy's full tensors."""
    from pathlib import Path

    from megatron_dypo.checkpoint import checkpoint
    from megatron_dypo.checkpoint.folders import step_folder
    from megatron_dypo.convert.stream import load_weights, random_weights
    from megatron_dypo.update import logprob_passes, make_work, run_updates

    config, policy = build(parallel)
    if saving:
        works = make_work(policy.layout, make_groups(), config, trace_ids)
        logprob_passes(policy, works, config)
        run_updates(policy, works, config, lr=1e-2)
        checkpoint.save(Path(folder), policy, Counters(step=1, weight_version=1), keep=1)
        return True
    load_weights(policy.gpt, policy.shape, policy.layout, random_weights(policy.shape, seed=99))
    policy.keep_reference()
    checkpoint.load(step_folder(Path(folder), 1), policy)
    with policy.reference_weights():
        reference = weights_of(policy)
    both = {"reference": reference, "policy": weights_of(policy)}
    return {kind: {name: tensor.numpy() for name, tensor in tensors.items()} for kind, tensors in both.items()}


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [({"tensor": 2}, {}), ({"pipeline": 2}, {}), ({}, {"tensor": 2, "sequence_parallel": True})],
    ids=str,
)
def test_weights_and_reference_load_at_another_layout(saved, loaded, tmp_path):
    run_ranks(max([1, *saved.values()]), reshard_reference, str(tmp_path), saved, True)
    same = run_ranks(max([1, *saved.values()]), reshard_reference, str(tmp_path), saved, False)[0]
    other = run_ranks(max([1, *loaded.values()]), reshard_reference, str(tmp_path), loaded, False)[0]
    for kind in ("reference", "policy"):
        for name, tensor in same[kind].items():
            assert (other[kind][name] == tensor).all(), (kind, name)
    assert any((same["reference"][name] != tensor).any() for name, tensor in same["policy"].items())


def save_before_any_update(folder: str) -> bool:
    from pathlib import Path

    from megatron_dypo.checkpoint import checkpoint
    from megatron_dypo.checkpoint.folders import step_folder

    _, policy = build({})
    counters = Counters(step=1, empty_steps=1)
    checkpoint.save(Path(folder), policy, counters, keep=1)
    before = weights_of(policy)
    return checkpoint.load(step_folder(Path(folder), 1), policy) == counters and all(
        (tensor == before[name]).all() for name, tensor in policy.named_tensors()
    )


def test_checkpoint_before_the_first_applied_update_loads(tmp_path):
    assert run_ranks(2, save_before_any_update, str(tmp_path)) == [True, True]


def decayed_by(steps: int) -> dict[str, float]:
    """Ratio of each weight to its start after updates with zero gradients and weight decay alone."""
    config, policy = build({})
    config.optimizer.weight_decay = 0.5
    before = weights_of(policy)
    for _ in range(steps):
        policy.model.zero_grad_buffer()
        policy.optimizer.zero_grad()
        assert policy.step(lr=0.1)[0]
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
