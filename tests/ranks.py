"""Run a function on several real ranks (gloo, megatron-core), forked in a second from a preloaded server."""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

CUDA_START = 180  # more seconds for ranks on a GPU: its context, NCCL, and compilation with empty caches
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.rank_preload"])


def run_ranks(world: int, function: Callable, *arguments: Any, seconds: float = 120) -> list:
    """Run ``function(*arguments)`` on ``world`` ranks with torchrun's environment; return the results in rank order.

    ``function`` must be importable by name. Fails with the first rank's traceback, or after ``seconds``, on a GPU
    ``CUDA_START`` more.
    """
    import torch

    store = _Store()
    pipes = [_context.Pipe(duplex=False) for _ in range(world)]
    processes = _start(world, store.environment, _send_result, [(send, function, arguments) for _, send in pipes])
    for _, send in pipes:
        send.close()
    seconds += CUDA_START if torch.cuda.is_available() else 0
    deadline = time.monotonic() + seconds
    results: list = []
    try:
        for rank, (receive, _) in enumerate(pipes):
            if not receive.poll(max(0.0, deadline - time.monotonic())):
                raise TimeoutError(f"rank {rank} of {function.__name__} did not finish within {seconds:g} s")
            succeeded, result = receive.recv()
            if not succeeded:
                raise AssertionError(f"rank {rank} of {function.__name__} failed:\n{result}")
            results.append(result)
    finally:
        for process in processes:
            process.join(timeout=5.0 if len(results) == world else 0.0)
            if process.is_alive():
                process.kill()
                process.join()
    return results


class Launch:
    """Runs ``function(*arguments)`` on ``world`` ranks alongside the caller; its result is their exit code.

    As under torchrun, the launcher owns the rendezvous store, and ranks end with the process that started them.
    """

    def __init__(self, world: int, function: Callable, *arguments: Any):
        self._store = _Store()
        environment = self._store.environment | {"TORCHELASTIC_RUN_ID": "test"}
        self.ranks = _start(world, environment, _exit_with_result, [(function, arguments)] * world)


class _Store:
    """A rendezvous store of this process, like a launcher's: its port cannot be taken before the ranks come."""

    def __init__(self) -> None:
        from torch.distributed import TCPStore

        self._server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.environment = {
            "MASTER_PORT": str(self._server.port),
            "TORCHELASTIC_RESTART_COUNT": "0",
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }


def _start(world: int, environment: dict[str, str], target: Callable, arguments: list[tuple]) -> list[BaseProcess]:
    common = environment | {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
    processes = []
    for rank in range(world):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        processes.append(_context.Process(target=_rank, args=(common | own, target, arguments[rank]), daemon=True))
        processes[-1].start()
    return processes


def _rank(environment: dict[str, str], target: Callable, arguments: tuple) -> None:
    os.environ.update(environment)
    import torch

    torch.set_num_threads(1)
    target(*arguments)


def _send_result(send, function: Callable, arguments: tuple) -> None:
    try:
        send.send((True, function(*arguments)))
    except BaseException:
        send.send((False, traceback.format_exc()))
    send.close()
    os._exit(0)  # skips the interpreter's shutdown: process groups and engines end with the process


def _exit_with_result(function: Callable, arguments: tuple) -> None:
    raise SystemExit(function(*arguments))
