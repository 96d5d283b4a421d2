"""SIGTERM or SIGUSR1 during training: finish the step, save, end with a code of its own, so that a start goes on.

torchrun passes either on to its ranks (``launch/`` has it do so for SIGUSR1, too) and then waits for them.
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
# Not 0: where one node of several is told to go, the launchers of the others are to start again and wait for it.
EXIT_CODE = os.EX_TEMPFAIL


class StopRequest:
    """A context manager round the steps; the main thread enters it on every rank.

    Before it, the signals end the process as they always do: there is nothing to save. A rank that waits in C for one
    that is gone never gets to the handler, and is ended by its watchdog.
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
        """The signal that any rank has got; collective. All ranks have to stop after the same step."""
        asked = torch.tensor([self._asked], dtype=torch.int32, device=device())
        dist.all_reduce(asked, dist.ReduceOp.MAX)
        number = int(asked.item())
        return signal.Signals(number) if number else None

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = number
