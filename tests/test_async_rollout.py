"""One-step off-policy training, the prefetched batch in checkpoints, staleness, and dynamic sampling."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_dypo.checkpoint.catalog import complete_steps, step_folder
from megatron_dypo.errors import TrainingError, UserError
from tests.batches import make_config, make_groups
from tests.launch import checkpoint_digests, copy_task, metrics, train_here, without_times
from tests.ranks import run_ranks

STEPS = 6
OVERLAP = ["rollout.async_rollout=1", "rollout.correction=truncate"]


def overlapped_task(folder: Path) -> Path:
    """Write a task with overlap and dynamic sampling; digits below 3 have no teacher, so Hard ones train nothing."""
    config = copy_task(
        folder,
        rollout__engine="transformers",
        rollout__record=str(folder / "rollouts"),
        rollout__dynamic_sampling=True,
        rollout__async_rollout=1,
        rollout__correction="truncate",
        trainer__steps=STEPS,
        trainer__save_every=2,
        trainer__eval_every=0,
    )
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    for row in rows:
        row["teachers"] = row["teachers"] if int(row["ground_truth"]) > 2 else []
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return config


def train_in_step(config: str) -> tuple[bool, int]:
    """Train with a meeting: sampling and the concurrent update wait for each other halfway.

    Returns (whether the main thread sampled, batches sampled in the thread). If one begins only after the other's end,
    the meeting is broken, and so is the run.
    """
    import threading

    from megatron_dypo import trainer
    from megatron_dypo.rollout.hf_engine import HfEngine
    from megatron_dypo.runtime.failure import current_phase

    meeting, threads = threading.Barrier(2, timeout=60), set()
    generate, update = HfEngine.generate, trainer.update_policy

    def generate_in_step(*arguments):
        thread = threading.current_thread()
        if thread not in threads:
            threads.add(thread)
            if thread is not threading.main_thread():
                meeting.wait()
        return generate(*arguments)

    def update_in_step(*arguments):
        if current_phase().step < STEPS:
            meeting.wait()
        return update(*arguments)

    HfEngine.generate, trainer.update_policy = generate_in_step, update_in_step
    train_here(config, [])
    return threading.main_thread() in threads, len(threads - {threading.main_thread()})


def fail_beside_a_hanging_engine(config: str, step: int) -> None:
    """Train until an update fails, with a concurrent engine that never returns."""
    import threading

    from megatron_dypo import trainer
    from megatron_dypo.rollout.hf_engine import HfEngine
    from megatron_dypo.runtime.failure import current_phase

    sampling, generate, update = threading.Event(), HfEngine.generate, trainer.update_policy

    def generate_or_hang(*arguments):
        if current_phase().step == step and threading.current_thread() is not threading.main_thread():
            sampling.set()
            threading.Event().wait()
        return generate(*arguments)

    def update_or_fail(*arguments):
        if current_phase().step == step:
            assert sampling.wait(60)
            raise ArithmeticError("the update failed")
        return update(*arguments)

    HfEngine.generate, trainer.update_policy = generate_or_hang, update_or_fail
    train_here(config, [])


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    """Return the folder of an uninterrupted run on two ranks that sampled while it trained."""
    folder = tmp_path_factory.mktemp("straight")
    config = overlapped_task(folder)
    assert run_ranks(2, train_in_step, str(config)) == [(True, STEPS - 1)] * 2
    return folder


def recorded_lines(folder: Path, step: int) -> list[dict]:
    return [json.loads(line) for line in (folder / f"rollouts/step_{step:06d}.jsonl").read_text().splitlines()]


def test_a_batch_comes_from_weights_one_step_older(straight):
    """Check its label and its log-probs: only the first batch's are those of the policy that trains on it."""
    versions = [{line["weight_version"] for line in recorded_lines(straight, step)} for step in range(1, STEPS + 1)]
    assert versions == [{version} for version in (0, *range(STEPS - 1))]
    lines = metrics(straight / "run")
    assert all(line["train/skipped_steps"] == line["train/empty_steps"] == 0 for line in lines)
    later = [line["rollout/mismatch_mean"] for line in lines[1:] if "rollout/mismatch_mean" in line]
    assert later and min(later) > 1e-3
    assert lines[0].get("rollout/mismatch_mean", 0.0) < 1e-4


