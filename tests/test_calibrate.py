"""``plan --calibrate`` recovers the constants behind a run's timings, and reports the error of held-out steps."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, fields, replace
from pathlib import Path

import pytest
import yaml

from megatron_dypo.cli import main
from megatron_dypo.config import load_config
from megatron_dypo.planner.calibrate import Calibration, calibrate
from megatron_dypo.planner.cluster import Candidate, Cluster, StepWorkload, gpu, planned_shape
from megatron_dypo.planner.memory import engine_room, policy_need
from megatron_dypo.planner.rates import Rates
from megatron_dypo.planner.recorded_run import read_run
from megatron_dypo.planner.steptime import step_seconds

STEPS = 31


@dataclass(frozen=True)
class Case:
    """A run's layout, and constants that make its timings. At TP 2 a sync waits for vLLM, at TP 8 for the gathering."""

    hf: str
    layout: Candidate
    made: Rates

    def config(self, run_dir: Path) -> dict:
        return {
            "model": {"hf": self.hf},
            "data": {"train": "prompts.jsonl", "prompts_per_step": 64, "max_prompt_tokens": 600},
            "rollout": {"samples_per_prompt": 8, "max_response_tokens": 4000},
            "parallel": {"tensor": self.layout.tensor, "sequence_parallel": True},
            "optimizer": {"distributed": True},
            "trainer": {"steps": 100, "run_dir": str(run_dir), "offload": self.layout.placement == "turns"},
        }


FITTED = {"train": 0.31, "forward": 0.37, "stream": 0.52, "decode_step": 0.0061}
SMALL = Case(
    "Qwen/Qwen3-4B-Base",
    Candidate(2, 1, 1, 1, 4, "none", "beside", reference="device"),
    Rates(**FITTED, load_tensor=3e-4),
)
LARGE = Case(
    "Qwen/Qwen3-32B", Candidate(8, 1, 1, 1, 1, "none", "turns", reference="device"), Rates(**FITTED, link=0.44)
)
CLUSTER = Cluster(8, 141 * 2**30, gpu("h200"))


def made_run(run_dir: Path, case: Case = SMALL, slower: float = 1.0) -> Path:
    """Write a run folder whose timings are estimates; in the last third they are ``slower`` times as long."""
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text(yaml.safe_dump(case.config(run_dir)))
    (run_dir / "environment.json").write_text(json.dumps({"ranks": 8, "gpu": "NVIDIA H200"}))
    shape, draw, rows = planned_shape(load_config(str(run_dir / "config.yaml"), []).model), random.Random(0), []
    for step in range(1, STEPS + 1):
        response, traces = draw.uniform(300, 2500), draw.uniform(500, 3000)
        mid, hard = draw.randrange(16, 40) / 64, draw.randrange(8, 24) / 64
        work = StepWorkload(
            prompts=64, samples=8, prompt_tokens=300, response_tokens=response, longest=4600, teacher_tokens=traces,
            budget=16384, mid=mid, hard=hard, passes=2, reference="auto",
        )  # fmt: skip
        need = policy_need(shape, case.layout, work)
        need = replace(need, engine=engine_room(shape, case.layout, CLUSTER, need))
        seconds = step_seconds(shape, case.layout, replace(CLUSTER, rates=case.made), work, need)
        times = {name: getattr(seconds, name) for name in ("rollout", "logprob", "update", "sync", "step")}
        times = {f"time/{name}": value * (slower if step > 21 else 1) for name, value in times.items()}
        sampled, taught = 64 * 8 * response, 64 * hard * traces
        tokens = {"perf/tokens_per_second": (sampled + taught) / times["time/step"]}
        share = mid * sampled / (mid * sampled + taught)
        regimes = {"dypo/mid_frac": mid, "dypo/hard_frac": hard, "source_share/rollout": share}
        rows.append({"step": step} | times | tokens | regimes | {"rollout/response_tokens": response})
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run_dir


