"""SIGTERM or SIGUSR1 during training: finish the step, save, and exit with EX_TEMPFAIL, so that a restart resumes.

torchrun passes both on to its ranks (``launch/`` sets that up for SIGUSR1) and then waits for them.
"""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Self

import torch
import torch.distributed as dist

from megatron_dypo.runtime.distributed import device

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# Not 0: if one node of several is asked to stop, the launchers of the others have to restart and wait for it.
EXIT_CODE = os.EX_TEMPFAIL


class StopRequest:
    """A context manager around the steps; the main thread enters it on every rank.

    Before it, the signals end the process as usual, since there is nothing to save. A rank that waits in C for a lost
    peer never reaches the handler; its watchdog ends it.
    """

    def __init__(self) -> None:
        self._asked = 0

    def __enter__(self) -> Self:
        self._handlers = {number: signal.signal(number, self._ask) for number in SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def agreed(self) -> signal.Signals | None:
        """Return the signal that any rank received, or None; collective, so that all ranks stop after the same step."""
        asked = torch.tensor([self._asked], dtype=torch.int32, device=device())
        dist.all_reduce(asked, dist.ReduceOp.MAX)
        number = int(asked.item())
        return signal.Signals(number) if number else None

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = number
