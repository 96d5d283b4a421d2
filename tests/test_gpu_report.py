"""``make gpu-report``: the runner, what it keeps, the page; and every stage of trainer and engine, tiny, on the CPU."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu_report import stages as table
from benchmarks.gpu_report.__main__ import chosen, git_commit
from benchmarks.gpu_report.page import page, shown
from benchmarks.gpu_report.published import OPEN, README, ROWS, STATUS, performance, with_gpu_column, with_ticks
from benchmarks.gpu_report.results import ABSENT, DONE, FAILED, Record, merged, report_file
from benchmarks.gpu_report.runner import Machine, Runner
from benchmarks.gpu_report.stages import PARTS, STAGES, Stage
from benchmarks.gpu_report.targets import NOT_MEASURED, TARGETS, verdict
from benchmarks.machine import RESULTS, ROOT
from megatron_dypo.errors import UserError

HERE = Machine("NVIDIA Test", 1)
COMMAND = [sys.executable, "-m", "benchmarks.gpu_report"]
AGREEMENTS = [name for name in STAGES if name.startswith("agreement_")]

# --- the table


def test_every_stage_is_in_a_part_and_every_target_is_of_a_stage():
    assert all(stage.part in PARTS and callable(stage.function) for stage in STAGES.values())
    assert all(target.stage in STAGES for target in TARGETS)
    assert {stage for stages in ROWS.values() for stage in stages or ()} <= STAGES.keys()


@pytest.mark.parametrize("name", [name for name in STAGES if name.startswith("update_")])
def test_updates_at_real_shapes_fit_an_h200(name):
    """Compare ``plan``'s prediction, including the reserve, with an H200's 139 GiB."""
    from benchmarks.gpu_report.update import planned_need
    from benchmarks.gpu_report.workload import real_batch, update_config
    from megatron_dypo.models.shape import model_shape

    options = STAGES[name].options
    batch = real_batch(options["budget"])
    config = update_config(options["model"], batch, tiny=False)
    assert planned_need(model_shape(config.model), config, batch).policy < 139 * 2**30


# --- the runner, with stages of this file


def two_figures(record: Record) -> None:
    record.figure("one", 1.5, "s", "first")
    record.figure("two", True, "", "second")
    record.table("A table", ["a | b"], [["x | y"]])
    record.note("a note")


def leave_behind(file: str) -> None:
    """Leave a process in a session of its own, as a server does."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    Path(file).write_text(str(child.pid))


def raises(record: Record) -> None:
    record.figure("before", 1, "", "before it went wrong")
    leave_behind(record.options["left"])
    raise RuntimeError("the reason")


def hangs(record: Record) -> None:
    record.figure("before", 1, "", "before it hung")
    leave_behind(record.options["left"])
    time.sleep(600)


def notes_a_failure(record: Record) -> None:
    record.fail("a bound is exceeded")
    record.figure("after", 1, "", "it went on")


