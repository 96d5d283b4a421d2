"""ReLIFT's queue: which groups wait and are due, its update against autograd, skipped updates, resumes and replays.

The runs are whole ones. Their expected queue is computed from the recorded rollouts by ``played``, which uses nothing
of the package.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_dypo.checkpoint.catalog import step_folder
from megatron_dypo.config.load import load_keys
from megatron_dypo.config.schema import Objective
from megatron_dypo.errors import TrainingError, UserError
from megatron_dypo.objectives.queue import DeferredQueue, failed
from megatron_dypo.records import Group, Prompt, Regime, Response
from megatron_dypo.rollout.manager import check_staleness
from tests.batches import make_config, make_groups, trace_ids
from tests.launch import checkpoint_digests, copy_task, metrics, train_here, without_times
from tests.ranks import run_ranks
from tests.test_objectives import EXACT, MIXED, SINGLE, flat, gradient, make_batch, ours, reference

# --- who waits, who is due

STEPS_OF_PROMPTS = st.lists(st.lists(st.integers(0, 9), max_size=6), max_size=12)


@given(STEPS_OF_PROMPTS, st.integers(1, 5), st.sampled_from(["oldest", "newest"]))
def test_each_prompt_is_trained_on_as_often_as_it_failed_or_waits_still(steps, size, order):
    queue, flushed = DeferredQueue(size, order), []
    for prompts in steps:
        queue.add(prompts)
        before, due = list(queue.waiting), queue.due
        assert len(due) == (size if len(before) >= size else 0) and queue.waiting == before, "asking removes nothing"
        queue.remove_due()
        flushed += due
    assert Counter([*flushed, *queue.waiting]) == Counter(prompt for prompts in steps for prompt in prompts)


def test_the_oldest_are_due_first_or_the_newest_with_those_of_a_step_in_its_order():
    left = {}
    for order in ("oldest", "newest"):
        queue = DeferredQueue(3, order)
        for prompts in (["a", "b"], [], ["c", "d"]):
            queue.add(prompts)
        left[order] = (queue.due, queue.waiting)
    assert left["oldest"] == (["a", "b", "c"], ["a", "b", "c", "d"])
    assert left["newest"] == (["c", "d", "a"], ["c", "d", "a", "b"])


def graded(regime: Regime, rewards: list[float], teachers: tuple[int, ...] | None) -> Group:
    responses = [Response(np.zeros(1, np.int32), np.zeros(1, np.float32), "stop", reward) for reward in rewards]
    return Group(
        Prompt(f"{regime.name}{teachers}{rewards}", "", ()), np.zeros(1, np.int32), responses, regime, teachers
    )


def test_hard_prompts_with_a_usable_trace_and_known_rewards_wait_and_no_others():
    hard = graded(Regime.HARD, [0.0, 0.0], (1, 0))
    groups = [
        hard,
        graded(Regime.MID, [0.0, 1.0], (0,)),
        graded(Regime.EASY, [1.0, 1.0], (0,)),
        graded(Regime.HARD, [0.0, 0.0], ()),
        graded(Regime.HARD, [0.0, 0.0], None),
        graded(Regime.HARD, [0.0, float("nan")], (0,)),
    ]
    assert failed(groups, Objective(method="relift")) == [(hard.prompt.id, (1, 0))]
    for method in ("dypo", "grpo", "switch"):
        assert failed(groups, Objective(method=method)) == []


# --- the update on the queue


@pytest.mark.parametrize("aggregation", ["scale", "token_mean"])
@pytest.mark.parametrize("entropy_coef", [0.0, 0.1])
def test_an_update_on_the_queue_is_that_of_sft_on_its_traces(aggregation, entropy_coef):
    common = {"demo_aggregation": aggregation, "entropy_coef": entropy_coef, "gamma": 2.5, "teachers_per_prompt": 2}
    objective = Objective(method="relift", **common)
    batch = make_batch(MIXED, objective, traces=[2] * len(MIXED)).waiting(objective)
    assert len(batch.groups) == 2
    terms, leaves = reference(batch, Objective(method="sft", **common))
    summands = terms.summands()
    expected = flat(gradient(summands.sum(), leaves), leaves)
    assert expected.norm() > 0.1
    for dtype, tolerance in ((torch.float64, EXACT), (torch.float32, SINGLE)):
        found = ours(batch, objective, dtype=dtype, deferred=True)
        assert abs(found.loss - summands.sum().item()) <= tolerance * summands.abs().sum().item()
        assert (flat(found.gradient, leaves) - expected).norm() <= tolerance * expected.norm()


def test_a_prompt_that_waits_twice_counts_twice():
    objective = Objective(method="relift", demo_aggregation="token_mean")
    batch = make_batch([[0, 0]], objective).waiting(objective)
    twice = make_batch([[0, 0]], objective).waiting(objective)
    twice.groups *= 2
    twice.logp |= {(1, kind, i): x for (_, kind, i), x in twice.logp.items()}
    one, two = (ours(each, objective, deferred=True) for each in (batch, twice))
    assert len(two.gradient) == 2 and two.loss == pytest.approx(one.loss, rel=1e-12)


# --- one step's updates


ROUNDS = {  # (with prompts of the queue, norms of earlier updates on it), judged by spike_factor 3
    "without": (False, []),
    "first": (True, []),
    "far above": (True, [1e9] * 20),
    "too few": (True, [0.1] * 19),
    "spike": (True, [0.1] * 20),
}


def updates() -> dict[str, dict]:
    """Run on a forked rank: a step of two updates, and one on the queue, from the same weights, per round of ROUNDS."""
    from megatron_dypo.models.shape import model_shape
    from megatron_dypo.models.sharding import random_weights
    from megatron_dypo.policy.policy import Policy
    from megatron_dypo.runtime import distributed
    from megatron_dypo.training.minibatch import grade_groups
    from megatron_dypo.training.step import StepContext, update_policy

    objective = {"method": "relift", "updates_per_rollout": 2, "gamma": 50.0}
    config = make_config(objective=objective, trainer={"spike_factor": 3.0})
    layout, shape = distributed.init(config.parallel), model_shape(config.model)
    found = {}
    for name, (with_queue, before) in ROUNDS.items():
        policy = Policy(config, shape, layout, random_weights(shape, seed=1))
        groups = make_groups()
        grade_groups(groups, config.objective, 0, 1, lambda group: [0, 1])
        due = [Group(group.prompt, group.prompt_ids, teacher_indices=(1,)) for group in groups[:3]] * with_queue
        others = found["without"]["norms"][0][:1] * 20 if found else []
        context = StepContext(1, 1e-3, grad_norms=others, flush_norms=before)
        result = update_policy(policy, groups, config, trace_ids, context, due)
        found[name] = {
            "metrics": result.metrics,
            "norms": (result.grad_norms, result.flush_norms),
            "skipped": result.skipped,
            "version": policy.version,
        }
    return found


@pytest.fixture(scope="module")
def rounds() -> dict[str, dict]:
    return run_ranks(1, updates)[0]


def test_an_update_on_the_queue_is_one_more_and_leaves_the_others_metrics_alone(rounds):
    without, with_queue = rounds["without"], rounds["first"]
    assert (without["version"], with_queue["version"]) == (2, 3)
    of_queue = {"flush/loss", "flush/grad_norm", "loss/sft", "grad_share/sft"}
    assert with_queue["metrics"].keys() - without["metrics"].keys() == of_queue
    assert {name: with_queue["metrics"][name] for name in without["metrics"]} == without["metrics"]
    assert with_queue["norms"] == (without["norms"][0], [with_queue["metrics"]["flush/grad_norm"]])
    assert with_queue["metrics"]["flush/loss"] == pytest.approx(50 * with_queue["metrics"]["loss/sft"])


@pytest.mark.parametrize("name", ["first", "far above", "too few", "spike"])
def test_norms_of_updates_on_the_queue_are_judged_by_their_own_level(rounds, name):
    """The others' norms are far below: by their level each would be a spike."""
    found, skipped = rounds[name], name == "spike"
    assert rounds["first"]["norms"][1][0] > 10 * max(found["norms"][0])
    assert found["version"] == 3 - skipped and len(found["norms"][1]) == 1 - skipped
    assert (found["skipped"] or "").startswith("update 3 of 3 (of the queue): gradient norm") == skipped


