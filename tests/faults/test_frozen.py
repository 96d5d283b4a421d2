"""A frozen rank: the job ends by itself, names the rank, and resumes when restarted."""

from __future__ import annotations

import os
import signal
import time
from functools import partial

import pytest

from tests.faults.job import Job
from tests.faults.outcome import assert_same_outcome, first_step, saved_steps
from tests.faults.points import Point, mark
from tests.faults.task import STEPS, make_task, reference

HEARTBEAT_TIMEOUT = 5.0  # seconds


@pytest.mark.faults
@pytest.mark.parametrize("frozen", [1, 0])
def test_a_frozen_rank_is_named_and_ends_the_job(references, tmp_path, frozen):
    config, begun = make_task(tmp_path), tmp_path / "begun"
    begins = (Point("phase rollout", from_step=5), partial(mark, begun), (0,))
    timeout = f"parallel.heartbeat_timeout={HEARTBEAT_TIMEOUT}"
    with Job(tmp_path / "launch_0", config, timeout, acts=[begins]) as job:
        assert job.wait_for(begun), job.output()
        os.kill(job.pids[frozen], signal.SIGSTOP)
        froze = time.monotonic()
        codes = job.wait(HEARTBEAT_TIMEOUT + 60)
    assert all(codes) and time.monotonic() - froze >= HEARTBEAT_TIMEOUT
    first = next(line for line in job.output().splitlines() if "] failed in " in line)
    assert first.startswith(f"[rank {frozen}] failed in phase ") and "parallel.heartbeat_timeout" in first

    newest = saved_steps(tmp_path / "run")[-1]
    with Job(tmp_path / "launch_1", config) as job:
        assert job.wait() == [0, 0], job.output()
    assert first_step(job.output()) == newest + 1
    assert_same_outcome(tmp_path, reference(references), STEPS)