@pytest.fixture
def stages(monkeypatch, tmp_path) -> dict[str, Stage]:
    """Run in separate processes, which read the table from the plugin module written here."""
    found = {
        "good": Stage("good", "trainer", 60, "", "Good"),
        "raising": Stage("raising", "trainer", 60, "", "Raises", options={"left": str(tmp_path / "raised")}),
        "hanging": Stage("hanging", "trainer", 12, "", "Hangs", options={"left": str(tmp_path / "hung")}),
        "noting": Stage("noting", "trainer", 60, "", "Notes"),
        "lacking": Stage("lacking", "engine", 60, "", "Lacks", ("json", "no_package.at_all")),
        "wide": Stage("wide", "many", 60, "", "Wide", gpus=2),
    }
    functions = {"good": "two_figures", "raising": "raises", "hanging": "hangs", "noting": "notes_a_failure"}
    (tmp_path / "sitecustomize.py").write_text(
        "import dataclasses\n"
        "from benchmarks.gpu_report import stages\n"
        "from tests import test_gpu_report as own\n"
        "class Own(stages.Stage):\n"
        "    function = property(lambda self: getattr(own, self.run))\n"
        f"for each in {[dataclasses.asdict(s) | {'run': functions.get(n, '')} for n, s in found.items()]!r}:\n"
        "    stages.STAGES[each['name']] = Own(**each)\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    for name, stage in found.items():
        monkeypatch.setitem(table.STAGES, name, stage)
    return found


def run(tmp_path: Path, chosen: list[Stage], **options) -> tuple[int, dict]:
    """Return (exit code, report)."""
    file = report_file(tmp_path / "out", HERE.gpu)
    runner = Runner(file, HERE, options.get("commit", "c0ffee"), tiny=options.get("tiny", False))
    code = runner.run(chosen)
    return code, json.loads(file.read_text())


def is_running(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_a_stage_that_fails_hangs_or_lacks_a_package_stops_no_other_and_the_code_is_1(stages, tmp_path, capfd):
    code, report = run(tmp_path, [stages[name] for name in ("raising", "hanging", "lacking", "wide", "good")])
    found = report["stages"]
    assert code == 1
    assert {name: each["state"] for name, each in found.items()} == {
        "raising": FAILED, "hanging": FAILED, "good": DONE, "lacking": ABSENT, "wide": ABSENT
    }  # fmt: skip
    assert found["raising"]["says"] == "ended with exit code 1: RuntimeError: the reason"
    assert found["hanging"]["says"] == "stopped after 12 s, its deadline"
    assert found["lacking"]["says"] == "no_package.at_all is not installed"
    assert found["wide"]["says"] == "needs 2 GPUs"
    assert found["raising"]["figures"]["before"]["value"] == found["hanging"]["figures"]["before"]["value"] == 1
    assert found["good"]["figures"]["one"] == {"label": "first", "value": 1.5, "unit": "s"}
    assert all(each["commit"] == "c0ffee" and each["date"] for each in found.values())
    assert "torch" in found["good"]["versions"] and found["good"]["hardware"]
    for name in ("raised", "hung"):
        assert not is_running(int((tmp_path / name).read_text())), "what a stage starts ends with it"
    said = capfd.readouterr().out
    assert "failed  raising" in said and "absent  lacking" in said and "done    good" in said


def test_what_is_absent_or_done_is_no_failure_and_a_noted_failure_is_one(stages, tmp_path):
    assert run(tmp_path, [stages["lacking"], stages["wide"], stages["good"]])[0] == 0
    code, report = run(tmp_path, [stages["noting"]])
    assert code == 1 and report["stages"]["noting"]["state"] == FAILED
    assert report["stages"]["noting"]["figures"].keys() == {"after"}
    assert report["stages"]["good"]["state"] == DONE, "what is not measured again is kept"


def test_a_part_ends_with_its_time_and_says_what_it_left_out(stages, tmp_path, monkeypatch):
    monkeypatch.setitem(PARTS, "trainer", 3)
    code, report = run(tmp_path, [dataclasses.replace(stages["hanging"], seconds=60), stages["good"]])
    assert code == 1
    assert re.search("stopped after [23] s, its deadline", report["stages"]["hanging"]["says"])  # or before it began
    assert report["stages"]["good"]["says"] == "not run: the part's time was over; measure it alone with ONLY=good"


def test_the_last_stage_of_a_part_may_take_all_that_is_left(stages, tmp_path, monkeypatch):
    """A stage named by ``ONLY`` may need more than its deadline among the others."""
    given = {}
    monkeypatch.setattr(Runner, "_measure", lambda self, group, seconds: given.update({group[0].name: seconds}) or {})
    Runner(report_file(tmp_path, HERE.gpu), HERE, "c", False).run(
        [stages["hanging"], stages["good"], stages["lacking"]]
    )
    assert given["hanging"] == 12 and given["good"] == pytest.approx(PARTS["trainer"], abs=5)


def test_a_stopped_runner_ends_its_stage_and_keeps_what_is_finished(stages, tmp_path):
    script = (
        "import dataclasses; from benchmarks.gpu_report.__main__ import *;"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143));"
        "stages = [STAGES['good'], dataclasses.replace(STAGES['hanging'], seconds=90)];"
        "Runner(Path(sys.argv[1]), Machine('NVIDIA Test', 1), 'c', False).run(stages)"
    )
    file = report_file(tmp_path / "out", HERE.gpu)
    runner = subprocess.Popen([sys.executable, "-c", script, str(file)], cwd=ROOT)
    deadline = time.monotonic() + 60
    while not (tmp_path / "hung").exists():
        assert time.monotonic() < deadline and runner.poll() is None
        time.sleep(0.1)
    runner.send_signal(signal.SIGTERM)
    assert runner.wait(20) == 143
    report = json.loads(file.read_text())
    assert report["stages"].keys() == {"good"} and file.with_suffix(".md").exists()
    time.sleep(0.2)
    assert not is_running(int((tmp_path / "hung").read_text()))