# --- staleness


@pytest.mark.parametrize(("method", "limit"), [("grpo", 2), ("relift", 3)])
def test_a_batch_sampled_ahead_may_be_older_by_the_update_on_the_queue(method, limit):
    config = make_config(rollout={"async_rollout": 1}, objective={"method": method, "updates_per_rollout": 2})
    groups = make_groups()
    check_staleness(groups, limit, config)
    with pytest.raises(TrainingError, match=f"more than rollout.max_staleness: {limit} updates"):
        check_staleness(groups, limit + 1, config)


def test_an_age_that_would_refuse_the_batch_after_an_update_on_the_queue_is_refused_at_once():
    keys = ["rollout.engine=server", "rollout.servers=[http://a:1]", "rollout.async_rollout=1"]
    load_keys([*keys, "rollout.max_staleness=1", "objective.method=grpo"], "config")
    load_keys([*keys, "rollout.max_staleness=2", "objective.method=relift"], "config")
    with pytest.raises(UserError, match=r"max_staleness: 1 would refuse the batch after an update on the queue"):
        load_keys([*keys, "rollout.max_staleness=1", "objective.method=relift"], "config")


# --- whole runs

STEPS, SIZE = 6, 7
REWARD = """def compute(data_source, solution_str, ground_truth, extra_info=None):
    digit = int(ground_truth)
    return float(digit < 2 or (digit < 5 and len(solution_str) % 2 == 0))
"""  # Easy, mostly Mid, and Hard
TASK = {
    "objective__method": "relift",
    "objective__queue_size": SIZE,
    "objective__kl_coef": 0.0,
    "objective__entropy_coef": 0.01,
    "objective__demo_aggregation": "token_mean",
    "rollout__engine": "transformers",
    "rollout__async_rollout": 1,
    "rollout__correction": "truncate",
    "optimizer__distributed": True,
    "trainer__steps": STEPS,
    "trainer__save_every": 1,
    "trainer__keep_checkpoints": STEPS,
    "trainer__eval_every": 0,
}


