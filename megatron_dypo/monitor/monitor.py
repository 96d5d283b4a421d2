"""Rank 0's record of a run: metrics file, loggers, progress, final summary and report. Does nothing on other ranks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from megatron_dypo.config.schema import Config
from megatron_dypo.errors import UserError
from megatron_dypo.monitor.health import Health
from megatron_dypo.monitor.loggers import Writers
from megatron_dypo.monitor.metrics_file import MetricsFile
from megatron_dypo.monitor.progress import Progress, summary
from megatron_dypo.monitor.report import write_report
from megatron_dypo.runtime.distributed import Layout


class Monitor:
    """A context manager around the loop. Every method may be called on every rank; only rank 0 writes.

    During training no failure here ends the run: a full disk or a lost logger is a warning.
    """

    def __init__(self, config: Config, layout: Layout, start_step: int):
        self.config, self.run_dir = config, Path(config.trainer.run_dir)
        self._active, self._start_step, self._began = layout.is_main, start_step, time.monotonic()
        self._failing: set[str] = set()
        self._health = Health()

    def __enter__(self) -> Self:
        if self._active:
            self._file = MetricsFile(self.run_dir / "metrics.jsonl", self._start_step)
            for line in self._file.rows():  # lines before a resume
                self._health.check(line["step"], line)
            self._writers = Writers(self.config, self.run_dir, self._start_step)
            self._progress = Progress(self.config.trainer.steps, self._start_step)
            if self._start_step:
                done = self._start_step >= self.config.trainer.steps
                what = "is complete; nothing left to train" if done else f"resumes after step {self._start_step}"
                self._progress.log(f"{self.run_dir} {what}")
        return self

    def __exit__(self, *exception: object) -> None:
        if self._active:
            with self._tolerated("metrics"):
                self._file.close()
            self.notice(self._writers.close())
            self._progress.close()

    def notice(self, lines: list[str]) -> None:
        for line in lines:
            self.say(f"warning: {line}")

    def say(self, line: str) -> None:
        if self._active:
            self._progress.log(line)

    def write(self, step: int, metrics: dict) -> None:
        """Write one line of metrics; ``step`` 0 is the evaluation before training."""
        if self._active:
            with self._tolerated("metrics"):
                self._file.write(step, metrics)
            self.notice(self._writers.write(step, metrics))

    def step(self, step: int, metrics: dict) -> None:
        """Write and show a finished step. ``metrics`` includes its ``tokens``, and the active ``devices``."""
        if not self._active:
            return
        speed = metrics["tokens"] / metrics["time/step"]
        each = {"perf/tokens_per_second": speed, "perf/tokens_per_second_per_gpu": speed / metrics["devices"]}
        metrics = {name: value for name, value in metrics.items() if name not in ("tokens", "devices")} | each
        found = self._health.check(step, metrics)
        metrics["train/warnings"] = self._health.said.total()
        self.write(step, metrics)
        self._progress.update(step, metrics)
        self.notice(found)

    def finish(self, held_out: int) -> None:
        """Write the report and print the final summary. ``held_out``: number of evaluation problems."""
        if not self._active:
            return
        self._progress.close()
        with self._tolerated("metrics"):
            self._file.flush()
        report = "not written"
        with self._tolerated("report"):
            report = str(write_report(self.run_dir))
        rows = summary_rows(self._file.rows(), held_out)
        if said := self._health.said:
            rows.append(("warnings", ", ".join(f"{name} {times}" for name, times in said.items())))
        minutes, seconds = divmod(round(time.monotonic() - self._began), 60)
        summary(
            [*rows, ("wall time", f"{minutes} min {seconds:02d} s"), ("report", report)], f"{self.run_dir} finished"
        )

    @contextmanager
    def _tolerated(self, what: str) -> Iterator[None]:
        """Turn an error in writing ``what`` into a warning, given once until it works again."""
        try:
            yield
        except (OSError, UserError) as error:
            if what not in self._failing:
                self._failing.add(what)
                self.notice([f"{what} not written, training continues: {error}"])
        else:
            if what in self._failing:
                self._failing.remove(what)
                self._progress.log(f"{what} written again, nothing is missing")


def summary_rows(metrics: list[dict], held_out: int) -> list[tuple[str, str]]:
    """Summarise a run from its metrics file, first against last."""
    steps = [line for line in metrics if line["step"] > 0]
    if not steps:
        return []
    tail = steps[-max(1, len(steps) // 10) :]

    def mean(lines: list[dict], name: str) -> float | None:
        values = [line[name] for line in lines if line.get(name) is not None]
        return sum(values) / len(values) if values else None

    def change(label: str, name: str, form: str = "{:.2f}") -> tuple[str, str] | None:
        first, last = mean(steps[:5], name), mean(tail, name)
        if first is None and last is None:
            return None
        shown = ["-" if value is None else form.format(value) for value in (first, last)]
        return label, f"{shown[0]} (first 5 steps) -> {shown[1]} (last tenth)"

    rows = [
        ("steps", str(steps[-1]["step"])),
        change("mean reward", "reward/mean"),
        change("offline ratio", "dypo/offline_ratio"),
        *(change(f"{name} groups", f"dypo/{name}_frac", "{:.0%}") for name in ("easy", "mid", "hard")),
        change("response tokens", "rollout/response_tokens", "{:.1f}"),
        change("tokens per second", "perf/tokens_per_second", "{:.0f}"),
    ]
    for name, label, problems in _evaluations(metrics, held_out):
        evaluations = [line for line in metrics if line.get(name) is not None]
        first, last = (f"{line[name]:.1%} (step {line['step']})" for line in (evaluations[0], evaluations[-1]))
        rows.append((label, f"{first} -> {last}{problems}"))
    skipped = steps[-1].get("train/skipped_steps")
    if skipped:
        rows.append(("skipped steps", str(skipped)))
    return [row for row in rows if row is not None]


def _evaluations(metrics: list[dict], held_out: int) -> list[tuple[str, str, str]]:
    """Return (metric, its name in the summary, number of problems) of each evaluation's accuracy."""
    names = sorted({name for line in metrics for name in line if name.startswith("eval/")})
    suites = [name for name in names if name.endswith("/pass@1") or "/avg@" in name]
    found = [(name, name.removeprefix("eval/").replace("/", " "), "") for name in suites]
    if "eval/valid/greedy_accuracy" in names:
        found.insert(0, ("eval/valid/greedy_accuracy", "held-out greedy accuracy", f", {held_out} problems"))
    return found
