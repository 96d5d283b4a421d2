"""The process that grades: forked, given jobs one at a time, and killed if one takes too long.

The kernel's profiling timer bounds the CPU time of a job: it sends SIGPROF, whose default action terminates the process
even within one long operation in C (``9^{9^{9}}``) that would delay any Python handler. A wall-clock ceiling bounds
jobs that wait instead of computing; it is generous, because a trainer fills the cores.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import threading
import time
from pathlib import Path
from typing import NamedTuple

from megatron_dypo.reward.graders import Grader, Unscored
from megatron_dypo.runtime.prctl import adopt_orphans, die_with_parent

WALL_FACTOR = 10
"""Wall-clock ceiling of a job, in units of its CPU time."""
MEMORY_BYTES = 4 << 30
"""Address space that a child may map on top of its parent's."""

_GLANCE = 0.2  # seconds between checks that the child is alive; a process it left behind can hold its pipe open
_MESSAGE = 300  # characters; a reply must fit into a pipe's atomic write


class Reply(NamedTuple):
    """A child's answer. ``spent``: the child has ended, or must."""

    score: float
    fault: str | None
    spent: bool


class GraderProcess:
    """One forked process. ``close``: descriptors that belong only to its parent."""

    def __init__(self, grader: Grader, cpu_seconds: float, close: tuple[int, ...]) -> None:
        self._cpu_seconds = cpu_seconds
        parent = os.getpid()
        theirs, self._jobs = os.pipe()
        self._replies, ours = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            for descriptor in (*close, self._jobs, self._replies):
                os.close(descriptor)
            _serve(grader, cpu_seconds, theirs, ours, parent)
        os.close(theirs)
        os.close(ours)

    def ask(self, job: bytes, trainer: int) -> Reply:
        """Return the child's answer, or why there is none. Ends this process if the descriptor ``trainer`` hangs up."""
        ceiling = WALL_FACTOR * self._cpu_seconds
        deadline = time.monotonic() + ceiling
        poll = select.poll()
        poll.register(self._replies, select.POLLIN)
        poll.register(trainer, 0)
        try:
            _write(self._jobs, job)
        except BrokenPipeError:
            return Reply(0.0, self._ending(), True)
        while (left := deadline - time.monotonic()) > 0:
            events = dict(poll.poll(1000 * min(left, _GLANCE)))
            if trainer in events:
                end_descendants()
                os._exit(0)
            line = os.read(self._replies, 4096) if self._replies in events else None
            if line:
                return Reply(*json.loads(line))
            if line == b"" or (not events and self._has_ended()):
                return Reply(0.0, self._ending(), True)
        return Reply(0.0, f"over the wall-clock ceiling of {ceiling:g} s", True)

    def end(self) -> None:
        """Kill and reap the child and everything it started."""
        os.close(self._jobs)
        os.close(self._replies)
        end_descendants()

    def _has_ended(self) -> bool:
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def _ending(self) -> str:
        result = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        if result.si_code == os.CLD_EXITED:
            return f"the grading process ended with exit status {result.si_status}"
        if result.si_status == signal.SIGPROF:
            return f"over {self._cpu_seconds:g} s of CPU time"
        return f"the grading process was ended by {signal.Signals(result.si_status).name}"


def end_descendants() -> None:
    """Kill and reap all descendants; this process is their subreaper, so orphans become its children."""
    children = Path(f"/proc/self/task/{threading.get_native_id()}/children")
    while found := [int(pid) for pid in children.read_text().split()]:
        for pid in found:
            os.kill(pid, signal.SIGKILL)
        for pid in found:
            os.waitpid(pid, 0)


def _serve(grader: Grader, cpu_seconds: float, jobs: int, replies: int, parent: int) -> None:
    """Run the child's loop over jobs; does not return."""
    die_with_parent()
    adopt_orphans()
    if os.getppid() != parent:
        os._exit(1)
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    _limit_memory()
    me = os.getpid()
    with os.fdopen(jobs, "rb") as lines:
        for line in lines:
            score, fault = _grade(grader, line, cpu_seconds)
            if os.getpid() != me:
                os._exit(1)  # the grader forked, and this is the copy
            left = _left_behind()
            if left:
                score, fault = 0.0, "left a process behind"
            _write(replies, json.dumps([score, fault, left]).encode() + b"\n")
    os._exit(0)


def _grade(grader: Grader, line: bytes, cpu_seconds: float) -> tuple[float, str | None]:
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # an earlier job's code may have changed it
    signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
    try:
        return float(grader(*json.loads(line))), None
    except Unscored as error:
        return 0.0, str(error)
    except BaseException as error:  # a user's function may even call exit
        return 0.0, f"{type(error).__name__}: {' '.join(str(error).split())}"[:_MESSAGE]
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _left_behind() -> bool:
    try:
        os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return False
    return True


def _limit_memory() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = MEMORY_BYTES + pages * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def _write(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]