def test_the_wait_for_a_batch_is_timed_beside_its_sampling(straight):
    for line in metrics(straight / "run")[:-1]:
        assert line["time/rollout"] > 0 and 0 < line["time/rollout_wait"] < line["time/step"]


def test_refill_takes_the_places_of_prompts_that_train_nothing(straight):
    """Statistics cover the replaced groups as well, which include the Hard prompts without a teacher."""
    lines = metrics(straight / "run")
    assert lines[0]["rollout/refilled"] >= lines[0]["dypo/hard_without_teacher"] > 0
    without = [line["id"].endswith(("-0", "-1", "-2")) for step in (1, 2, 3) for line in recorded_lines(straight, step)]
    assert sum(without) < len(without) / 10, "3 of 10 in the data"


def test_a_killed_run_goes_on_with_the_batch_in_flight_bit_for_bit(straight, tmp_path):
    """It ended at once although its engine hung, and does not resample what its checkpoint holds."""
    config = overlapped_task(tmp_path)
    with pytest.raises(AssertionError, match="ArithmeticError: the update failed"):
        run_ranks(2, fail_beside_a_hanging_engine, str(config), 5, seconds=90)
    saved = complete_steps(tmp_path / "run")[-1]
    prefetched = step_folder(tmp_path / "run", saved) / "in_flight.jsonl"
    refilled = metrics(straight / "run")[saved]["rollout/refilled"]  # of the next step
    assert len(prefetched.read_text().splitlines()) == 8 + refilled
    assert run_ranks(2, train_in_step, str(config)) == [(False, STEPS - saved - 1)] * 2
    assert without_times(metrics(tmp_path / "run")) == without_times(metrics(straight / "run"))
    for step in range(1, STEPS + 1):
        name = f"rollouts/step_{step:06d}.jsonl"
        assert (tmp_path / name).read_bytes() == (straight / name).read_bytes(), name
    final = [step_folder(folder / "run", STEPS) for folder in (tmp_path, straight)]
    ours, theirs = (run_ranks(1, checkpoint_digests, str(folder))[0] for folder in final)
    assert ours == theirs
    assert not (final[0] / "in_flight.jsonl").exists(), "nothing is sampled for a step that is not to come"


def test_a_replay_is_held_to_an_age_that_is_asked_for(straight, tmp_path):
    config = copy_task(tmp_path, trainer__steps=3, trainer__save_every=0, trainer__eval_every=0)
    shutil.copy(straight / "train.jsonl", tmp_path / "train.jsonl")
    replay = ["rollout.engine=replay", f"rollout.replay={straight / 'rollouts'}"]
    with pytest.raises(AssertionError, match=r"of version 0 and the policy is at version 1, .*max_staleness: 0"):
        run_ranks(1, train_here, str(config), [*replay, "rollout.max_staleness=0"])
    run_ranks(1, train_here, str(config), [*replay, f"trainer.run_dir={tmp_path / 'other'}"])
    assert len(metrics(tmp_path / "run")) == 1 and len(metrics(tmp_path / "other")) == 3


@pytest.mark.parametrize(
    ("rollout", "updates", "oldest"),
    [
        ({}, 2, 9),
        ({"async_rollout": 1}, 1, 8),
        ({"async_rollout": 1}, 3, 6),
        ({"async_rollout": 1, "max_staleness": 4}, 3, 5),
        ({"engine": "replay", "max_staleness": 0}, 1, 9),
        ({"engine": "replay"}, 1, 0),
    ],
)
def test_a_response_that_is_too_old_is_refused_by_prompt_versions_and_key(rollout, updates, oldest):
    from megatron_dypo.rollout.manager import check_staleness

    config = make_config(rollout=rollout, objective={"updates_per_rollout": updates})
    groups = make_groups()
    for group in groups:
        for response in group.responses:
            response.weight_version = oldest
    check_staleness(groups, 9, config)
    groups[5].responses[2].weight_version = oldest - 1
    if rollout == {"engine": "replay"}:
        check_staleness(groups, 9, config)
        return
    with pytest.raises(TrainingError) as caught:
        check_staleness(groups, 9, config)
    words = f"prompt p5: a response was sampled from weights of version {oldest - 1} and the policy is at version 9"
    assert str(caught.value) == f"{words}, more than rollout.max_staleness: {9 - oldest} updates later"


