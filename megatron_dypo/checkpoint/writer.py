"""mcore's checkpoint writer without its helper processes.

mcore spawns a manager that runs ``__main__`` again and forks writers, beside threads of vLLM and OpenMP: 17 to 28
seconds for a tiny model, and a hang where the fork meets a lock. The same files are written here by this process.
"""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Iterator

from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync


def _write_buckets(transforms, use_msc: bool, rank: int, write_buckets: list, results_queue: queue.Queue) -> None:
    """Stands in for ``write_preloaded_data_multiproc``: one bucket after the other."""
    results = {}
    for i, bucket in enumerate(write_buckets):
        done, pending = queue.Queue(), queue.Queue()
        pending.put(i)
        FileSystemWriterAsync.write_preloaded_data(
            transforms, local_proc_idx=i, write_bucket=bucket, results_queue=done, count_queue=pending, use_fsync=True
        )
        _, result = done.get_nowait()
        if isinstance(result, Exception):
            raise result
        results[i] = result
    results_queue.put(results)


@contextlib.contextmanager
def in_process_writer() -> Iterator[None]:
    """While active, mcore's save writes from this process."""
    saved = filesystem_async._get_write_results_queue, FileSystemWriterAsync.write_preloaded_data_multiproc
    filesystem_async._get_write_results_queue = queue.Queue
    FileSystemWriterAsync.write_preloaded_data_multiproc = staticmethod(_write_buckets)
    try:
        yield
    finally:
        filesystem_async._get_write_results_queue, FileSystemWriterAsync.write_preloaded_data_multiproc = saved
