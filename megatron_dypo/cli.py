"""The command line: parse, run, and turn failures into exit codes.

0 done, 2 unusable input, 75 training stopped by a signal and saved (to be restarted), 141 the reader of the output has
gone, 1 anything else.
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

_PATIENCE = 30.0  # seconds that other ranks wait for rank 0 to report a UserError


def script() -> NoReturn:
    """Run the command as a process. After a failure exit at once: no library's exit handler may delay it.

    If vLLM ran in it, success runs the exit handlers but skips the interpreter's own shutdown: memory pools of vLLM's
    sleep mode that live until then may abort the process ("pure virtual method called") with exit code 134.
    """
    try:
        code = main()
    except KeyboardInterrupt:
        code = 130  # as in a shell; a thread may still be sampling
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
    """Run one command; return its exit code. It ends quietly if its output is no longer read (`| head`).

    Under torchrun only rank 0 prints a UserError.
    """
    options = parse(arguments)
    quiet()
    try:
        return options.run(options) or 0
    except UserError as error:
        from megatron_dypo.runtime.failure import error_record

        first = error_record(error).first  # None: unknown, because there are no process groups yet
        if first is None and os.environ.get("RANK", "0") != "0":
            time.sleep(_PATIENCE)  # rank 0's end ends this rank; if it is still alive, only this rank has the error
        if first is not False:
            print(f"megatron_dypo: {one_line(str(error))}", file=sys.stderr, flush=True)
        return 2
    except Exception as error:  # the last line of defence; most errors are reported where they are raised
        if isinstance(error, BrokenPipeError) and reader_gone():
            return READER_GONE
        from megatron_dypo.runtime.failure import report

        report(error)
        return 1
