"""``make check`` runs the fast tests of every core part, and none that starts processes or vLLM in any way."""

from __future__ import annotations

import re
import subprocess
from functools import partial
from pathlib import Path

import pytest

from benchmarks import servers
from tests import launch
from tests.conftest import LONG
from tests.ranks import Launch, run_ranks
from tests.slow import starts_processes

ROOT = Path(__file__).parent.parent
CORE = ("kernels", "grouped_loss", "objectives", "config", "minibatches", "recording")


class Collected:
    """Plugin of a collection in this process: the tests that it selects."""

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.items = session.items


def test_make_check_has_tests_of_every_core_part_and_no_slow_one():
    (selection,) = re.findall(r'^check:.*\n.* pytest tests -m "(.+?)"', (ROOT / "Makefile").read_text(), re.M)
    seen = Collected()
    files = [str(ROOT / f"tests/test_{name}.py") for name in (*CORE, "layouts", "end_to_end", "servers")]
    options = ["--collect-only", "-qq", "-p", "no:cacheprovider", "-m", selection]
    assert pytest.main([*options, *files], plugins=[seen]) == 0
    found = {item.path.stem.removeprefix("test_") for item in seen.items}
    assert found == set(CORE), "all of the core, and no test of layouts, whole runs or servers"
    assert not any({"slow", "gpu", "faults"} & {mark.name for mark in item.iter_markers()} for item in seen.items)


def helper():
    return run_ranks(2, helper)


class Process:
    def start(self):
        helper()


def of_a_nested_function():
    def inner():
        return [subprocess.run(["true"]) for _ in range(2)]

    return inner()


def of_a_class_here():
    Process().start()


def of_another_modules_attribute():
    launch.torchrun(2)


def of_a_class():
    return Launch(1, helper)


def of_an_import():
    from vllm.config import VllmConfig

    return VllmConfig


def of_an_import_of_its_top():
    import vllm

    return vllm


def of_a_benchmark():
    with servers.running(Path("config.yaml"), 1, 1):
        pass


def naming(vllm="vllm", multiprocessing=partial(max, 1)):
    """Use the names only: an argument, text, an attribute of something else."""
    from megatron_dypo.rollout.vllm_versions import Vllm

    return vllm, multiprocessing, "import subprocess", Vllm.name, launch.metrics


@pytest.mark.parametrize("name", ["helper", *(name for name in globals() if name.startswith("of_"))])
def test_what_starts_processes_or_vllm_is_slow_directly_or_through_a_helper(name):
    assert starts_processes((globals()[name],))


def test_what_only_names_them_is_not_slow():
    assert not starts_processes((naming,))


def test_files_that_are_said_to_be_long_exist():
    files = {path.stem for path in (ROOT / "tests").rglob("test_*.py")}
    assert {f"test_{name}" for name in LONG} <= files