def train_watched(config: str, overrides: list[str]) -> list[list[list]]:
    """Train on a forked rank; return what was due in each step, as recordings name it."""
    from megatron_dypo import trainer

    seen, update = [], trainer.update_policy

    def watched(*arguments):
        seen.append([[group.prompt.id, list(group.teacher_indices)] for group in arguments[-1]])
        return update(*arguments)

    trainer.update_policy = watched
    train_here(config, overrides)
    return seen


def failures(folder: Path) -> list[list[list]]:
    """Return [prompt, teachers] of each recorded step's groups without a right response."""
    steps = []
    for step in range(1, STEPS + 1):
        lines = map(json.loads, (folder / f"rollouts/step_{step:06d}.jsonl").read_text().splitlines())
        wrong = [line for line in lines if all(response["reward"] == 0 for response in line["responses"])]
        steps.append([[line["id"], line["teacher_indices"]] for line in wrong])
    return steps


def played(steps: list[list[list]], waiting: list[list] | None = None) -> list[tuple[list, list]]:
    """Return (due, left) of each step of a queue of SIZE, oldest first."""
    waiting, found = waiting or [], []
    for wrong in steps:
        waiting = waiting + wrong
        due = waiting[:SIZE] if len(waiting) >= SIZE else []
        waiting = waiting[len(due) :]
        found.append((due, waiting))
    return found


def state(run: Path, step: int) -> dict:
    return json.loads((step_folder(run, step) / "state.json").read_text())


def task(folder: Path, straight: Path, **changes: object) -> Path:
    """Write a configuration to ``folder`` with the prompts and the reward function of ``straight``."""
    paths = {"data__train": "train.jsonl", "data__valid": "valid.jsonl", "reward__function": "reward.py:compute"}
    shared = {key: str(straight / name) for key, name in paths.items()}
    return copy_task(folder, rollout__record=str(folder / "rollouts"), **(TASK | shared | changes))


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    """Return the folder of an uninterrupted run on two ranks, one step off-policy; its due entries are in due.json."""
    folder = tmp_path_factory.mktemp("straight")
    (folder / "reward.py").write_text(REWARD)
    config = task(folder, folder)
    seen = run_ranks(2, train_watched, str(config), [])
    assert seen[0] == seen[1], "both ranks have the same queue"
    (folder / "due.json").write_text(json.dumps(seen[0]))
    return folder


def test_what_failed_is_trained_on_once_oldest_first_and_counts_as_an_update(straight):
    expected, lines, version = played(failures(straight)), metrics(straight / "run"), 0
    assert json.loads((straight / "due.json").read_text()) == [due for due, _ in expected]
    for step, ((due, left), line) in enumerate(zip(expected, lines, strict=True), start=1):
        kept = state(straight / "run", step)
        version += 1 + bool(due)
        assert kept["queue"] == left and line["queue/length"] == len(left)
        assert kept["weight_version"] == version and line["train/empty_steps"] == 0
        assert ("flush/loss" in line) == ("loss/sft" in line) == bool(due)
        assert len(kept["flush_norms"]) == version - step
    assert any(due for due, _ in expected) and any(left and not due for due, left in expected)
    assert max(line.get("rollout/staleness_max", 0) for line in lines) == 2, "of an update and one on the queue"
    assert len({len(teachers) for due, _ in expected for _, teachers in due}) == 1


def cut_after(straight: Path, folder: Path, step: int) -> Path:
    """Copy the run as a kill in a later step would leave it; return its configuration."""
    shutil.copytree(straight / "run", folder / "run", ignore=shutil.ignore_patterns("engine"))
    for later in range(step + 1, STEPS + 1):
        shutil.rmtree(step_folder(folder / "run", later))
    return task(folder, straight)


