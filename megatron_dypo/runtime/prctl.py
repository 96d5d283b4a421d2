"""What a process asks of Linux about its parent and its orphans (prctl(2)). Imports the standard library alone."""

from __future__ import annotations

import ctypes
import signal

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def die_with_parent(by: signal.Signals = signal.SIGKILL) -> None:
    """From now on the kernel sends ``by`` to this process when its parent, or the thread that started it, ends.

    A parent that ended before is not noticed: look at ``os.getppid()`` afterwards.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, by)


def adopt_orphans(adopt: bool = True) -> None:
    """Whether a process below this one that loses its parent becomes this process's child."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, int(adopt))
