"""A command that did its work ends with 0, whatever a library's memory does when the interpreter ends."""

from __future__ import annotations

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
