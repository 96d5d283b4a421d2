"""The same with the real torchrun: its agent killed alone, and everything at once, with vLLM as the engine."""

from __future__ import annotations

import fcntl
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.faults.job import Job
from tests.faults.outcome import assert_on_track, assert_same_outcome, first_step, saved_steps, written_steps
from tests.faults.task import STEPS, make_task, reference
from tests.launch import torchrun

VLLM = "rollout.engine=vllm"


@contextmanager
def started(config: Path, *overrides: str) -> Iterator[psutil.Process]:
    """Start torchrun's agent on two ranks; kill what is left of it at the end."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    agent = subprocess.Popen(
        [*launcher, "-m", "megatron_dypo", "train", str(config), *overrides],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield psutil.Process(agent.pid)
    finally:
        with_agent = [process for process in psutil.process_iter() if group_of(process) == agent.pid]
        for process in with_agent:
            process.kill()
        agent.wait(30)


def group_of(process: psutil.Process) -> int | None:
    try:
        return os.getsid(process.pid)
    except ProcessLookupError:
        return None


def wait_until(condition, seconds: float, what: str) -> float:
    """Return the seconds until the condition holds."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, f"not within {seconds:g} s: {what}"
        time.sleep(0.05)
    return time.monotonic() - began


def is_gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def lock_is_free(run_dir: Path) -> bool:
    with (run_dir / ".lock").open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


@pytest.mark.faults  # in every CI run: tests/test_watchdog.py, without the resume
def test_where_only_the_agent_is_killed_all_end_with_it(references, tmp_path, fault_record):
    config, run_dir = make_task(tmp_path), tmp_path / "run"

    def family(agent: psutil.Process, word: str) -> list[psutil.Process]:
        return [child for child in agent.children(recursive=True) if word in child.cmdline()]

    with started(config) as agent:
        wait_until(lambda: saved_steps(run_dir), 120, "the first checkpoint")
        ranks, workers = family(agent, "train"), family(agent, "megatron_dypo.reward.worker_main")
        assert len(ranks) == 2 and workers and not lock_is_free(run_dir)
        agent.send_signal(signal.SIGKILL)
        seconds = wait_until(
            lambda: all(map(is_gone, ranks + workers)) and lock_is_free(run_dir), 10, "ranks and workers end"
        )
    fault_record(f"agent killed: {len(ranks)} ranks and {len(workers)} reward workers ended within {seconds:.1f} s")
    newest = saved_steps(run_dir)[-1]
    with Job(tmp_path / "again", config) as job:
        assert job.wait() == [0, 0], job.output()
    assert first_step(job.output()) == newest + 1
    assert_same_outcome(tmp_path, reference(references), STEPS)


@pytest.mark.faults
def test_killed_with_vllm(tmp_path, fault_record):
    """Kill everything at once, one rank, and the agent alone, at random instants; then run to the end."""
    seed = random.randrange(2**32)
    draw = random.Random(seed)
    straight, folder = tmp_path / "straight", tmp_path / "killed"
    result = torchrun(2, "train", str(make_task(straight)), VLLM)
    assert result.returncode == 0, result.stderr
    config, run_dir, kills = make_task(folder), folder / "run", 0
    for step, victim in ((2, "all"), (6, "rank"), (12, "agent")):
        with started(config, VLLM) as agent:
            wait_until(lambda step=step: written_steps(run_dir) >= step, 180, f"step {step}")
            time.sleep(draw.uniform(0.0, 1.0))
            children = agent.children(recursive=True)
            ranks = [child for child in children if "train" in child.cmdline()]
            assert len(ranks) == 2
            for process in {"all": [agent, *children], "rank": [draw.choice(ranks)], "agent": [agent]}[victim]:
                process.kill()
            kills += 1
            wait_until(lambda ranks=ranks: all(map(is_gone, ranks)), 60, "the ranks end")
        assert_on_track(run_dir, straight)
    newest = saved_steps(run_dir)[-1]
    result = torchrun(2, "train", str(config), VLLM)
    assert result.returncode == 0 and f"resumes after step {newest}\n" in result.stdout, result.stderr
    assert_same_outcome(folder, straight, STEPS)
    fault_record(f"torchrun and vLLM: seed {seed}, {kills} kills, {kills} resumes")