def make_source(config: str, overrides: list[str], generate, reward):
    """Return a manager whose engine and reward are functions; the rest is as in a run."""
    from types import SimpleNamespace

    import torch.distributed as dist

    from megatron_dypo.config import load_config
    from megatron_dypo.data.dataset import load_data
    from megatron_dypo.data.tokenizer import load_tokenizer
    from megatron_dypo.models.shape import model_shape
    from megatron_dypo.rollout.manager import RolloutManager
    from megatron_dypo.runtime import distributed
    from megatron_dypo.runtime.distributed import Layout

    loaded = load_config(config, overrides)
    shape = model_shape(loaded.model)
    distributed.join()
    layout = Layout(rank=dist.get_rank(), world=dist.get_world_size())
    engine = SimpleNamespace(generate=generate)
    tokenizer = load_tokenizer(loaded, shape)
    return RolloutManager(loaded, load_data(loaded.data)[0], tokenizer, engine, reward, layout, shape)


def from_seeds(requests, sampling):
    """Return responses determined by a request's seed, as an engine's."""
    from megatron_dypo.records import Response

    return [
        Response(np.array([request.seed % 90 + 3, 1], np.int32), np.array([-1.0, -0.5], np.float32), "stop")
        for request in requests
    ]


def easy_below(digit: int, prompts, texts) -> list[tuple[float, None]]:
    """All four samples solve prompts of the digits below ``digit``, half of them the others."""
    return [(float(int(prompt.ground_truth) < digit or index % 2), None) for index, prompt in enumerate(prompts)]


def batches(config: str, overrides: list[str], easy: int) -> list[tuple[str, str]]:
    """Return (training groups, replaced groups) as recorded lines of steps 1 to 3: without and with overlap."""
    import functools

    from megatron_dypo.rollout.recording import lines
    from megatron_dypo.runtime.measure import StepTimer

    found = []
    for beside in (False, True):
        more = [*overrides, f"rollout.async_rollout={int(beside)}", "trainer.steps=4"]
        source = make_source(config, more, from_seeds, functools.partial(easy_below, easy))
        for step in (1, 2, 3):
            batch = source.batch(step, StepTimer())
            found.append((lines(batch.groups), lines(batch.replaced)))
            with source.prefetch(step + 1, StepTimer()):
                pass
            assert (source.prefetched is not None) == beside
    return found


def digits(lines: str) -> list[tuple[str, int]]:
    """Return (prompt id, its digit) of recorded lines."""
    ids = [json.loads(line)["id"] for line in lines.splitlines()]
    return [(name, int(name.partition("-")[2])) for name in ids]


def test_refill_replaces_easy_prompts_within_its_rounds_alike_at_any_layout(tmp_path):
    config = str(copy_task(tmp_path, rollout__engine="transformers"))
    refill = ["rollout.dynamic_sampling=true", "rollout.refill_rounds=4"]
    (alone,) = run_ranks(1, batches, config, refill, 4)
    assert alone[:3] == alone[3:], "in the background as at once"
    assert run_ranks(2, batches, config, refill, 4) == [alone, alone]
    (as_it_comes,) = run_ranks(1, batches, config, [], 4)
    assert all(replaced == "" for _, replaced in as_it_comes)
    for (groups, replaced), (before, _) in zip(alone, as_it_comes, strict=True):
        groups, replaced, before = digits(groups), digits(replaced), digits(before)
        assert all(digit >= 4 for _, digit in groups) and all(digit < 4 for _, digit in replaced)
        assert len(groups) == 8 and len({*groups, *replaced}) == 8 + len(replaced), "no group occurs twice"
        assert [group for group in before if group[1] >= 4] == [group for group in groups if group in before]
        assert {group for group in before if group[1] < 4} <= {*replaced}
    assert any(replaced for _, replaced in alone) and digits(alone[0][1]) != digits(alone[1][1])


