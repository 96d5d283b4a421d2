"""Linux settings for a process's parent and orphans (prctl(2)). Imports only the standard library."""

from __future__ import annotations

import ctypes
import signal

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def die_with_parent(by: signal.Signals = signal.SIGKILL) -> None:
    """Make the kernel send ``by`` to this process when its parent, or the thread that started it, ends.

    A parent that has already ended is not noticed: check ``os.getppid()`` afterwards.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, by)


def adopt_orphans(adopt: bool = True) -> None:
    """Make orphaned descendants children of this process, or stop doing so."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, int(adopt))
