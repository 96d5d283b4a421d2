"""Run whole training runs as a user would: the quickstart's first steps, and a run that is stopped and resumed."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.gpu_report import child
from benchmarks.gpu_report.engine import QUICKSTART, shared_engine
from benchmarks.gpu_report.results import Record
from benchmarks.machine import ROOT

STEPS, TINY_STEPS = 30, 10
NOT_COMPARED = ("time/", "perf/")  # of metrics
SMALL = ("data.prompts_per_step=8", "data.max_tokens_per_microbatch=1024")  # on a CPU


def metrics_of(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def quickstart(record: Record) -> None:
    """Run the quickstart in this process, so that with ``--tiny`` it shares the engine of the other stages."""
    from megatron_dypo.config.load import load_config
    from megatron_dypo.preflight import check_inputs
    from megatron_dypo.trainer import train

    steps = TINY_STEPS if record.tiny else STEPS
    with tempfile.TemporaryDirectory(prefix="gpu_report_run_") as folder:
        overrides = [f"trainer.steps={steps}", f"trainer.run_dir={folder}/run", "trainer.offload=true"]
        overrides += ["trainer.eval_every=0", "trainer.save_every=0", *(SMALL if record.tiny else ())]
        config = load_config(str(QUICKSTART), overrides)
        inputs = check_inputs(config, str(QUICKSTART))
        _forget_groups()
        began = time.time()
        train(config, inputs, lambda config, shape, tokenizer, *_: shared_engine(config, shape, tokenizer.end_ids))
        total = time.time() - began
        lines = [line for line in metrics_of(Path(folder) / "run") if line["step"] > 0]
    record.figure("steps", len(lines), "", "steps")
    record.figure("seconds", total, "s", "all of it, vLLM's start included")
    record.figure("start", began - child.BEGAN, "s", "from the start of the process to the run's")
    for key in ("step", "rollout", "logprob", "update", "sync", "offload"):
        record.figure(f"time/{key}", median(line[f"time/{key}"] for line in lines), "s", f"`time/{key}`, median")
    updates = [line["time/update"] for line in lines]
    record.figure("first_update", updates[0], "s", "first update")
    record.figure("first_over_tenth", updates[0] / updates[9], "x", "first update, of the tenth's time")
    for key in ("reward/mean", "rollout/mismatch_mean", "loss/total"):
        if known := [(line["step"], line[key]) for line in lines if line.get(key) is not None]:
            said = ", ".join(f"{value:.4g} at step {step}" for step, value in known[:1] + known[-1:])
            record.note(f"`{key}`: {said}.")
    if len(lines) != steps:
        record.fail(f"{len(lines)} of {steps} steps were taken")
    if skipped := lines[-1].get("train/skipped_steps"):
        record.fail(f"{skipped:g} steps were skipped")


def _forget_groups() -> None:
    """Destroy the process groups of an earlier stage in this process."""
    from megatron.core import parallel_state as mpu

    if mpu.model_parallel_is_initialized():
        mpu.destroy_model_parallel()


def deterministic(record: Record) -> None:
    """Compare a full run with one resumed, in a new process, from the full run's first checkpoint."""
    half, steps = (1, 2) if record.tiny else (2, 4)
    with tempfile.TemporaryDirectory(prefix="gpu_report_run_") as name:
        folder = Path(name)
        whole, resumed = folder / "whole", folder / "resumed"
        spent = [_train(whole, half, steps, record.tiny)]
        shutil.copytree(whole, resumed)
        shutil.rmtree(resumed / f"checkpoints/step_{steps}")
        spent.append(_train(resumed, half, steps, record.tiny))
        lines = {run.name: [_compared(line) for line in metrics_of(run)] for run in (whole, resumed)}
        digests = {run.name: _digest(run / f"checkpoints/step_{steps}") for run in (whole, resumed)}
    for what, seconds in zip(("whole run", "resumed run"), spent, strict=True):
        record.figure(what.replace(" ", "_"), seconds, "s", f"{what}, start included")
    for key, what, found in (
        ("metrics", f"metrics of steps 1 to {steps}", lines),
        ("bits", f"weights and optimizer state of checkpoint {steps}", digests),
    ):
        same = found["whole"] == found["resumed"]
        record.figure(key, same, "", f"{what}: equal bit for bit")
        if not same:
            record.fail(f"the resumed run has other {what}")


def _compared(line: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if not name.startswith(NOT_COMPARED)}


def _train(run_dir: Path, half: int, steps: int, tiny: bool) -> float:
    """Train; return the seconds. Transformers samples: two starts of vLLM would dominate the time."""
    overrides = [f"trainer.run_dir={run_dir}", f"trainer.steps={steps}", f"trainer.save_every={half}"]
    overrides += ["trainer.deterministic=true", "trainer.eval_every=0", "rollout.engine=transformers"]
    overrides += ["data.prompts_per_step=8", *(SMALL if tiny else ())]
    began = time.time()
    command = [sys.executable, "-m", "megatron_dypo", "train", str(QUICKSTART), *overrides]
    subprocess.run(command, cwd=ROOT, check=True)
    return time.time() - began


def _digest(folder: Path) -> str:
    """Return a digest of every file of a checkpoint that holds tensors."""
    hashed = hashlib.sha256()
    for file in sorted(folder.rglob("*.distcp")):
        hashed.update(file.name.encode() + file.read_bytes())
    return hashed.hexdigest()
