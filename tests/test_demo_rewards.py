"""Rewards of teachers' traces that are members of their prompts' groups (LUFFY).

Scored alike on any ranks, recorded and replayed, refused if missing or unobtainable; dynamic sampling.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest

from megatron_dypo import preflight
from megatron_dypo.config import load_config
from megatron_dypo.errors import UserError
from megatron_dypo.preflight import check_inputs
from tests.launch import checkpoint_digests, copy_task, metrics, train_here, without_times
from tests.ranks import run_ranks
from tests.test_async_rollout import from_seeds, make_source
from tests.test_bad_input import refusal

LUFFY = {"objective__method": "luffy", "rollout__engine": "transformers"}
OWN = """
def compute(data_source, solution_str, ground_truth, extra_info=None):
    if "boxed" in solution_str and FAILING in solution_str:
        raise ValueError("what a trace")
    return float(solution_str.endswith(str(ground_truth) + "}"))
"""


def luffy_task(folder: Path, **more: object) -> Path:
    """Prompts of the digits below 2 have no teacher; the second teacher is wrong for odd digits."""
    config = copy_task(folder, **LUFFY, **more)
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    for row in rows:
        digit = int(row["ground_truth"])
        row["teachers"] = row["teachers"] if digit >= 2 else []
        if digit % 2:
            row["teachers"] = [{"name": each["name"], "trace": each["trace"]} for each in row["teachers"]]
            for teacher in row["teachers"][1:]:
                teacher["trace"] = teacher["trace"].replace(f"{{{digit}}}", "{no}")
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return config


def by_text(prompts, texts) -> list[tuple[float, None]]:
    """Right traces 1, wrong ones 0; responses 0 below digit 4, 1 below 7, and 1 or 0 by their text above."""
    scores = []
    for prompt, text in zip(prompts, texts, strict=True):
        digit = int(prompt.ground_truth)
        response = float(digit >= 4) if digit < 7 else float(sum(map(ord, text)) % 2)
        scores.append((float("no" not in text) if "boxed" in text else response, None))
    return scores


def sampled(config: str, overrides: list[str]) -> list[tuple[str, str]]:
    """Return (groups, replaced groups) as recorded lines of steps 1 to 3: at once, and during training."""
    from megatron_dypo.rollout.recording import lines
    from megatron_dypo.runtime.measure import StepTimer

    found = []
    for beside in (0, 1):
        more = [*overrides, f"rollout.async_rollout={beside}", "trainer.steps=4"]
        source = make_source(config, more, from_seeds, by_text)
        for step in (1, 2, 3):
            batch = source.batch(step, StepTimer())
            found.append((lines(batch.groups), lines(batch.replaced)))
            with source.prefetch(step + 1, StepTimer()):
                pass
    return found


def groups_in(lines: str) -> list[tuple[int, list[float], list[float]]]:
    """Return (digit, rewards of responses, of traces) of recorded groups."""
    parsed = [json.loads(line) for line in lines.splitlines()]
    rewards = [[response["reward"] for response in each["responses"]] for each in parsed]
    digits = [int(each["id"].partition("-")[2]) for each in parsed]
    return list(zip(digits, rewards, [each.get("teacher_rewards", []) for each in parsed], strict=True))


def test_draws_and_rewards_of_traces_are_the_same_on_any_ranks_and_beside_training(tmp_path):
    config = str(luffy_task(tmp_path))
    (alone,) = run_ranks(1, sampled, config, [])
    assert alone[:3] == alone[3:], "in the background as at once"
    assert run_ranks(2, sampled, config, []) == [alone, alone]
    seen = [group for groups, _ in alone for group in groups_in(groups)]
    assert {len(rewards) for digit, _, rewards in seen if digit >= 2} == {2}
    assert {sum(rewards) for digit, _, rewards in seen if digit >= 2 and digit % 2} == {1.0}
    assert {tuple(rewards) for digit, _, rewards in seen if digit < 2} == {()}


def test_dynamic_sampling_counts_the_traces_among_a_group_s_members(tmp_path):
    """Groups whose members are all equal are replaced: all responses and traces right, or all wrong and no trace."""
    config = str(luffy_task(tmp_path))
    refill = ["rollout.dynamic_sampling=true", "rollout.refill_rounds=20"]
    (alone,) = run_ranks(1, sampled, config, refill)
    assert run_ranks(2, sampled, config, refill) == [alone, alone]
    kept = [group for groups, _ in alone for group in groups_in(groups)]
    replaced = [group for _, groups in alone for group in groups_in(groups)]
    assert all(len({*responses, *traces}) == 2 for _, responses, traces in kept)
    assert all(len({*responses, *traces}) == 1 for _, responses, traces in replaced)
    assert {2, 3, 5} <= {digit for digit, _, _ in kept}, "kept for a trace alone: right, or wrong"
    assert {0, 1, 6} <= {digit for digit, _, _ in replaced}


def resumed(config: str, folder: str) -> tuple[str, str, str]:
    """Return a prefetched batch, the same from a checkpoint's file, and sampled at once, as recorded lines."""
    from megatron_dypo.rollout.recording import lines
    from megatron_dypo.runtime.measure import StepTimer

    prefetching = make_source(config, ["rollout.async_rollout=1", "trainer.steps=4"], from_seeds, by_text)
    with prefetching.prefetch(2, StepTimer()):
        pass
    file = Path(folder) / "in_flight.jsonl"
    file.write_text(lines(prefetching.prefetched.sampled))
    fresh = make_source(config, ["rollout.async_rollout=1", "trainer.steps=4"], None, None)
    fresh.resume(file)
    at_once = make_source(config, [], from_seeds, by_text)
    batches = [source.batch(2, StepTimer()) for source in (prefetching, fresh, at_once)]
    return tuple(lines(batch.groups) for batch in batches)


