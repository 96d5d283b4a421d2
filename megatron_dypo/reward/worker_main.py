"""A worker process: import the grader once and fork a child that answers; replace a child that does not.

    python -m megatron_dypo.reward.worker_main FUNCTION CPU_SECONDS PARENT_PID

Reads one job (a JSON list of the grader's arguments) per line and answers each with a line ``[score, fault]``; a null
fault means success. Its first line is null, or why it cannot start. Ends at once when standard input does, and
leaves no process behind. Forking a process that has imported everything takes milliseconds, starting one takes seconds.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys

from megatron_dypo.reward.grader_process import GraderProcess, end_descendants
from megatron_dypo.reward.graders import load
from megatron_dypo.runtime.prctl import adopt_orphans, die_with_parent


def main() -> None:
    function, cpu_seconds, parent = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
    _end_with(parent)
    adopt_orphans()  # processes that a grader leaves behind become children of this one
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the trainer, which closes its workers
    jobs, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "w")
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)  # a grader may read its input, and print
    os.dup2(2, 1)
    try:
        grader = load(function)
    except BaseException as error:  # a user's module may even call exit
        print(json.dumps(_one_line(error)), file=replies, flush=True)
        return
    gc.freeze()  # keeps existing objects out of collections, so a child need not copy their pages
    print("null", file=replies, flush=True)
    child: GraderProcess | None = None
    for job in jobs:
        child = child or GraderProcess(grader, cpu_seconds, close=(jobs.fileno(), replies.fileno()))
        score, fault, spent = child.ask(job, jobs.fileno())
        if spent:
            child.end()
            child = None
        print(json.dumps([score, fault]), file=replies, flush=True)
    end_descendants()
    os._exit(0)


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]


def _end_with(parent: int) -> None:
    """End this process when ``parent`` ends.

    The kernel also signals the end of the thread that started this process, so the handler checks the parent.
    """

    def end_if_orphan(*_: object) -> None:
        if os.getppid() != parent:
            end_descendants()
            os._exit(1)

    signal.signal(signal.SIGUSR1, end_if_orphan)
    die_with_parent(signal.SIGUSR1)
    end_if_orphan()  # the parent may have ended before the line above


if __name__ == "__main__":
    main()