# --- results and page


def stage_of(commit: str, state: str = DONE, date: str = "2026-11-30 02:00", **figures: float) -> dict:
    shown = {name.replace("__", "/"): {"label": name, "value": value, "unit": "x"} for name, value in figures.items()}
    empty = {"says": "", "seconds": 1.0, "versions": {"torch": "2.11"}, "hardware": "a GPU", "tables": [], "notes": []}
    return empty | {"state": state, "commit": commit, "date": date, "figures": shown}


REPORT = {
    "gpu": "NVIDIA H200",
    "measured": True,
    "stages": {
        "head": stage_of("aaa", t32768_100__over_products=1.18, t32768_100__memory=1.5),
        "update_1.5b": stage_of("aaa", mfu__training=52.0, mfu__update=34.0),
    },
}


def test_a_stage_measured_again_alone_replaces_itself_and_the_page_says_which_is_older():
    again = merged(REPORT, {"head": stage_of("bbb", date="2026-12-01 09:00", t32768_100__over_products=1.04)})
    assert again["stages"]["head"]["commit"] == "bbb" and again["stages"]["update_1.5b"]["commit"] == "aaa"
    rows = {line.split(" | ")[0]: line for line in page(again).splitlines() if line.startswith("| `")}
    assert "bbb | 2026-12-01 09:00" in rows["| `head`"]
    assert "aaa (an earlier commit) | 2026-11-30 02:00" in rows["| `update_1.5b`"]


def test_a_stage_that_cannot_run_here_leaves_what_was_measured():
    assert merged(REPORT, {"head": stage_of("bbb", ABSENT)}) == REPORT
    assert merged(REPORT, {"head": stage_of("bbb", FAILED)})["stages"]["head"]["state"] == FAILED


def test_a_target_is_met_missed_by_its_share_or_not_measured():
    said = {(target.stage, target.figure): verdict(target, REPORT) for target in TARGETS}
    assert said["head", "t32768_100/over_products"] == "**missed by 12.4%**"
    assert said["head", "t32768_100/memory"] == "met"
    assert said["update_1.5b", "mfu/training"] == "met"
    assert said["update_1.5b", "mfu/update"] == "**missed by 24.4%**"
    assert said["engine", "sync"] == NOT_MEASURED
    tiny = REPORT | {"measured": False}
    assert {verdict(target, tiny) for target in TARGETS} == {NOT_MEASURED}


def test_values_are_shown_with_their_units():
    assert [shown(1543656960, ""), shown(15867, "tokens/s"), shown(0.0081, "s"), shown(True, ""), shown("a|b", "")] == [
        "1,543,656,960", "15,867 tokens/s", "0.0081 s", "yes", "a\\|b"
    ]  # fmt: skip
    assert shown(98.56, "%") == "98.6 %" and shown(4.2e-6, "nats") == "4.2e-06 nats"


