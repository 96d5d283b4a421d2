"""The worker process: reads one ``[answer, truth]`` a line, writes ``true`` or ``false``. Imports no torch.

    python -m megatron_dypo.reward.worker CPU_SECONDS PARENT_PID

An answer that takes more than CPU_SECONDS ends the process: the kernel's profiling timer sends SIGPROF, whose default
action is to terminate, even within one long operation in C (``9^{9^{9}}``) that would hold back any Python handler.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import resource
import signal
import sys

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

MEMORY_BYTES = 4 << 30
_PR_SET_PDEATHSIG = 1
_EXTRACTION = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())


def equivalent(answer: str, truth: str) -> bool:
    """Math-verify's opinion, with its own time limits (SIGALRM) off; what it cannot parse is equal as text only."""
    gold, given = (
        parse(f"\\boxed{{{text}}}", extraction_config=_EXTRACTION, parsing_timeout=None) for text in (truth, answer)
    )
    return bool(verify(gold, given, timeout_seconds=None))


def main() -> None:
    """Answers until standard input ends."""
    cpu_seconds, parent = float(sys.argv[1]), int(sys.argv[2])
    _end_with(parent)
    _limit_memory()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's, which closes its workers
    logging.disable()  # math-verify warns of the limits being off, and logs every answer that it cannot parse
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # antlr prints to standard output now and then
    equivalent("0.5", r"\frac{1}{2}")  # builds parser and regexes, on nobody's time
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        answer, truth = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        verdict = equivalent(answer, truth)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(verdict), file=replies, flush=True)


def _end_with(parent: int) -> None:
    """Ends this process when ``parent`` does, be it in the middle of an answer.

    The kernel also signals the end of the mere thread that started this process, hence a handler that looks.
    """

    def end_if_orphan(*_: object) -> None:
        if os.getppid() != parent:
            os._exit(1)

    signal.signal(signal.SIGUSR1, end_if_orphan)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGUSR1)
    end_if_orphan()  # it may have ended before the line above


def _limit_memory() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    soft = MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(MEMORY_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


if __name__ == "__main__":
    main()
