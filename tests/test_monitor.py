"""The run's views: metrics file, loggers, progress and report."""

from __future__ import annotations

import io
import json
import math
import os
import random
import re
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import wandb
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from megatron_dypo.config.schema import Config
from megatron_dypo.errors import UserError
from megatron_dypo.monitor.chart import rolling, thin
from megatron_dypo.monitor.loggers import Writers
from megatron_dypo.monitor.metrics_file import MetricsFile, read_metrics
from megatron_dypo.monitor.progress import Progress, summary
from megatron_dypo.monitor.report import write_report
from megatron_dypo.training.metrics import SHARE_KEYS

KEYS = [
    f"{family}/{name}"
    for family, names in {
        "loss": "total grpo gal sft kl",
        "train": "grad_norm lr skipped_steps empty_steps warnings",
        "reward": "mean",
        "dypo": "easy_frac mid_frac hard_frac offline_ratio hard_without_teacher",
        "gal": "eta spread saturated_frac",
        "grad_share": "grpo gal sft",
        "policy": "entropy clip_frac",
        "rollout": "mismatch_mean mismatch_max mismatch_kl staleness_mean staleness_max corrected_frac "
        "response_tokens truncated_frac",
        "rollout/mismatch_share": "0 1e-06 1e-05 0.0001 0.001 0.01 0.1 1",
        "time": "rollout reward logprob update sync step",
        "perf": "tokens_per_second host_memory_gib device_memory_gib",
    }.items()
    for name in names.split()
]
TITLES = """
Regimes, Reward, Held-out evaluation, Losses, Gradient shares, Gradient norm, Policy entropy, Clip fraction, GAL pairs,
GAL spread, Learning rate, Left out, Warnings, Trainer / rollout mismatch, Mismatch by size, Staleness,
Rollout correction, Response length, Truncated responses, Time per phase, Peak memory, Throughput
"""
ESCAPE = "\x1b"


def fill(run_dir: Path, steps: int, every: int = 10, drop: tuple[str, ...] = (), value: float | None = 0.5) -> Path:
    """Write a run folder with ``steps`` noisy steps around ``value`` (None: null), evaluated each ``every`` steps."""
    draw = random.Random(0)
    run_dir.mkdir(parents=True, exist_ok=True)
    rows = [{"step": 0, "eval/valid/greedy_accuracy": 0.125}]
    for step in range(1, steps + 1):
        noisy = None if value is None else value * (1 + draw.gauss(0, 0.1))
        row = {key: noisy for key in KEYS if key not in drop}
        if step % every == 0:
            row["eval/valid/greedy_accuracy"] = 0.75
        rows.append({"step": step, **row})
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run_dir


def config(run_dir: Path, **logging: object) -> Config:
    return Config(
        model={"preset": "tiny"},
        data={"train": "x.jsonl"},
        trainer={"steps": 1, "run_dir": str(run_dir)},
        logging=logging,
    )


class Outline(HTMLParser):
    """Tags, attributes and text of a page; checks that every element is closed properly."""

    VOID = ("meta", "br", "wbr")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.data: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes.update(name for name, _ in attrs)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open:
            self.data.setdefault(self.open[-1], []).append(data)


# ---------------------------------------------------------------------------------------------------- metrics.jsonl


def test_metrics_are_strict_json_and_read_back(tmp_path):
    file = MetricsFile(tmp_path / "run" / "metrics.jsonl", resume_step=0)
    file.write(1, {"loss/total": float("nan"), "a": float("inf"), "b": np.float32(0.5), "c": 3, "d": None})
    line = file.path.read_text()  # on disk before the file is closed
    file.close()
    strict = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert strict == {"step": 1, "loss/total": None, "a": None, "b": 0.5, "c": 3, "d": None}
    assert next(iter(strict)) == "step"
    assert read_metrics(file.path) == [strict]


