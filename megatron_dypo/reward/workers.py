"""A small pool of processes that ask math-verify, each of which may be killed and replaced at any time.

A worker bounds the CPU time of an answer itself, through a kernel timer (see ``worker.py``), so here is no polling:
its end shows as an end of file. The pool adds a wall-clock ceiling for a worker that waits instead of computing.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import deque
from multiprocessing.connection import wait
from pathlib import Path

from megatron_dypo.errors import TrainingError

START_SECONDS = 120.0  # wall clock; importing sympy from a cold shared file system takes its time
WALL_FACTOR = 10  # wall-clock ceiling of an answer, in units of its CPU time; generous, since a trainer fills the cores


class WorkerPool:
    """At most ``size`` workers, started when first needed; an answer may take ``cpu_seconds`` of CPU time."""

    def __init__(self, size: int, cpu_seconds: float) -> None:
        self._size = size
        self._cpu_seconds = cpu_seconds
        self._workers: list[_Worker] = []

    def grade(self, pairs: list[tuple[str, str]]) -> list[bool | str]:
        """For each (answer, truth) whether they are equivalent or, as text, why nobody knows; in order.

        Raises TrainingError when a worker cannot start.
        """
        verdicts: list[bool | str] = [""] * len(pairs)
        waiting = deque(enumerate(pairs))
        left = len(pairs)
        try:
            while left:
                self._staff(left)
                for worker in self._workers:
                    if worker.idle and waiting:
                        worker.send(*waiting.popleft())
                for job, verdict in self._replies():
                    verdicts[job] = verdict
                    left -= 1
        except BaseException:
            self.close()  # a reply that nobody read would pass for the reply to the next call's question
            raise
        return verdicts

    def close(self) -> None:
        """Kills and reaps every worker."""
        while self._workers:
            self._workers.pop().stop()

    def _staff(self, jobs: int) -> None:
        for worker in [worker for worker in self._workers if worker.idle and worker.process.poll() is not None]:
            self._dismiss(worker)  # ended between two answers, so no answer is to blame
        while len(self._workers) < min(self._size, jobs):
            self._workers.append(_Worker(self._cpu_seconds))

    def _replies(self) -> list[tuple[int, bool | str]]:
        """Waits until something happens; returns the (job, verdict) pairs that came of it, often none."""
        timeout = min(worker.deadline for worker in self._workers) - time.monotonic()
        readable = wait(self._workers, max(0.0, timeout))
        replies: list[tuple[int, bool | str]] = []
        for worker in list(self._workers):
            late = time.monotonic() > worker.deadline
            if worker not in readable and not late:
                continue
            job, line = worker.job, worker.receive() if worker in readable else b""
            if line and job is not None:
                replies.append((job, json.loads(line)))
            elif not line:
                self._dismiss(worker)
                if not worker.ready:
                    raise TrainingError(f"a reward worker did not start ({worker.reason(late)}); see its errors above")
                if job is not None:
                    replies.append((job, worker.reason(late)))
        return replies

    def _dismiss(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        worker.stop()


class _Worker:
    """One process and what it is doing: starting, then in turn idle and at work on ``job``, until ``deadline``."""

    def __init__(self, cpu_seconds: float) -> None:
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        self._cpu_seconds = cpu_seconds
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "megatron_dypo.reward.worker", str(cpu_seconds), str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
        )
        self.ready = False
        self.job: int | None = None
        self.deadline = time.monotonic() + START_SECONDS

    @property
    def idle(self) -> bool:
        return self.ready and self.job is None

    def fileno(self) -> int:
        return self.process.stdout.fileno()

    def send(self, job: int, pair: tuple[str, str]) -> None:
        self.job = job
        self.deadline = time.monotonic() + WALL_FACTOR * self._cpu_seconds
        with contextlib.suppress(BrokenPipeError):  # its end of file tells the same
            self.process.stdin.write(json.dumps(pair).encode() + b"\n")
            self.process.stdin.flush()

    def receive(self) -> bytes:
        """The line that a readable worker wrote (its first says that it is ready); empty when it has ended."""
        line = self.process.stdout.readline()  # never blocks: a line is one small write to a pipe, which is atomic
        if line:
            self.ready, self.job, self.deadline = True, None, math.inf
        return line

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        with contextlib.suppress(BrokenPipeError):  # what it did not read goes nowhere
            self.process.stdin.close()

    def reason(self, late: bool) -> str:
        if late:
            return "over the wall-clock ceiling"
        if self.process.returncode == -signal.SIGPROF:
            return f"over {self._cpu_seconds:g} s of CPU time"
        return f"worker crashed, exit status {self.process.returncode}"
