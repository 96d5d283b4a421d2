"""Every fenced snippet of the pages runs as written, or is in ``NOT_HERE`` with the reason why it cannot.

A page's snippets run in order, in a folder that looks like a checkout after the README's commands: ``config.yaml`` is
the README's own with a tiny model and one step. Our commands run on a forked rank, launchers with ``--dry-run`` (the
commands that they print must load), and everything else in a shell, one per command.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from aiohttp import web

from megatron_dypo.commands import parse
from megatron_dypo.config import load_config
from tests.launch import copy_task, metrics
from tests.ranks import run_ranks
from tests.test_config import SMALLEST
from tests.test_convert import hf_model
from tests.test_docs import PAGES, ROOT
from tests.test_teacher_traces import Imitation

GPUS = "needs GPUs or a cluster"
NETWORK = "needs a network"
NOT_HERE = {  # (page, first words of the command or block): why, and what else runs it; without words, the whole page
    ("README.md", "make quickstart"): "takes minutes: make quickstart",
    ("README.md", "make test"): "takes minutes: .ci/run",
    ("README.md", "python -m megatron_dypo doctor"): (
        "half a minute: tests/test_doctor.py::test_this_machine_is_well_and_its_two_ranks_work"
    ),
    ("docs/data.md", ""): (
        "with two imitated teachers: tests/test_teacher_traces.py::test_commands_of_the_docs_run; "
        "the rows: tests/test_teacher_traces.py::test_rows_of_the_docs_are_rows"
    ),
    ("docs/add-an-algorithm.md", ""): (
        "parts of files: tests/test_docs.py::test_every_listing_of_add_an_algorithm_is_in_the_file_that_it_is_of"
    ),
    ("docs/first-task.md", ""): (
        "in an empty folder: tests/test_snippets.py::test_the_first_task_goes_from_nothing_to_a_measured_model"
    ),
    ("docs/gpu-report.md", "make gpu-report"): f"{GPUS}: tests/test_gpu_report.py",
    ("docs/scale-up.md", "python -m megatron_dypo plan"): (
        "tests/test_docs.py::test_rows_that_the_page_on_scaling_up_quotes_are_the_planner_s"
    ),
    ("docs/systems.md", "examples/systems/run.sh luffy"): (
        "minutes: tests/test_systems.py::test_run_sh_makes_the_start_once_and_lays_the_recipe_over_the_quickstart"
    ),
    ("docs/systems.md", "python -m megatron_dypo report"): "of the run above: tests/test_report.py",
    ("docs/when-training-goes-wrong.md", ""): (
        "minutes: tests/test_systems.py::test_run_sh_makes_the_start_once_and_lays_the_recipe_over_the_quickstart; its "
        "warnings: tests/test_health.py::test_warnings_that_the_page_on_wrong_runs_quotes_are_those_of_the_rules"
    ),
    ("docs/launch.md", "python3 -m pip list"): f"{NETWORK}: tests/test_gpu_bundle.py",
    ("docs/launch.md", "python tools/gpu_bundle.py"): f"{NETWORK}: tests/test_gpu_bundle.py",
    ("docs/launch.md", "tar xf bundle.tar.xz"): f"{NETWORK}: tests/test_gpu_bundle.py",
    ("examples/qwen2.5_math_7b_dypo/README.md", "python tools/prepare_data.py"): NETWORK,
    ("examples/qwen2.5_math_7b_dypo/README.md", "HEAD=node0:29500"): (
        f"{GPUS}: tests/test_examples.py::test_an_example_s_script_starts_its_own_configuration"
    ),
    ("examples/qwen2.5_math_7b_dypo/README.md", "python -m megatron_dypo evaluate"): GPUS,
    ("examples/qwen3_4b_base_dypo/README.md", "HEAD=node0:29500"): (
        f"{GPUS}: tests/test_examples.py::test_an_example_s_script_starts_its_own_configuration"
    ),
    ("examples/qwen3_4b_base_dypo/README.md", "python -m megatron_dypo evaluate"): GPUS,
}
MINUTES = {"examples/smollm2_gsm8k/README.md"}  # real ranks with real vLLM: make faults
LANGUAGES = ("bash", "python", "yaml", "json", "text")  # text: a picture, nothing that runs
OURS = "python -m megatron_dypo "
LAUNCHER = re.compile(r"\b(launch/\w+\.sh)\b")
INLINE = re.compile(r"`((?:[A-Z]+=\S+ )*launch/\w+\.sh [^`]*)`")  # within a text or a table


class Snippet(NamedTuple):
    page: str
    language: str
    text: str

    @property
    def runs(self) -> bool:
        return self.language != "text" and not any(self.is_of(*key) for key in NOT_HERE)

    def is_of(self, page: str, beginning: str) -> bool:
        words = beginning.split()
        return self.page == page and self.text.split()[: len(words)] == words


def snippets_of(page: str, text: str) -> list[Snippet]:
    """Return blocks, and each command of a shell's blocks: continued lines joined, ``<<`` texts kept whole."""
    found = []
    blocks = re.findall(r"^```(.*)\n((?s:.*?))^```$", text, re.MULTILINE)
    assert text.count("```") == 2 * len(blocks), f"{page}: a block that does not stand at the left margin"
    for language, block in blocks:
        assert language in LANGUAGES, f"{page}: ```{language} is none of {LANGUAGES}"
        lines = [block]
        if language == "bash" and "<<" not in block:
            lines = [line for line in block.replace("\\\n", "").splitlines() if line]
        found += [Snippet(page, language, line) for line in lines]
    return found + [Snippet(page, "bash", line) for line in INLINE.findall(text) if "..." not in line]