def test_steps_only_go_forward(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl", resume_step=0)
    file.write(0, {"eval/valid/greedy_accuracy": 0.1})
    file.write(1, {})
    with pytest.raises(ValueError, match="step 1 does not follow step 1"):
        file.write(1, {})
    file.close()


@pytest.mark.parametrize("torn", ["", '{"step": 6, "loss', '{"step": 6', "\0\0\0"])
def test_resume_cuts_back_to_the_checkpoint(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step, "x": step / 3}) + "\n" for step in range(6)) + torn)
    assert [row["step"] for row in read_metrics(path)] == [0, 1, 2, 3, 4, 5]
    file = MetricsFile(path, resume_step=3)
    assert file.last_step == 3
    file.write(4, {"x": 0.0})
    file.close()
    assert [row["x"] for row in read_metrics(path)] == [0.0, 1 / 3, 2 / 3, 1.0, 0.0]
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_fresh_start_empties_the_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n')
    MetricsFile(path, resume_step=0).close()
    assert read_metrics(path) == []


def test_damage_that_no_kill_explains_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"ste\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 2 "):
        read_metrics(path)


# ---------------------------------------------------------------------------------------------------- loggers


def test_no_writer_is_on_by_default(tmp_path):
    writers = Writers(config(tmp_path), tmp_path)
    assert writers.write(1, {"reward/mean": 0.5}) == []
    assert writers.close() == []
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def own_wandb_service() -> Iterator[None]:
    """End wandb's service process with the test: later tests' launches would find and share it."""
    yield
    wandb.teardown()
    assert "WANDB_SERVICE" not in os.environ


