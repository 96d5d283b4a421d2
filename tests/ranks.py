"""Run a function on several real ranks (gloo, megatron-core), forked in a second from a preloaded server."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.rank_preload"])


def run_ranks(world: int, function: Callable, *arguments: Any, seconds: float = 120) -> list:
    """``function(*arguments)`` on ``world`` ranks with torchrun's environment; the ranks' results in order.

    ``function`` must be importable by name. Fails with the first rank's traceback, or when ``seconds`` have passed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipes = [_context.Pipe(duplex=False) for _ in range(world)]
    processes = [
        _context.Process(target=_rank, args=(send, rank, world, port, function, arguments), daemon=True)
        for rank, (_, send) in enumerate(pipes)
    ]
    for process in processes:
        process.start()
    for _, send in pipes:
        send.close()
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


def _rank(send, rank: int, world: int, port: int, function: Callable, arguments: tuple) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    import torch

    torch.set_num_threads(1)
    try:
        send.send((True, function(*arguments)))
    except BaseException:
        send.send((False, traceback.format_exc()))
    send.close()
    os._exit(0)  # no interpreter shutdown: process groups and engines end with the process
