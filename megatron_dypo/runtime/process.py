"""What a training process sets up first: which process it ends with, which signals tell of its state; and threads.

Imports no torch.
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
    """Call before anything that starts threads: the signal mask is theirs, too."""
    end_with_launcher()
    signal.pthread_sigmask(signal.SIG_BLOCK, {STACKS_SIGNAL})  # the watchdog's thread waits for it
    if sys.__stderr__ is not None:
        faulthandler.enable(file=sys.__stderr__.fileno())  # stacks of a crash in C code


def end_with_launcher() -> None:
    """Under torchrun: from now on the kernel kills this process when the launcher dies.

    SIGKILL, not SIGTERM: neither a library's handler nor code stuck in C can hold it back, and nothing needs a clean
    end: checkpoints appear whole or not at all. A launcher that died before is noticed by its rendezvous store, which
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
    """``work``'s result, or what it raised, from a thread that does not keep the process from ending."""
    future: Future[_Result] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future