@pytest.mark.usefixtures("own_wandb_service")
def test_wandb_offline_and_its_resume_share_one_run(tmp_path, monkeypatch):
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # no listener: network use would be an error or a wait
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    run_dir = tmp_path / "run"
    for resume_step in (0, 1):
        writers = Writers(config(run_dir, wandb="offline", wandb_project="p"), run_dir, resume_step)
        writers.write(resume_step + 1, {"reward/mean": 0.5, "loss/total": float("nan"), "gal/eta": None})
        writers.close()
        time.sleep(1.0 if resume_step == 0 else 0.0)  # wandb names its folders by the second
    run_id = (run_dir / "wandb_id").read_text().strip()
    logs = list((run_dir / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb"))
    assert len(logs) == 2
    for log in logs:
        deadline = time.monotonic() + 30  # wandb's service may still be writing after `finish` has returned
        while b"reward/mean" not in log.read_bytes():
            assert time.monotonic() < deadline, "not in the log"
            time.sleep(0.1)
        assert b"loss/total" not in log.read_bytes()


def test_wandb_online_without_credentials_is_one_line_and_no_prompt(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"logging\.wandb: .*WANDB_API_KEY"):
        Writers(config(tmp_path, wandb="online"), tmp_path)


def test_tensorboard_events_read_back(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writers = Writers(config(tmp_path, tensorboard=True), tmp_path)
    for step in (1, 2, 3):
        writers.write(step, {"step": step, "reward/mean": step / 4, "gal/eta": None, "loss/total": math.inf})
    writers.close()
    resumed = Writers(config(tmp_path, tensorboard=True), tmp_path, resume_step=2)
    resumed.write(3, {"reward/mean": 1.0})
    resumed.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tags()["scalars"] == ["reward/mean"]
    assert [(event.step, event.value) for event in events.Scalars("reward/mean")] == [(1, 0.25), (2, 0.5), (3, 1.0)]


def test_a_logger_that_fails_is_let_go_and_the_others_go_on(tmp_path):
    writers = Writers(config(tmp_path, tensorboard=True), tmp_path)
    failing, *_ = writers._writers
    failing._events.close()  # as when its thread has died
    failing._events = None
    survivor = Writers(config(tmp_path / "other", tensorboard=True), tmp_path / "other")
    writers._writers += survivor._writers
    (line,) = writers.write(7, {"reward/mean": 0.5})
    assert line.startswith("TensorBoard failed and is dropped at step 7, training continues: AttributeError")
    assert writers.write(8, {"reward/mean": 0.5}) == [] and writers.close() == []
    (events,) = (tmp_path / "other" / "tensorboard").iterdir()
    assert events.read_bytes().count(b"\x0breward/mean") == 2  # with its length, unlike the one in the layout


# ---------------------------------------------------------------------------------------------------- progress

METRICS = {
    "reward/mean": 0.4125,
    "loss/total": 1.25,
    "perf/tokens_per_second": 5643.2,
    "dypo/easy_frac": 0.125,
    "dypo/mid_frac": 0.625,
    "dypo/hard_frac": 0.25,
}


def test_progress_in_a_log_is_about_twenty_plain_lines():
    out = io.StringIO()
    with Progress(1000, start_step=100, console=Console(file=out, width=40)) as progress:
        for step in range(101, 1001):
            progress.update(step, METRICS)
        progress.log("saved [bold]checkpoint[/bold]")
    lines = out.getvalue().splitlines()
    assert ESCAPE not in out.getvalue() and "\r" not in out.getvalue()
    assert 18 <= len(lines) <= 24
    assert lines[0].startswith("step 101/1000  reward 0.412  loss 1.2500  tokens/s 5,643  easy/mid/hard 12%/62%/25%")
    assert lines[-2].startswith("step 1000/1000") and lines[-2].endswith("left 0:00:00")
    assert lines[-1] == "saved [bold]checkpoint[/bold]"


def test_progress_on_a_terminal_shows_the_fields():
    out = io.StringIO()
    with Progress(10, console=Console(file=out, force_terminal=True, width=120, color_system="truecolor")) as progress:
        progress.log("a line above")
        progress.update(4, METRICS)
        progress.update(5, {"dypo/easy_frac": math.nan, "reward/mean": None})  # nothing to show is not an error
        progress.update(6, METRICS)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    assert ESCAPE in out.getvalue() and "━" in plain
    for text in (
        "a line above",
        "6/10",
        "left",
        "reward 0.412",
        "loss 1.2500",
        "tokens/s 5,643",
        "easy 12%",
        "hard 25%",
    ):
        assert text in plain, text


@pytest.mark.parametrize("terminal", [True, False])
def test_summary_shows_every_row(terminal):
    out = io.StringIO()
    rows = [("reward", "0.50"), ("report", "runs/[x]/" + "deep/" * 20 + "report.html")]
    summary(rows, "Done", Console(file=out, force_terminal=terminal, width=200, color_system=None))
    for text in ("Done", "reward", "0.50", rows[1][1]):
        assert text in out.getvalue()
    assert terminal or ESCAPE not in out.getvalue()


# ---------------------------------------------------------------------------------------------------- report


def test_report_has_every_family_and_needs_nothing_from_outside(tmp_path):
    run_dir = fill(tmp_path / "quickstart", steps=60)
    (run_dir / "config.yaml").write_text("objective: {method: dypo}\ntrainer: {steps: 60}\n")
    (run_dir / "environment.json").write_text('{"torch": "2.13.0"}')
    text = write_report(run_dir).read_text()
    page = Outline(text)
    assert not re.search(r"https?://|url\(|@import|\bsrc=|\bhref=", text)
    assert not {"link", "img", "iframe", "object", "base"} & set(page.tags)
    assert not {"src", "href", "onload", "onclick"} & page.attributes
    assert page.data["h3"] == [title.strip() for title in TITLES.split(",")]
    assert page.tags.count("svg") == len(page.data["h3"])
    assert page.data["h1"] == ["quickstart"]
    assert "12.5% → 75.0%" in page.data["dd"] and "method dypo" in page.data["li"] and "60" in page.data["dd"]
    assert any("2.13.0" in part for part in page.data["pre"])
    assert "prefers-color-scheme: dark" in text and "default-src 'none'" in text
    for payload in page.data["script"][:-1]:
        assert {"x", "y", "log", "percent", "series"} == set(json.loads(payload))


def test_report_stacks_the_decades_of_the_mismatch(tmp_path):
    """Every metric of theirs has its layer, smallest differences at the bottom, and its value under the pointer."""
    shares = {key: share / 36 for share, key in enumerate(SHARE_KEYS, start=1)}
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, **shares}) + "\n")
    page = Outline(write_report(tmp_path).read_text())
    assert page.data["h3"] == ["Mismatch by size"]
    (payload, _) = page.data["script"]
    layers = json.loads(payload)["series"]
    assert [layer["y"] for layer in layers] == [[pytest.approx(share, rel=1e-4)] for share in shares.values()]
    tops = np.cumsum(list(shares.values()))
    assert [layer["top"][0] for layer in layers] == pytest.approx(tops.tolist(), rel=1e-4)


@pytest.mark.parametrize(("stale", "titles"), [(0, []), (1, ["Staleness"])])
def test_report_leaves_out_a_staleness_that_is_always_0(tmp_path, stale, titles):
    rows = [{"step": step, "rollout/staleness_max": stale, "rollout/staleness_mean": stale / 2} for step in (1, 2)]
    rows[0] |= {"reward/mean": 0.0}  # 0 throughout, but shown
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert Outline(write_report(tmp_path).read_text()).data["h3"] == ["Reward", *titles]


