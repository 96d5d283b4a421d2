"""What a user of a command sees on the terminal: one line for an error, our own log lines, no library's notices."""

from __future__ import annotations

import logging
import os
import select
import sys
import warnings
from collections.abc import Callable
from typing import NoReturn

from megatron_dypo.errors import UserError

READER_GONE = 141  # exit code, as the shell has it of a program that SIGPIPE ended
_LONGEST_LINE = 2000  # characters


def run_tool(name: str, tool: Callable[[], int]) -> NoReturn:
    """A script of ``tools/`` as a process: ``tool`` returns its exit code; what the user got wrong is one line."""
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
    """Whether standard output is a pipe that is not read any more (`| head`)."""
    watched = select.poll()
    watched.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in watched.poll(0))


def flush_output() -> None:
    """Flush standard output; what is not read any more is dropped."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        drop_output()


def drop_output() -> None:
    """Send what is printed from now on nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def one_line(text: str) -> str:
    """On one line of bearable length, whatever bytes of a file it quotes, and nothing in it that steers a terminal."""
    words = " ".join(text.split())
    shown = words if len(words) <= _LONGEST_LINE else f"{words[:_LONGEST_LINE]}..."
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in shown)


def quiet() -> None:
    """Our own log lines from rank 0, warnings from all; not the libraries' notices about what is not installed."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # vLLM announces its NUMA binding on every rank
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    logging.getLogger("megatron_dypo").setLevel(level)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its advice on tokenizers would stand beside our one line
    logging.getLogger("transformers").setLevel(logging.ERROR)  # the same, where it is imported already
    for module in (r"megatron\.core", "torch", "transformers", "vllm", "flashinfer"):
        warnings.filterwarnings("ignore", module=module)