# --- what README, docs/status.md and benchmarks/README.md say


def test_the_pages_show_what_gpus_gave():
    readme, status = README.read_text(), STATUS.read_text()
    assert with_gpu_column(status, RESULTS) == status, "run `python -m benchmarks.tables`"
    assert with_ticks(readme, RESULTS) == readme, "run `python -m benchmarks.tables`"
    if not list(RESULTS.glob("gpu_report_*.json")):
        assert status.count(OPEN) == sum(stages is not None for stages in ROWS.values())
        assert "| open |" in readme and "| ✓ | ✓ |" not in readme


def test_a_gpu_s_results_appear_in_the_pages_and_a_cpu_s_never(tmp_path):
    failed = REPORT | {"stages": REPORT["stages"] | {"tests": stage_of("aaa", FAILED)}}
    report_file(tmp_path, "NVIDIA H200").write_text(json.dumps(failed))
    report_file(tmp_path, "CPU").write_text(json.dumps(failed | {"measured": False, "gpu": "CPU"}))
    written = with_gpu_column(STATUS.read_text(), tmp_path)
    assert "| H200 (`benchmarks/results/gpu_report_h200.md`): `tests` **failed** |" in written
    assert "| H200 (`benchmarks/results/gpu_report_h200.md`): `update_1.5b` done |" in written
    assert "CPU)" not in written.partition("<!-- gpu column -->")[2].partition("<!-- end gpu column -->")[0]
    section = performance(tmp_path)
    assert "### NVIDIA H200" in section and "**missed by 12.4%**" in section and "### CPU" not in section


def test_readme_ticks_what_all_its_stages_have_shown_on_a_gpu(tmp_path):
    def cells(**states: str) -> list[str]:
        stages = {name: stage_of("aaa", state) for name, state in states.items()}
        report_file(tmp_path, "NVIDIA H200").write_text(json.dumps(REPORT | {"stages": stages}))
        (row,) = [line for line in with_ticks(README.read_text(), tmp_path).splitlines() if line.startswith("| vLLM")]
        return row.split(" | ")[2:]

    one = {"engine": DONE, "agreement_model": DONE}
    assert cells(**one) == ["open", "open |"]
    assert cells(**one, quickstart=DONE) == ["✓", "open |"]
    assert cells(**one, quickstart=DONE, server_nccl=FAILED) == ["✓", "failed |"]


def test_a_row_of_the_status_page_that_no_stage_is_named_for_is_an_error(tmp_path):
    text = STATUS.read_text().replace("| bf16 training |", "| fp4 training |")
    with pytest.raises(ValueError, match=r"0 of ROWS are the row \| fp4 training"):
        with_gpu_column(text, tmp_path)


# --- the command