def test_report_escapes_hostile_text(tmp_path):
    name = "<img src=x onerror=alert(1)>&\"'"
    run_dir = fill(tmp_path / name, steps=5)
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 6, "eval/</script><script>alert(2)/acc": 0.5, "x<b>y": 1.0}) + "\n")
    (run_dir / "config.yaml").write_text('model: {hf: "</pre><script>alert(3)</script>"}\n')
    page = Outline(write_report(run_dir).read_text())
    assert page.data["h1"] == [name] and "x<b>y" in page.data["h3"]
    assert not {"img", "b>"} & set(page.tags) and "onerror" not in page.attributes
    assert page.tags.count("script") == page.tags.count("figure") + 1
    assert "model </pre><script>alert(3)</script>" in page.data["li"]


def test_report_of_ten_thousand_steps_is_small_and_quick(tmp_path):
    run_dir = fill(tmp_path / "long", steps=10_000, every=100)
    start = time.process_time()  # not wall time: others may be using the machine
    path = write_report(run_dir)
    assert time.process_time() - start < 5.0
    assert path.stat().st_size < 2_000_000
    Outline(path.read_text())


@pytest.mark.parametrize(
    ("steps", "drop", "value"),
    [
        pytest.param(0, (), 0.5, id="only the evaluation before training"),
        pytest.param(1, (), 0.5, id="one step"),
        pytest.param(8, (), None, id="all null"),
        pytest.param(8, (), 0.0, id="all zero"),
        pytest.param(8, (), -2.0, id="all negative"),
        pytest.param(8, (), 1e300, id="huge"),
        pytest.param(8, (), 1e-300, id="tiny"),
        pytest.param(8, tuple(KEYS[1:]), 0.5, id="one key"),
        pytest.param(8, ("dypo/mid_frac", "time/step", "reward/mean"), 0.5, id="keys missing"),
    ],
)
def test_report_of_unusual_runs(tmp_path, steps, drop, value):
    page = Outline(write_report(fill(tmp_path / "run", steps, drop=drop, value=value)).read_text())
    assert page.tags.count("figure") >= 1
    assert ("no values" in page.data.get("text", [])) == (value in (None, 0.0, -2.0) and steps > 0)


def test_report_leaves_gaps_for_null(tmp_path):
    rows = [{"step": step, "reward/mean": None if step in (4, 5) else 0.5} for step in range(1, 10)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    raw = re.search(r'<path class="raw c1" d="([^"]*)"', write_report(tmp_path).read_text())[1]
    assert raw.count("M") == 2 and raw.count("L") == 2 + 3


@pytest.mark.parametrize("text", [None, "", '{"step": 1, "lo'])
def test_report_without_metrics_is_one_line_that_names_the_file(tmp_path, text):
    if text is not None:
        (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(UserError, match=r"metrics\.jsonl: ") as error:
        write_report(tmp_path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "report.html").exists()


numbers = st.lists(st.floats(-1e6, 1e6) | st.just(math.nan), min_size=1, max_size=300)


@settings(max_examples=40, deadline=None)
@given(numbers, st.integers(10, 80))
def test_thinning_keeps_extremes_and_order(values, limit):
    values = np.array(values)
    kept = thin(values, limit)
    assert len(kept) <= limit and (np.diff(kept) > 0).all() and kept[-1] == len(values) - 1
    if np.isfinite(values).any():
        assert np.nanmax(values[kept]) == np.nanmax(values) and np.nanmin(values[kept]) == np.nanmin(values)


@settings(max_examples=40, deadline=None)
@given(numbers, st.integers(1, 50))
def test_rolling_statistics_match_their_definition(values, window):
    values = np.array(values)
    mean, std = rolling(values, np.arange(len(values)), window)
    for index in range(len(values)):
        inside = values[max(0, index - window // 2) : index + window // 2 + 1]
        inside = inside[np.isfinite(inside)]
        expected = (inside.mean(), inside.std()) if len(inside) else (math.nan, math.nan)
        np.testing.assert_allclose((mean[index], std[index]), expected, rtol=1e-9, atol=1e-6)