SNIPPETS = [each for page in PAGES for each in snippets_of(str(page.relative_to(ROOT)), page.read_text())]


def small(tree: dict) -> dict:
    """Reduce the README's configuration to two CPU cores: few and short responses per step, without vLLM's startup."""
    tree["data"] |= {"prompts_per_step": 4, "max_prompt_tokens": 256}
    tree["rollout"] = {"engine": "transformers", "samples_per_prompt": 2, "max_response_tokens": 8}
    tree["trainer"] |= {"steps": 1}
    tree["evaluation"] = {"data": "data", "samples": 2}
    return tree


def save_model(folder: str) -> None:
    """Save a random Llama with the built-in tokenizer as a Hugging Face folder; for a forked rank."""
    from megatron_dypo.data.tokenizer import arithmetic_backend
    from megatron_dypo.models.shape import PRESETS

    hf_model(replace(PRESETS["tiny"], max_position=1024)).save_pretrained(folder)
    arithmetic_backend().save_pretrained(folder)


def make_checkout(folder: Path) -> None:
    """Make what the pages' commands assume: scripts, a model, data, suites and a configuration."""
    for name in ("examples", "launch", "tools"):
        (folder / name).symlink_to(ROOT / name)
    run_ranks(1, save_model, str(folder / "models/mine"))
    shutil.copytree(folder / "models/mine", folder / "models/smollm2")  # fetch_smollm2 finds it complete
    copy_task(folder / "data")
    for suite in ("aime24", "math500", "gsm8k", "olympiad"):
        rows = [{"problem": f"What is 1 + {i}?", "answer": str(1 + i)} for i in range(2)]
        (folder / f"data/{suite}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (whole,) = [each.text for each in SNIPPETS if (each.page, each.language) == ("README.md", "yaml")]
    (folder / "config.yaml").write_text(yaml.safe_dump(small(yaml.safe_load(whole))))


# --- one snippet


def run(snippet: Snippet, folder: Path) -> None:
    {"bash": run_command, "python": run_python, "yaml": run_yaml}[snippet.language](snippet.text, folder)


def run_command(command: str, folder: Path) -> str:
    """Return all output of a command; fail with it unless the command exits with 0."""
    if command.startswith(OURS):
        [(code, printed)] = run_ranks(1, ours, shlex.split(command, comments=True)[3:], str(folder))
    else:
        ran = subprocess.run(
            ["bash", "-euc", LAUNCHER.sub(r"\1 --dry-run", command)],
            cwd=folder,
            env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )
        code, printed = ran.returncode, ran.stdout
        if LAUNCHER.search(command) and not code:
            check_started(printed, folder)
    assert code == 0, f"{command}\n{printed}"
    return printed


def check_started(printed: str, folder: Path) -> None:
    """Check that every ``-m megatron_dypo ...`` of a launcher's dry run parses, and its configuration loads."""
    started = [line.partition("-m megatron_dypo ")[2] for line in printed.splitlines() if "-m megatron_dypo " in line]
    assert started, printed
    for arguments in started:
        options = parse(shlex.split(arguments))
        load_config(folder / options.config, options.overrides)


def run_python(code: str, folder: Path) -> None:
    (folder / "snippet.py").write_text(code)
    run_ranks(1, run_file, "snippet.py", str(folder))


def run_file(name: str, folder: str) -> None:
    os.chdir(folder)
    runpy.run_path(name)


def run_yaml(text: str, folder: Path) -> None:
    """Load sections of a configuration, or a whole one."""
    (folder / "snippet.yaml").write_text(yaml.safe_dump(SMALLEST | yaml.safe_load(text)))
    load_config(folder / "snippet.yaml")


def ours(arguments: list[str], folder: str) -> tuple[int, str]:
    """Return (exit code, output) of our command line; for a forked rank."""
    from megatron_dypo.cli import main

    os.chdir(folder)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            code = main(arguments)
        except SystemExit as end:  # --help
            code = end.code
    return code, printed.getvalue()


# --- the pages


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """Return a checkout in which the README's commands have run, with two more runs next to the first."""
    folder = tmp_path_factory.mktemp("checkout")
    make_checkout(folder)
    run_page("README.md", folder)
    for name in ("sft", "grpo"):
        shutil.copytree(folder / "runs/mine", folder / "runs" / name)
    return folder


def run_page(page: str, folder: Path) -> None:
    """Run its snippets in order. The pages' server, at port 8000, is an imitation that answers 1."""

    async def one(*_: object) -> web.Response:
        choice = {"message": {"role": "assistant", "content": "\\boxed{1}"}, "finish_reason": "stop"}
        return web.json_response({"model": "m", "choices": [choice], "usage": {"completion_tokens": 3}})

    with Imitation(one) as server:
        for snippet in SNIPPETS:
            if snippet.page == page and snippet.runs:
                run(snippet._replace(text=snippet.text.replace("http://127.0.0.1:8000/v1", server.url)), folder)


def test_commands_of_the_readme_do_what_they_say(checkout):
    assert metrics(checkout / "runs/mine")[-1]["step"] == 1
    (results,) = (checkout / "runs/mine/evaluation").glob("*/results.json")
    assert json.loads(results.read_text()).keys() == {"aime24", "math500"}
    assert (checkout / "models/trained/model.safetensors").exists() and (checkout / "runs/mine/report.html").exists()


RUN = sorted({each.page for each in SNIPPETS if each.runs} - {"README.md"} - MINUTES)


@pytest.mark.parametrize("page", RUN)
def test_snippets_of_a_page_run(page, checkout, tmp_path):
    folder = shutil.copytree(checkout, tmp_path / "checkout", symlinks=True)
    run_page(page, folder)


@pytest.mark.faults
def test_the_example_of_a_real_model_runs_with_a_tiny_one(tmp_path):
    """Run the page's own commands: real torchrun, two ranks with real vLLM, a data set of the same layout."""
    make_checkout(tmp_path)
    (tmp_path / "GSM8K").mkdir()
    for name, numbers in (("train", range(10, 30)), ("test", range(40, 43))):
        rows = [
            {"question": f"What is 2 + {i}?", "answer": f"2 + {i} = <<2+{i}={i + 2}>>{i + 2}\n#### {i + 2}"}
            for i in numbers
        ]
        (tmp_path / f"GSM8K/{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "data/gsm8k.jsonl").unlink()  # made by the other pages
    run_page("examples/smollm2_gsm8k/README.md", tmp_path)
    assert metrics(tmp_path / "runs/smollm2_gsm8k")[-1]["step"] == 10


@pytest.mark.parametrize("cut", [True, pytest.param(False, marks=pytest.mark.faults)], ids=["two steps", "whole"])
def test_the_first_task_goes_from_nothing_to_a_measured_model(cut, tmp_path):
    """Run the page's files and commands; the whole run, with real vLLM, learns the task."""
    page = [each for each in SNIPPETS if each.page == "docs/first-task.md"]
    make_data, reward = [each.text for each in page if each.language == "python"]
    (config,) = [yaml.safe_load(each.text) for each in page if each.language == "yaml"]
    if cut:
        config["rollout"]["engine"] = "transformers"
        config["trainer"] |= {"steps": 2, "eval_every": 2, "save_every": 2}
    for name, text in (("make_data.py", make_data), ("reward.py", reward), ("config.yaml", yaml.safe_dump(config))):
        (tmp_path / name).write_text(text)
    commands = [each.text for each in page if each.text.startswith("python ")]
    assert len(commands) == 5
    for command in commands:
        run_command(command, tmp_path)
    (results,) = (tmp_path / "runs/sort/evaluation").glob("*/results.json")
    found = json.loads(results.read_text())["held_out"]
    assert (found["problems"], found["samples"], found["faults"]) == (50, 4, 0)
    assert cut or found["figures"]["avg@4"]["value"] > 0.8
    assert (tmp_path / "runs/sort/report.html").exists()


def test_the_family_of_the_page_is_the_real_one(tmp_path):
    from megatron_dypo.models.families import FAMILIES

    (shown,) = [each.text for each in SNIPPETS if each.page == "docs/add-a-model.md"]
    (tmp_path / "family.py").write_text(shown)
    assert runpy.run_path(str(tmp_path / "family.py"))["FAMILY"] == FAMILIES["qwen3"]


def test_reasons_are_of_snippets_that_exist_and_name_tests_that_exist():
    for key, why in NOT_HERE.items():
        assert any(each.is_of(*key) for each in SNIPPETS), key
        for path, name in re.findall(r"(tests/\w+\.py)::(\w+)", why):
            assert f"def {name}(" in (ROOT / path).read_text(), why


def test_pictures_hold_no_command_and_most_snippets_run():
    assert not [each for each in SNIPPETS if each.language == "text" and re.search(r"python|make |launch/", each.text)]
    ran = [each for each in SNIPPETS if each.runs]
    assert {each.language for each in ran} == {"bash", "python", "yaml"} and len(ran) >= 30


@pytest.mark.parametrize(
    ("language", "text", "said"),
    [
        ("yaml", "trainer: {steps: 1, run_dir: x, step: 2}", "trainer.step"),
        ("bash", "launch/single_node.sh config.yaml trainer.step=2", "trainer.step"),
        ("bash", "launch/multi_node.sh config.yaml", "number of nodes"),
        ("bash", "python -m megatron_dypo report runs/none", "runs/none"),
        ("bash", "python tools/prepare_data.py none.jsonl --out x.jsonl", "none.jsonl"),
        ("python", "assert 1 == 2", "assert 1 == 2"),
    ],
)
def test_a_snippet_that_is_wrong_is_seen(language, text, said, tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(SMALLEST))
    for name in ("launch", "tools"):
        (tmp_path / name).symlink_to(ROOT / name)
    with pytest.raises(Exception, match=said):
        run(Snippet("page", language, text), tmp_path)
