"""A successful command ends with 0, whatever a library's memory does when the interpreter ends."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CHILD = """
import atexit, os, sys, types
from megatron_dypo import cli

class Pool:
    def __del__(self):
        os.abort()

sys.modules["vllm"] = types.ModuleType("vllm")
sys.modules["vllm"].pool = Pool()
cli.main = lambda: {code}
atexit.register(print, "exit handlers ran")
print("done")
cli.script()
"""


@pytest.mark.parametrize("code", [0, 75])
def test_memory_pools_that_abort_at_the_end_do_not_change_the_exit_code(code):
    ran = subprocess.run([sys.executable, "-c", CHILD.format(code=code)], capture_output=True, text=True, timeout=60)
    assert ran.returncode == code, ran.stderr
    assert ran.stdout.splitlines() == (["done", "exit handlers ran"] if code == 0 else ["done"])


PRINTING = """
import sys
from megatron_dypo import commands
from megatron_dypo.cli import script
from megatron_dypo.errors import UserError
from megatron_dypo.monitor.progress import default_console, summary
from megatron_dypo.runtime.console import run_tool

def lines(options=None):
    for number in range(100_000):
        print("line", number)
    return 0

def table(options=None):
    console = default_console()
    for number in range(100):
        summary([("line", str(number))], "x" * 70_000, console)
    print("went on", file=sys.stderr)

def pipe_of_its_own(options=None):
    raise BrokenPipeError("a worker's pipe")

def last_line(options=None):
    print("one line, flushed at the end")

commands._doctor = {command}
sys.argv = ["megatron_dypo", "doctor"]
{start}
"""


@pytest.mark.parametrize(
    ("command", "start", "code", "said"),
    [
        ("lines", "script()", 141, ""),
        ("lines", "run_tool('tool', lines)", 141, ""),
        ("last_line", "script()", 0, ""),
        ("table", "script()", 0, "went on\n"),  # how a training run prints
    ],
)
def test_output_that_is_not_read_any_more_is_no_error(command, start, code, said):
    with subprocess.Popen(
        [sys.executable, "-c", PRINTING.format(command=command, start=start)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": ""},
    ) as child:
        child.stdout.close()
        assert (child.stderr.read(), child.wait(60)) == (said, code)


def test_another_broken_pipe_is_an_error_still():
    program = PRINTING.format(command="pipe_of_its_own", start="script()")
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 1 and "a worker's pipe" in ran.stderr
