"""A deadline for what cannot be interrupted from Python: past it the process says where it stood, and ends."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_dypo.runtime.distributed import launch_rank


@contextmanager
def deadline(seconds: float, what: str) -> Iterator[None]:
    """End the process (exit code 1) with rank, phase and stack if the block takes longer than ``seconds``."""

    def expire() -> None:
        print(f"[rank {launch_rank()}] {what} did not finish within {seconds:g} s", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(all_threads=True)
        os._exit(1)

    timer = threading.Timer(seconds, expire)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