def test_where_all_prompts_are_easy_refill_ends_with_its_rounds_or_with_the_rows(tmp_path):
    config = str(copy_task(tmp_path, rollout__engine="transformers"))
    (bounded,) = run_ranks(1, batches, config, ["rollout.dynamic_sampling=true", "rollout.refill_rounds=2"], 10)
    assert all(len(digits(groups)) == 8 and len(digits(replaced)) == 16 for groups, replaced in bounded)
    (exhausted,) = run_ranks(1, batches, config, ["rollout.dynamic_sampling=true", "rollout.refill_rounds=100"], 10)
    for groups, replaced in exhausted:
        assert len(digits(groups)) == 8 and len({*digits(groups), *digits(replaced)}) == 54, "every row once"


def failures_beside(config: str) -> list[tuple[str, str, str]]:
    """Return (type, message, place) of an error raised by the engine, and by the reward function."""
    from megatron_dypo.runtime.failure import begin_step, error_record
    from megatron_dypo.runtime.measure import StepTimer

    def refuse(requests, sampling):
        raise UserError("no such address")

    def divide(prompts, texts):
        return [1 / 0]

    found = []
    for generate, reward in ((refuse, divide), (from_seeds, divide)):
        source = make_source(config, OVERLAP, generate, reward)
        begin_step(4)
        try:
            with source.prefetch(5, StepTimer()):
                pass
        except Exception as error:
            found.append((type(error).__name__, str(error), str(error_record(error).place)))
    return found


def test_an_error_beside_training_surfaces_as_it_is_with_its_phase_and_its_step(tmp_path):
    config = copy_task(tmp_path, rollout__engine="transformers")
    assert run_ranks(1, failures_beside, str(config)) == [
        [
            ("UserError", "no such address", "phase 'rollout' of step 5"),
            ("ZeroDivisionError", "division by zero", "phase 'reward' of step 5"),
        ]
    ]


def places_while_sampling(config: str) -> list[str]:
    """Return the rank's phases when concurrent sampling began, and while waiting for its end."""
    import functools
    import threading
    import time

    from megatron_dypo.runtime.failure import begin_step, current_phase, phase
    from megatron_dypo.runtime.measure import StepTimer

    seen, begun = [], threading.Event()

    def watch(requests, sampling):
        seen.append(str(current_phase()))
        begun.set()
        deadline = time.monotonic() + 60
        while current_phase().name != "rollout" and time.monotonic() < deadline:
            time.sleep(0.001)
        seen.append(str(current_phase()))
        return from_seeds(requests, sampling)

    source = make_source(config, OVERLAP, watch, functools.partial(easy_below, 0))
    begin_step(4)
    with phase("update"), source.prefetch(5, StepTimer()):
        assert begun.wait(60)
    return [*seen, str(current_phase())]


def test_the_rank_is_where_its_main_thread_is_and_the_wait_is_a_phase_with_a_deadline(tmp_path):
    config = copy_task(tmp_path, rollout__engine="transformers")
    assert run_ranks(1, places_while_sampling, str(config)) == [
        ["phase 'update' of step 4", "phase 'rollout' of step 4", "phase 'main loop' of step 4"]
    ]


def test_work_beside_does_not_keep_the_process_from_ending():
    program = (
        "import threading; from megatron_dypo.runtime.process import in_thread;"
        "in_thread(threading.Event().wait, 'rollout'); raise KeyboardInterrupt"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert ended.returncode != 0 and ended.stderr.strip().endswith("KeyboardInterrupt")
