"""This rank's current phase, and the report of its failure: one clear line first, from the rank that failed first.

``phase`` and ``begin_step`` record the phase per thread; the rank's own is that of its main thread. The rank that fails
first claims the failure in the job's status (``job_status.py``), so that the ranks it takes down print one line naming
it instead of their own broken-connection traces.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from megatron_dypo.errors import UserError
from megatron_dypo.runtime import trace

if TYPE_CHECKING:
    from megatron_dypo.runtime.job_status import JobStatus

_PEER_LOST = ("Connection", "Socket", "socket", "Broken pipe", "imed out", "imeout", "DistBackendError", "NCCL")
_PATIENCE = 5.0  # seconds that a rank which lost a peer waits for others to report the cause


@dataclass(frozen=True)
class Phase:
    """A phase of a step (None before the loop), entered at ``since``; ``limit``: its own deadline (s) and its key."""

    name: str
    step: int | None = None
    limit: tuple[float, str] | None = None
    since: float = field(default_factory=time.monotonic)

    def __str__(self) -> str:
        return f"phase {self.name!r}" + (f" of step {self.step}" if self.step else "")


_START = Phase("start")
_phases: dict[int | None, Phase] = {}  # by thread


def current_phase() -> Phase:
    """Return the phase of this rank, that is of its main thread."""
    return _phases.get(threading.main_thread().ident, _START)


def current_step() -> int | None:
    """Return the step that this thread works for; None before the loop."""
    return _phases.get(threading.get_ident(), _START).step


@dataclass
class ErrorRecord:
    """Facts about an error as it propagates: the innermost phase it left, and whether it was the job's first.

    ``first`` is None until the error has been reported.
    """

    place: Phase | None = None
    first: bool | None = None


def error_record(error: BaseException) -> ErrorRecord:
    """Return the error's record, created on first use.

    It lives in the error's own namespace, so it follows the error to another thread and ends with it. A separate table
    would keep frames alive, and the tensors in them: built-in exceptions take no weak references.
    """
    return vars(error).setdefault("_megatron_dypo", ErrorRecord())


def begin_step(step: int) -> None:
    """Record that this thread is in ``step`` from now on, between its phases."""
    _phases[threading.get_ident()] = Phase("main loop", step)


@contextmanager
def phase(name: str, limit: tuple[float, str] | None = None) -> Iterator[None]:
    """Name the phase this thread is in. ``limit`` (seconds, key) is a deadline other than ``parallel.timeout``.

    The watchdog measures the main thread's time since the last change of phase: the end of an inner phase restarts the
    outer one's clock.
    """
    thread = threading.get_ident()
    outer = _phases.get(thread, _START)
    _phases[thread] = inner = Phase(name, outer.step, limit)
    began = time.perf_counter()
    try:
        yield
    except BaseException as error:
        known = error_record(error)
        known.place = known.place or inner  # keep the innermost phase for the message
        raise
    finally:
        _phases[thread] = replace(outer, since=time.monotonic())
        trace.add(name, "phase", began, step=outer.step)


def headline(rank: int, where: object, why: str) -> str:
    """Return the one line that names rank, phase, step and the original error."""
    return f"[rank {rank}] failed in {where}: {why}"


def say(text: str) -> None:
    """Write to standard error in one piece, so that ranks do not break into each other's lines."""
    sys.stderr.write(text.rstrip("\n") + "\n")
    sys.stderr.flush()


def report(error: BaseException, job_status: JobStatus | None = None) -> None:
    """Print headline and traceback of this rank's error, or one line that names the rank that failed first.

    An error is reported once, where it is caught first, and records whether it was the job's first. If that one is a
    UserError, the command line prints it.
    """
    own = error_record(error)
    if own.first is not None:
        return
    rank, where = int(os.environ.get("RANK", "0")), own.place or current_phase()
    first_line = (str(error).strip() or repr(error)).splitlines()[0]
    ours = headline(rank, where, f"{type(error).__name__}: {first_line}")
    if job_status and any(sign in ours for sign in _PEER_LOST):
        ours += _silent_peers(job_status)
    known = job_status.claim_failure(ours) if job_status else ours
    own.first = known == ours
    if not own.first:
        say(f"[rank {rank}] stops in {where} because of: {known}")
    elif not isinstance(error, UserError):
        say("\n".join([ours, *(job_status.whereabouts() if job_status else []), *traceback.format_exception(error)]))


def _silent_peers(job_status: JobStatus) -> str:
    """Wait for the lost peer, or a rank that saw it end, to report; otherwise name the ranks without heartbeats."""
    before, deadline = job_status.heartbeats(), time.monotonic() + _PATIENCE
    while job_status.failure() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    if not job_status.usable:
        return " (the rendezvous store is gone, too: the launcher or rank 0 has ended)"
    silent = [
        str(rank)
        for rank, heartbeat in job_status.heartbeats().items()
        if heartbeat == before.get(rank) and not heartbeat.done
    ]
    return f" (no sign of life from rank {', '.join(silent)})" if silent else ""