def test_bad_input_is_one_line_and_code_2():
    for arguments, line in (
        (["--only", "heads"], "--only: no stage is called heads; there are environment, attention,"),
        ([], "torch sees no CUDA device here"),
    ):
        ran = subprocess.run([*COMMAND, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert (ran.returncode, ran.stderr.count("\n")) == (2, 1), ran.stderr
        assert ran.stderr.startswith(f"gpu_report: {line}")


def test_stages_of_no_part_that_is_run_are_bad_input():
    assert [stage.name for stage in chosen("engine", "head,engine", tiny=False)] == ["engine"]
    for part, only, tiny in (("trainer", "engine,quickstart", False), (None, "layouts", True)):
        with pytest.raises(UserError, match=f"--only: {only} is in no part"):
            chosen(part, only, tiny)


def test_a_machine_without_git_measures_an_unknown_commit(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_commit() == "unknown"


def cpu_seconds_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_every_stage_of_trainer_and_engine_runs_on_the_cpu_into_one_page(tmp_path):
    """The two parts run concurrently into the same files; in under 90 s, so each of them in fewer CPU-seconds."""
    before = cpu_seconds_of_children()
    runs = [
        subprocess.Popen(
            [*COMMAND, "--tiny", "--part", part, "--out", str(tmp_path)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for part in ("trainer", "engine")
    ]
    said = [each.communicate(timeout=300)[0] for each in runs]
    assert [each.returncode for each in runs] == [0, 0], "\n".join(said)
    report = json.loads((tmp_path / "gpu_report_cpu.json").read_text())
    expected = {stage.name for stage in STAGES.values() if stage.part in ("trainer", "engine")}
    assert {name for name, found in report["stages"].items() if found["state"] == DONE} == expected
    assert all(found["figures"] for found in report["stages"].values())
    written = (tmp_path / "gpu_report_cpu.md").read_text()
    assert written.startswith("# GPU report: CPU, no measurement\n")
    assert "missed" not in written and written.count(f"| {NOT_MEASURED} | {NOT_MEASURED} |") == len(TARGETS)
    assert cpu_seconds_of_children() - before < 90


def test_tiny_stages_and_the_quickstart_share_one_engine(tmp_path):
    from benchmarks.gpu_report.engine import EOS, QUICKSTART, engine_key, rollout_config
    from megatron_dypo.config.load import load_config
    from megatron_dypo.models.shape import model_shape

    record = Record(tmp_path / "found.json", {}, True, time.time(), {})
    configs = [rollout_config(record, "qwen3-4b", **STAGES[name].options)[0] for name in AGREEMENTS]
    configs.append(load_config(str(QUICKSTART), ["trainer.offload=true"]))
    assert len({engine_key(config, model_shape(config.model), (EOS,)) for config in configs}) == 1
    configs[0].rollout.max_response_tokens = 64
    assert len({engine_key(config, model_shape(config.model), (EOS,)) for config in configs}) == 2


@pytest.mark.faults
@pytest.mark.parametrize(
    ("name", "options", "figures"),
    [
        ("layouts", {}, {"DP 2, distributed optimizer/fp32", "EP 2/fp32"}),
        ("server_nccl", {"way": "shared_memory", "ranks": 2}, {"start", "sync"}),
    ],
)
def test_stages_of_two_gpus_run_on_two_cpu_ranks(name, options, figures, tmp_path):
    """Run over gloo, with shared memory in place of NCCL."""
    record = Record(tmp_path / "found.json", options, True, time.time(), {})
    STAGES[name].function(record)
    record.finish()
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["state"] == DONE and found["figures"].keys() >= figures, found


# --- the tests that this machine cannot run


def test_fork_server_s_preload_asks_for_a_device_without_starting_cuda():
    """cudaGetDeviceCount would: a rank forked after it cannot use CUDA."""
    script = (
        "import torch, torch.cuda as cuda; asked = [];"
        "cuda._is_compiled = lambda: True; cuda._device_count_nvml = lambda: 1;"
        "torch._C._cuda_getDeviceCount = lambda: asked.append(1) or 1; torch._C._cuda_getCurrentRawStream = None;"
        "import tests.rank_preload; print(cuda.is_available(), asked)"
    )
    ran = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ran.stdout.split("\n")[-2] == "True []", ran.stdout + ran.stderr


def test_gpu_tests_are_collected_without_the_packages_that_only_other_tests_need(tmp_path):
    """This also holds without .venv, where ``make test-gpu`` uses PYTHON."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nfor name in ('hypothesis', 'xdist', 'aiohttp', 'yaml_of_tests', 'reasoning_gym', 'math_verify'):\n"
        "    sys.modules[name] = None\n"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "VENV": str(tmp_path / "none"), "PYTHON": sys.executable}
    environment |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    ran = subprocess.run(["make", "test-gpu"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0 and "skipped" in ran.stdout, ran.stdout + ran.stderr
