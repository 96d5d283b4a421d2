"""The command line: parse, run, and turn failures into exit codes.

0 done, 2 unusable input, 75 training stopped by a signal and saved (to be started again), 141 the reader of the output
has gone, 1 anything else.
"""

from __future__ import annotations

import atexit
import os
import sys
import time
from typing import NoReturn

from megatron_dypo.commands import parse
from megatron_dypo.errors import UserError
from megatron_dypo.runtime.console import READER_GONE, flush_output, one_line, quiet, reader_gone

_PATIENCE = 30.0  # seconds that the other ranks leave rank 0 to say what the user got wrong


def script() -> NoReturn:
    """The command as a process. After a failure it ends on the spot: no library's exit handler may keep it waiting.

    Where vLLM ran in it, a good end runs exit handlers and leaves out the interpreter's own end: memory pools of vLLM's
    sleep mode that live until then may abort the process ("pure virtual method called"), and its exit code be 134.
    """
    try:
        code = main()
    except KeyboardInterrupt:
        code = 130  # as a shell has it; a thread may still be sampling
    flush_output()
    sys.stderr.flush()
    if code == 0 and "vllm" in sys.modules:
        atexit._run_exitfuncs()
        flush_output()
        sys.stderr.flush()
        os._exit(0)
    if code:
        os._exit(code)
    raise SystemExit(0)


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns its exit code. One whose output is not read any more (`| head`) ends quietly.

    Under torchrun only rank 0 prints what the user got wrong.
    """
    options = parse(arguments)
    quiet()
    try:
        return options.run(options) or 0
    except UserError as error:
        from megatron_dypo.runtime.failure import error_record

        first = error_record(error).first  # None: there are no process groups yet, to know it
        if first is None and os.environ.get("RANK", "0") != "0":
            time.sleep(_PATIENCE)  # rank 0's end ends this rank; still here after it, only this rank knows
        if first is not False:
            print(f"megatron_dypo: {one_line(str(error))}", file=sys.stderr, flush=True)
        return 2
    except Exception as error:  # the last line of defence; most errors have been reported where they were raised
        if isinstance(error, BrokenPipeError) and reader_gone():
            return READER_GONE
        from megatron_dypo.runtime.failure import report

        report(error)
        return 1
