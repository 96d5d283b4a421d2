"""First setup of a training process: the launcher it ends with, the signals it handles, and threads.

Does not import torch.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from megatron_dypo.runtime.failure import current_phase, headline, say
from megatron_dypo.runtime.prctl import die_with_parent

STACKS_SIGNAL = signal.SIGUSR2
_LAUNCHER_SECONDS = 60.0  # how long a launcher that is busy may take to accept a connection


def setup_process() -> None:
    """Set up signals and crash dumps. Call before any thread starts, because threads inherit the signal mask."""
    end_with_launcher()
    signal.pthread_sigmask(signal.SIG_BLOCK, {STACKS_SIGNAL})  # the watchdog's thread waits for it
    if sys.__stderr__ is not None:
        faulthandler.enable(file=sys.__stderr__.fileno())  # stacks of a crash in C code


def end_with_launcher() -> None:
    """Under torchrun, make the kernel kill this process when the launcher dies.

    SIGKILL rather than SIGTERM: neither a library's handler nor code stuck in C can delay it, and no clean end is
    needed, because checkpoints are atomic. A launcher that is already dead is noticed by its rendezvous store, which
    listens before any rank is started.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    die_with_parent(signal.SIGKILL)
    store = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        try:
            socket.create_connection(store, _LAUNCHER_SECONDS).close()
        except OSError as error:
            say(headline(int(os.environ["RANK"]), current_phase(), f"no launcher at {store[0]}:{store[1]}: {error}"))
            os._exit(1)


_Result = TypeVar("_Result")


def in_thread(work: Callable[[], _Result], name: str) -> Future[_Result]:
    """Run ``work`` in a daemon thread; the future holds its result or its exception."""
    future: Future[_Result] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future
