"""A full disk: a failed save warns, older checkpoints stay, training continues, and a later save succeeds."""

from __future__ import annotations

import os
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from tests import full_disk
from tests.faults.job import Job
from tests.faults.outcome import assert_on_track, assert_same_outcome, first_step, saved_steps
from tests.faults.points import Point, die
from tests.faults.task import STEPS, make_task, reference

MEGABYTES = 24  # room for four checkpoints
MAIN = (0,)


@pytest.fixture
def small_disk(tmp_path):
    """Mount a file system of its own at ``run/checkpoints``."""
    mounted = full_disk.small_disk(tmp_path / "run" / "checkpoints", 1024 * MEGABYTES)
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(mounted)
        except OSError as error:
            pytest.skip(f"no right to mount a small file system: {error}")
        yield folder


def make_room(folder: Path) -> None:
    os.truncate(folder / "ballast", 0)


def test_a_full_disk_costs_no_checkpoint_and_does_not_stop_the_run(references, small_disk, tmp_path):
    """The disk is full while step 6 is written, and still after the restart, until step 11."""
    config, straight = make_task(tmp_path), reference(references)
    fills = (Point("open .partial-step_*.distcp", "after", from_step=6), partial(full_disk.fill_disk, small_disk), MAIN)
    stops = (Point("phase rollout", from_step=9), die, MAIN)
    with Job(tmp_path / "launch_0", config, acts=[fills, stops]) as job:
        assert -9 in job.wait(power_cut=True), job.output()
    warnings = [line for line in job.output().splitlines() if "checkpoint not written" in line]
    assert warnings and "No space left on device" in warnings[0], job.output()
    assert saved_steps(tmp_path / "run") == [3]

    frees = (Point("phase rollout", from_step=11), partial(make_room, small_disk), MAIN)
    with Job(tmp_path / "launch_1", config, acts=[frees]) as job:
        assert job.wait() == [0, 0], job.output()
    assert first_step(job.output()) == 4 and "checkpoint not written" in job.output()
    (small_disk / "ballast").unlink()
    assert_same_outcome(tmp_path, straight, STEPS)


@pytest.mark.faults
def test_a_disk_that_stays_full_is_an_error_at_the_end(references, small_disk, tmp_path):
    """All steps are trained, the older checkpoint stays, and the run resumes from it once there is room."""
    config, straight = make_task(tmp_path), reference(references)
    fills = (
        Point("open .partial-step_*.distcp", "after", from_step=18),
        partial(full_disk.fill_disk, small_disk),
        MAIN,
    )
    with Job(tmp_path / "launch_0", config, acts=[fills]) as job:
        codes = job.wait()
    assert all(codes) and f"the checkpoint of step {STEPS} could not be written" in job.output(), job.output()
    assert saved_steps(tmp_path / "run") == [12, 15]
    assert_on_track(tmp_path / "run", straight)

    (small_disk / "ballast").unlink()
    with Job(tmp_path / "launch_1", config) as job:
        assert job.wait() == [0, 0], job.output()
    assert first_step(job.output()) == 16
    assert_same_outcome(tmp_path, straight, STEPS)
