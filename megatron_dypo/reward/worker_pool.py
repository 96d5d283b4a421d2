"""A small pool of worker processes (``worker_main.py``), any of which may be killed and replaced at any time.

A worker bounds the time of a job itself, so the pool does not poll; its own deadline, later than the worker's, is for a
worker that cannot even do that.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import subprocess
import sys
import time
from collections import deque
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple

from megatron_dypo.errors import TrainingError
from megatron_dypo.reward.grader_process import WALL_FACTOR

_SECRET = re.compile("TOKEN|KEY|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)
START_SECONDS = 120.0  # wall clock; importing sympy from a cold shared file system is slow
GRACE_SECONDS = 5.0  # added to a job's ceiling, and allowed for a worker to end


class Score(NamedTuple):
    """``fault``: why the response could not be scored (``value`` is then 0), or None."""

    value: float
    fault: str | None = None


class WorkerPool:
    """At most ``size`` workers of one reward function, started when first needed."""

    def __init__(self, function: str, size: int, cpu_seconds: float) -> None:
        self._function = function
        self._size = size
        self._cpu_seconds = cpu_seconds
        self._workers: list[_Worker] = []

    def grade(self, jobs: list[str]) -> list[Score]:
        """Return the jobs' scores, in order. Raises TrainingError if a worker cannot start."""
        scores = [Score(0.0)] * len(jobs)
        waiting = deque(enumerate(jobs))
        left = len(jobs)
        try:
            while left:
                self._staff(left)
                for worker in self._workers:
                    if worker.idle and waiting:
                        worker.send(*waiting.popleft())
                for job, score in self._replies():
                    scores[job] = score
                    left -= 1
        except BaseException:
            self.close()  # an unread reply would be taken for the answer to the next call
            raise
        return scores

    def start(self) -> None:
        """Start one worker and wait for it. Raises TrainingError if it cannot start."""
        try:
            self._staff(1)
            while not self._workers[0].ready:
                self._replies()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End and reap every worker."""
        while self._workers:
            self._workers.pop().stop()

    def _staff(self, jobs: int) -> None:
        for worker in [worker for worker in self._workers if worker.idle and worker.process.poll() is not None]:
            self._dismiss(worker)  # ended between two jobs, so no response is to blame
        while len(self._workers) < min(self._size, jobs):
            self._workers.append(_Worker(self._function, self._cpu_seconds))

    def _replies(self) -> list[tuple[int, Score]]:
        """Wait until something happens; return the resulting (job, score) pairs, often none."""
        timeout = min(worker.deadline for worker in self._workers) - time.monotonic()
        readable = wait(self._workers, max(0.0, timeout))
        replies: list[tuple[int, Score]] = []
        for worker in list(self._workers):
            late = time.monotonic() > worker.deadline
            if worker in readable:
                job, was_ready, line = worker.job, worker.ready, worker.receive()
            elif late:
                job, was_ready, line = worker.job, worker.ready, b""
            else:
                continue
            if not line:
                self._dismiss(worker, kill=late)
                fault = "worker over its wall-clock ceiling" if late else f"worker ended, {worker.process.returncode}"
                if not was_ready:
                    raise TrainingError(f"a reward worker did not start ({fault}); see its errors above")
                if job is not None:
                    replies.append((job, Score(0.0, fault)))
            elif not was_ready:
                if (reason := json.loads(line)) is not None:
                    raise TrainingError(reason)
            else:
                replies.append((job, Score(*json.loads(line))))
        return replies

    def _dismiss(self, worker: _Worker, kill: bool = False) -> None:
        self._workers.remove(worker)
        worker.stop(kill)


def _environment(function: str) -> dict[str, str]:
    """Return the environment without likely secrets, except for a user's own function, which may need them."""
    own = ":" in function
    return {name: value for name, value in os.environ.items() if own or not _SECRET.search(name)}


class _Worker:
    """One process and its state: starting, then alternately idle and at work on ``job``, until ``deadline``."""

    def __init__(self, function: str, cpu_seconds: float) -> None:
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        command = [sys.executable, "-P", "-m", "megatron_dypo.reward.worker_main", function, str(cpu_seconds)]
        self._ceiling = WALL_FACTOR * cpu_seconds + GRACE_SECONDS
        self.process = subprocess.Popen(
            [*command, str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            process_group=0,  # torchrun signals the rank's whole group; the rank closes its workers itself
            env={**_environment(function), "PYTHONPATH": path},
        )
        self.ready = False
        self.job: int | None = None
        self.deadline = time.monotonic() + START_SECONDS

    @property
    def idle(self) -> bool:
        return self.ready and self.job is None

    def fileno(self) -> int:
        return self.process.stdout.fileno()

    def send(self, index: int, job: str) -> None:
        self.job = index
        self.deadline = time.monotonic() + self._ceiling
        with contextlib.suppress(BrokenPipeError):  # its end of file reports the same
            self.process.stdin.write(job.encode() + b"\n")
            self.process.stdin.flush()

    def receive(self) -> bytes:
        """Return the line that a readable worker wrote (the first means it is ready); empty if it has ended."""
        line = self.process.stdout.readline()  # never blocks: a line is one small write to a pipe, which is atomic
        if line:
            self.ready, self.job, self.deadline = True, None, math.inf
        return line

    def stop(self, kill: bool = False) -> None:
        """Close its input, on which it ends its children; kill it if it is starting, or stuck."""
        with contextlib.suppress(BrokenPipeError):  # unread input is lost
            self.process.stdin.close()
        if kill or not self.ready:
            self.process.kill()
        try:
            self.process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
