"""Where this rank is, and how it says that it failed: one clear line first, from the rank that failed first.

``phase`` and ``begin_step`` keep the place, each thread its own; the rank's is that of its main thread. The rank that
fails first claims that on the job's board (``board.py``), so that the ranks it takes down name it, in one line, instead
of printing their own broken-connection traces.
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
    from megatron_dypo.runtime.board import Board

_PEER_LOST = ("Connection", "Socket", "socket", "Broken pipe", "imed out", "imeout", "DistBackendError", "NCCL")
_PATIENCE = 5.0  # seconds that a rank which lost a peer leaves the others to say why


@dataclass(frozen=True)
class Place:
    """A phase of a step (None before the loop), entered at ``since``. ``limit``: its own deadline (s) and that key."""

    phase: str
    step: int | None = None
    limit: tuple[float, str] | None = None
    since: float = field(default_factory=time.monotonic)

    def __str__(self) -> str:
        return f"phase {self.phase!r}" + (f" of step {self.step}" if self.step else "")


_START = Place("start")
_places: dict[int, Place] = {}  # by thread


def place() -> Place:
    """Where this rank, that is its main thread, is now."""
    return _places.get(threading.main_thread().ident, _START)


def begin_step(step: int) -> None:
    """From here on this thread is in ``step``, between its phases."""
    _places[threading.get_ident()] = Place("main loop", step)


@contextmanager
def phase(name: str, limit: tuple[float, str] | None = None) -> Iterator[None]:
    """Name what this thread is doing. ``limit`` (seconds, key) is a deadline other than ``parallel.timeout``.

    The watchdog measures it, on the main thread, since the last change of phase: the end of an inner phase starts the
    outer one's anew.
    """
    thread = threading.get_ident()
    outer = _places.get(thread, _START)
    _places[thread] = inner = Place(name, outer.step, limit)
    try:
        yield
    except BaseException as error:
        error.place = getattr(error, "place", inner)  # the innermost, for the message
        raise
    finally:
        _places[thread] = replace(outer, since=time.monotonic())


def headline(rank: int, where: object, why: str) -> str:
    """The one line that names rank, phase, step and the original error."""
    return f"[rank {rank}] failed in {where}: {why}"


def say(text: str) -> None:
    """To standard error in one piece, so that ranks do not cut into each other's lines."""
    sys.stderr.write(text.rstrip("\n") + "\n")
    sys.stderr.flush()


def report(error: BaseException, board: Board | None = None) -> None:
    """Print headline and traceback of this rank's error, or one line that names the rank that failed first.

    An error is reported once, where it is noticed first, and knows then whether it was the job's first. A UserError
    that was is left to the command line.
    """
    if hasattr(error, "first"):
        return
    rank, where = int(os.environ.get("RANK", "0")), getattr(error, "place", place())
    first_line = (str(error).strip() or repr(error)).splitlines()[0]
    ours = headline(rank, where, f"{type(error).__name__}: {first_line}")
    if board and any(sign in ours for sign in _PEER_LOST):
        ours += _silent_peers(board)
    known = board.claim_failure(ours) if board else ours
    error.first = known == ours
    if not error.first:
        say(f"[rank {rank}] stops in {where} because of: {known}")
    elif not isinstance(error, UserError):
        say("\n".join([ours, *(board.whereabouts() if board else []), *traceback.format_exception(error)]))


def _silent_peers(board: Board) -> str:
    """Let the peer that was lost, or those who saw it end, speak first; without a word from any: who gives no sign."""
    before, deadline = board.beats(), time.monotonic() + _PATIENCE
    while board.failure() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    if not board.usable:
        return " (the rendezvous store is gone, too: the launcher or rank 0 has ended)"
    silent = [str(rank) for rank, beat in board.beats().items() if beat == before.get(rank) and not beat.done]
    return f" (no sign of life from rank {', '.join(silent)})" if silent else ""