def calibration(run_dir: Path, case: Case) -> Calibration:
    shape = planned_shape(load_config(str(run_dir / "config.yaml"), []).model)
    run = read_run(run_dir, shape, None)
    assert (replace(run.candidate, sharded=True), run.gpu) == (case.layout, "NVIDIA H200")
    return calibrate(run.steps, shape, run.candidate, CLUSTER)


@pytest.mark.parametrize("case", [SMALL, LARGE], ids=["TP2", "TP8"])
def test_the_constants_that_made_the_timings_are_found(case, tmp_path):
    found = calibration(made_run(tmp_path / "run", case), case)
    for field in fields(Rates):
        assert getattr(found.rates, field.name) == pytest.approx(getattr(case.made, field.name), rel=0.02), field.name
    assert (found.fitted, found.held_out) == (20, 10)
    assert [each.name for each in found.errors] == ["rollout", "logprob", "update", "sync", "step"]
    for each in found.errors:
        assert each.fit < 0.01 and each.held_out < 0.01 < each.before, each


def test_the_error_is_that_of_steps_that_were_not_fitted(tmp_path):
    found = calibration(made_run(tmp_path / "run", slower=1.5), SMALL)
    for each in found.errors:
        assert each.fit < 0.01, each
        assert each.held_out == pytest.approx(1 / 3, abs=0.01), each


def planned(run_dir: Path, *arguments: str) -> int:
    config = run_dir.parent / "config.yaml"
    config.write_text(yaml.safe_dump(SMALL.config(run_dir.parent / "new")))
    return main(["plan", str(config), "--gpus", "8", "--gpu-memory", "141", "--gpu", "h200", *arguments])


def test_the_plan_is_made_with_the_fitted_constants(tmp_path, capsys):
    run_dir = made_run(tmp_path / "run")
    assert planned(run_dir) == 0
    before = capsys.readouterr().out
    assert planned(run_dir, "--calibrate", str(run_dir)) == 0
    after = capsys.readouterr().out
    assert "20 steps fitted, 10 later ones held out" in after
    (line,) = (line.split() for line in after.splitlines() if line.split()[:1] == ["decode_step"])
    assert line == ["decode_step", "0.004", "0.0061"]
    head, _, table = after.partition("Qwen/Qwen3-4B-Base: ")
    assert "error as planned" in head
    assert table.splitlines()[0] == before.removeprefix("Qwen/Qwen3-4B-Base: ").splitlines()[0]
    assert table.splitlines()[2:4] != before.splitlines()[2:4], "other seconds"


def no_file(name: str):
    return lambda run_dir: (run_dir / name).unlink()


def change(name: str, edit):
    def spoil(run_dir: Path) -> None:
        path = run_dir / name
        path.write_text(edit(path.read_text()))

    return spoil


SPOILT = {
    "no folder": (lambda run_dir: run_dir.rename(run_dir.parent / "moved"), "has no config.yaml"),
    "no metrics": (no_file("metrics.jsonl"), "has no metrics.jsonl"),
    "no timings": (change("metrics.jsonl", lambda text: text.replace("time/update", "tame")), "0 steps with timings"),
    "too few steps": (change("metrics.jsonl", lambda text: "\n".join(text.splitlines()[:9]) + "\n"), "8 steps with"),
    "another model": (change("config.yaml", lambda text: text.replace("4B", "8B")), "model (Qwen/Qwen3-8B-Base)"),
    "no ranks": (change("environment.json", lambda text: "{}"), "does not give the number of ranks"),
    "torn": (change("environment.json", lambda text: text[:5]), "not valid JSON"),
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "said"), SPOILT.values(), ids=SPOILT)
def test_a_folder_that_cannot_calibrate_is_refused_in_one_line(spoil, said, tmp_path, capsys):
    run_dir = made_run(tmp_path / "run")
    spoil(run_dir)
    assert planned(run_dir, "--calibrate", str(run_dir)) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.strip().splitlines()
    assert said in line and str(run_dir) in line and not captured.out
