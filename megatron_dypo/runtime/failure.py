"""Where this rank is, and how it says that it failed: one clear line first, from the rank that failed first.

``phase`` and ``begin_step`` keep the place, each thread its own; the rank's is that of its main thread. The rank that
fails first claims that in the job's status (``job_status.py``), so that the ranks it takes down name it, in one line,
instead of printing their own broken-connection traces.
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

if TYPE_CHECKING:
    from megatron_dypo.runtime.job_status import JobStatus

_PEER_LOST = ("Connection", "Socket", "socket", "Broken pipe", "imed out", "imeout", "DistBackendError", "NCCL")
_PATIENCE = 5.0  # seconds that a rank which lost a peer leaves the others to say why


@dataclass(frozen=True)
class Phase:
    """A phase of a step (None before the loop), entered at ``since``. ``limit``: its own deadline (s) and that key."""

    name: str
    step: int | None = None
    limit: tuple[float, str] | None = None
    since: float = field(default_factory=time.monotonic)

    def __str__(self) -> str:
        return f"phase {self.name!r}" + (f" of step {self.step}" if self.step else "")


_START = Phase("start")
_phases: dict[int | None, Phase] = {}  # by thread


def current_phase() -> Phase:
    """Where this rank, that is its main thread, is now."""
    return _phases.get(threading.main_thread().ident, _START)


@dataclass
class ErrorRecord:
    """What is known of an error on its way up: the innermost phase that it left, and whether it was the job's first
    (None: not reported yet)."""

    place: Phase | None = None
    first: bool | None = None


def error_record(error: BaseException) -> ErrorRecord:
    """The error's record, made at first use.

    It lives in the error's own namespace, from which it goes along to another thread and ends with the error. A table
    beside would keep frames alive, and the tensors in them: built-in exceptions take no weak references.
    """
    return vars(error).setdefault("_megatron_dypo", ErrorRecord())


def begin_step(step: int) -> None:
    """From here on this thread is in ``step``, between its phases."""
    _phases[threading.get_ident()] = Phase("main loop", step)


@contextmanager
def phase(name: str, limit: tuple[float, str] | None = None) -> Iterator[None]:
    """Name what this thread is doing. ``limit`` (seconds, key) is a deadline other than ``parallel.timeout``.

    The watchdog measures it, on the main thread, since the last change of phase: the end of an inner phase starts the
    outer one's anew.
    """
    thread = threading.get_ident()
    outer = _phases.get(thread, _START)
    _phases[thread] = inner = Phase(name, outer.step, limit)
    try:
        yield
    except BaseException as error:
        known = error_record(error)
        known.place = known.place or inner  # the innermost, for the message
        raise
    finally:
        _phases[thread] = replace(outer, since=time.monotonic())


def headline(rank: int, where: object, why: str) -> str:
    """The one line that names rank, phase, step and the original error."""
    return f"[rank {rank}] failed in {where}: {why}"


def say(text: str) -> None:
    """To standard error in one piece, so that ranks do not cut into each other's lines."""
    sys.stderr.write(text.rstrip("\n") + "\n")
    sys.stderr.flush()


def report(error: BaseException, job_status: JobStatus | None = None) -> None:
    """Print headline and traceback of this rank's error, or one line that names the rank that failed first.

    An error is reported once, where it is noticed first, and knows then whether it was the job's first. A UserError
    that was is left to the command line.
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
    """Let the peer that was lost, or those who saw it end, speak first; without a word from any: who gives no sign."""
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