def test_a_prefetched_batch_that_a_checkpoint_holds_has_its_draws_and_rewards_of_traces(tmp_path):
    ((prefetched, taken_up, at_once),) = run_ranks(1, resumed, str(luffy_task(tmp_path)), str(tmp_path))
    assert taken_up == prefetched == at_once and '"teacher_rewards": [' in taken_up


# --- recorded and replayed


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> Path:
    """Return the folder of three steps on two ranks, with their rollouts."""
    folder = tmp_path_factory.mktemp("recorded")
    steps = {"trainer__steps": 3, "trainer__save_every": 3, "trainer__eval_every": 0}
    config = luffy_task(folder, rollout__record=str(folder / "rollouts"), objective__entropy_coef=0.01, **steps)
    run_ranks(2, train_here, str(config), [])
    return folder


def replay(recorded: Path, *overrides: str) -> list[str]:
    return ["rollout.engine=replay", f"rollout.replay={recorded / 'rollouts'}", "rollout.record=null", *overrides]


def test_a_replay_is_the_run_that_was_recorded_metrics_and_weights(recorded, tmp_path):
    run_ranks(2, train_here, str(recorded / "config.yaml"), replay(recorded, f"trainer.run_dir={tmp_path / 'run'}"))
    ours, theirs = (without_times(metrics(folder / "run")) for folder in (tmp_path, recorded))
    assert ours == theirs and all(line["grad_share/shaped"] > 0 for line in ours)
    final = [str(folder / "run/checkpoints/step_3") for folder in (tmp_path, recorded)]
    ours, theirs = (run_ranks(1, checkpoint_digests, folder)[0] for folder in final)
    assert ours == theirs


def test_another_recipe_replays_them_without_the_rewards_of_traces(recorded, tmp_path):
    """Resume as if they had never been recorded: GRPO's groups have no trace as a member."""
    shutil.copytree(recorded / "rollouts", tmp_path / "rollouts")
    for path in (tmp_path / "rollouts").iterdir():
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("\n".join(json.dumps(line | {"teacher_rewards": []}) for line in lines))
    for folder, name in ((recorded, "with"), (tmp_path, "without")):
        grpo = ["objective.method=grpo", "trainer.save_every=0", f"trainer.run_dir={tmp_path / name}"]
        run_ranks(1, train_here, str(recorded / "config.yaml"), replay(folder, *grpo))
    ours, theirs = (without_times(metrics(tmp_path / name)) for name in ("with", "without"))
    assert ours == theirs
    with pytest.raises(AssertionError, match=r"UserError: .*step 1: prompt .* was recorded without the rewards of its"):
        run_ranks(1, train_here, str(recorded / "config.yaml"), replay(tmp_path, f"trainer.run_dir={tmp_path / 'no'}"))


# --- what cannot be scored


def own_reward(folder: Path, failing: str, **more: object) -> Path:
    """Write LUFFY's task with a reward function that raises on traces that contain ``failing``."""
    folder.mkdir(exist_ok=True)
    (folder / "own.py").write_text(OWN.replace("FAILING", repr(failing)))
    function = {"reward__function": f"{folder / 'own.py'}:compute", "trainer__eval_every": 0}
    return luffy_task(folder, **function, **more)


def test_a_trace_that_cannot_be_scored_is_named_before_anything_is_built(tmp_path, capsys):
    """The error names prompt, teacher, function and reason; there is none if the reward is not needed or drawn."""
    path = own_reward(tmp_path, "8}")
    line = refusal(capsys, path)
    function = f"{tmp_path / 'own.py'}:compute"
    assert line.startswith(f"reward.function: {function}: prompt 0-8: the trace of teacher a cannot be scored, ")
    assert "objective.method: luffy" in line and "what a trace" in line
    assert check_inputs(load_config(path, ["objective.method=switch"]), "config").train
    assert check_inputs(load_config(path, ["data.max_teacher_tokens=3"]), "config").train


def test_where_scoring_all_traces_takes_too_long_the_step_that_draws_one_says_the_same(tmp_path, caplog, monkeypatch):
    path = own_reward(tmp_path, "8}", trainer__steps=8)
    monkeypatch.setattr(preflight, "TRACE_SECONDS", -1.0)
    assert check_inputs(load_config(path), "config").train
    (line,) = [line for line in caplog.messages if "before the first step" in line]
    assert line.startswith("data: 0 of ") and "in the steps that draw them" in line
    caplog.set_level(logging.INFO)
    with pytest.raises(AssertionError, match=r"UserError: reward\.function: .*: prompt \d-8: the trace of teacher .*"):
        run_ranks(2, train_unchecked, str(path))


def train_unchecked(config: str) -> None:
    """Run ``train`` on a forked rank, whose check of the traces ends at once."""
    preflight.TRACE_SECONDS = -1.0
    train_here(config, [])


def test_ranks_share_the_traces_to_check(tmp_path, monkeypatch):
    """One of two ranks finds it; the other's part is clean."""
    path, found = own_reward(tmp_path, "of its own"), []
    text = (tmp_path / "train.jsonl").read_text()
    assert " \\\\boxed{4}" in text
    (tmp_path / "train.jsonl").write_text(text.replace("\\\\boxed{4}", "\\\\boxed{4} of its own", 1))
    config = load_config(path, ["data.max_teacher_tokens=64"])
    for rank in (0, 1):
        for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2}.items():
            monkeypatch.setenv(name, str(value))
        try:
            check_inputs(config, "config")
        except UserError as error:
            found.append((rank, str(error)))
    assert len(found) == 1 and "teacher a" in found[0][1]
