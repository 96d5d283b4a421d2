"""Terminal output of a command: one line per error, our own log lines, and no notices from libraries."""

from __future__ import annotations

import logging
import os
import select
import sys
import warnings
from collections.abc import Callable
from typing import NoReturn

from megatron_dypo.errors import UserError

READER_GONE = 141  # exit code that the shell reports for a program ended by SIGPIPE
_LONGEST_LINE = 2000  # characters


def run_tool(name: str, tool: Callable[[], int]) -> NoReturn:
    """Run a script of ``tools/`` and exit with ``tool``'s return code; print a UserError as one line, code 2."""
    quiet()
    try:
        code = tool()
    except UserError as error:
        print(f"{name}: {one_line(str(error))}", file=sys.stderr, flush=True)
        code = 2
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        if not reader_gone():
            raise
        code = READER_GONE
    flush_output()
    raise SystemExit(code)


def reader_gone() -> bool:
    """Return whether standard output is a pipe whose reader has closed it (`| head`)."""
    watched = select.poll()
    watched.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in watched.poll(0))


def flush_output() -> None:
    """Flush standard output; discard it if its reader has gone."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        drop_output()


def drop_output() -> None:
    """Redirect standard output to /dev/null from now on."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def one_line(text: str) -> str:
    """Return ``text`` on one line, shortened to 2000 characters, with unprintable characters replaced."""
    words = " ".join(text.split())
    shown = words if len(words) <= _LONGEST_LINE else f"{words[:_LONGEST_LINE]}..."
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in shown)


def quiet() -> None:
    """Show our log lines from rank 0 and warnings from every rank; hide notices about optional libraries."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # vLLM announces its NUMA binding on every rank
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    logging.getLogger("megatron_dypo").setLevel(level)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its advice on tokenizers would follow our one line
    logging.getLogger("transformers").setLevel(logging.ERROR)  # in case it is already imported
    for module in (r"megatron\.core", "torch", "transformers", "vllm", "flashinfer"):
        warnings.filterwarnings("ignore", module=module)