@pytest.mark.parametrize("when", ["half full", "right after an update on it"])
def test_a_killed_run_goes_on_with_its_queue_bit_for_bit(straight, tmp_path, when):
    expected = played(failures(straight))
    wanted = [step for step, (due, left) in enumerate(expected[:-1], 1) if (left and not due, due)[when != "half full"]]
    config = cut_after(straight, tmp_path, wanted[0])
    run_ranks(2, train_here, str(config), [])
    assert without_times(metrics(tmp_path / "run")) == without_times(metrics(straight / "run"))
    assert state(tmp_path / "run", STEPS) == state(straight / "run", STEPS)
    ours, theirs = (
        run_ranks(1, checkpoint_digests, str(step_folder(folder / "run", STEPS)))[0] for folder in (tmp_path, straight)
    )
    assert ours == theirs


def test_a_replay_on_one_rank_goes_on_with_the_queue_of_a_checkpoint_of_two(straight, tmp_path):
    after = next(step for step, (due, left) in enumerate(played(failures(straight)), 1) if left and not due)
    config = cut_after(straight, tmp_path, after)
    replay = ["rollout.engine=replay", f"rollout.replay={straight / 'rollouts'}"]
    (due,) = run_ranks(1, train_watched, str(config), replay)
    assert due == json.loads((straight / "due.json").read_text())[after:]
    assert state(tmp_path / "run", STEPS)["queue"] == state(straight / "run", STEPS)["queue"]
    for here, there in zip(metrics(tmp_path / "run"), metrics(straight / "run"), strict=True):
        for name in ("loss/total", "flush/loss", "flush/grad_norm", "queue/length"):
            assert (name in here) == (name in there)
            assert here.get(name, 0) == pytest.approx(there.get(name, 0), rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("skipped", ["the step's own update", "the update on the queue"])
def test_a_skipped_update_loses_nothing_of_the_queue(straight, tmp_path, skipped):
    """If the step's update is skipped, failures are queued and nothing trains; if the queue's, prompts stay."""
    own = skipped == "the step's own update"
    first = next(line for line in metrics(straight / "run") if "flush/loss" in line)
    bound = first["flush/grad_norm"] / 2 if not own else 1e-9
    config = task(tmp_path, straight)
    replay = ["rollout.engine=replay", f"rollout.replay={straight / 'rollouts'}"]
    limits = [f"trainer.max_grad_norm_to_apply={bound}", "trainer.max_skipped_steps=10"]
    run_ranks(1, train_here, str(config), [*replay, *limits])
    queued = 0
    for wrong, line in zip(failures(straight), metrics(tmp_path / "run"), strict=True):
        queued += len(wrong)
        assert line["queue/length"] == queued
    last = state(tmp_path / "run", STEPS)
    assert last["queue"] == [each for wrong in failures(straight) for each in wrong]
    assert last["weight_version"] == (0 if own else STEPS) and last["flush_norms"] == []


def test_a_prompt_that_waits_and_is_not_in_the_data_any_more_is_named_in_one_line(straight, tmp_path):
    """The user has accepted the change, and so passes the file's check."""
    step, (_, left) = next((n, each) for n, each in enumerate(played(failures(straight)), start=1) if each[1])
    in_flight = (step_folder(straight / "run", step) / "in_flight.jsonl").read_text()
    (name, *_), *_ = (each for each in left if f'"{each[0]}"' not in in_flight)
    rows = [row for row in (straight / "train.jsonl").read_text().splitlines() if json.loads(row)["id"] != name]
    config = cut_after(straight, tmp_path, step)
    (tmp_path / "train.jsonl").write_text("\n".join(rows))
    fingerprint = tmp_path / "run" / "fingerprint.json"
    fingerprint.write_text(fingerprint.read_text().replace(str(straight / "train"), str(tmp_path / "train")))
    overrides = [f"data.train={tmp_path / 'train.jsonl'}", "data.accept_changed=true"]
    with pytest.raises(AssertionError) as caught:
        run_ranks(1, train_here, str(config), overrides)
    line = str(caught.value).splitlines()[-1]
    assert line.startswith("megatron_dypo.errors.UserError: data.train:") and f"holds prompt {name!r}, and this" in line


def test_prompts_that_give_their_place_to_others_are_queued_all_the_same(straight, tmp_path):
    """Dynamic sampling: a failed prompt trains nothing in its step. Statistics include replaced groups."""
    more = {"rollout__dynamic_sampling": True, "rollout__refill_rounds": 1, "trainer__steps": 2}
    config = task(tmp_path, straight, **more, rollout__async_rollout=0, rollout__correction="none")
    (due,) = run_ranks(1, train_watched, str(config), [])
    failed_so_far = 0
    for n, line in enumerate(metrics(tmp_path / "run")):
        failed_so_far += round(line["dypo/hard_frac"] * (8 + line["rollout/refilled"]))
        assert line["queue/length"] == failed_so_far - sum(map(len, due[: n + 1]))
    assert metrics(tmp_path / "run")[0]["rollout/refilled"] > 0 and any(due)
