"""The trace of a run: every phase on every rank, on one clock, nested, as long as the metrics say; and valid always."""

from __future__ import annotations

import json
import os
import time
from itertools import groupby
from pathlib import Path

import pytest

from megatron_dypo.monitor import trace_file
from megatron_dypo.monitor.trace_file import TraceFile
from megatron_dypo.runtime import trace
from tests.full_disk import fill_disk
from tests.launch import copy_task, metrics, train_here
from tests.ranks import run_ranks
from tests.rollout_server import SECRET, VARIABLE, Imitation

STEPS = 4


def events(file: Path, kind: str = "X") -> list[dict]:
    return [event for event in json.loads(file.read_text()) if event["ph"] == kind]


def train_with_token(config: str, overrides: list[str]) -> None:
    """Train with the servers' token: ranks have the environment of when the first of them was forked."""
    os.environ[VARIABLE] = SECRET
    train_here(config, overrides)


def traced_run(folder: Path) -> Path:
    """Two pipeline ranks, two servers, the policy in host memory while they sample."""
    from megatron_dypo.config import load_config
    from megatron_dypo.data.tokenizer import load_tokenizer
    from megatron_dypo.models.shape import model_shape
    from megatron_dypo.rollout.engines import served_model_name

    keys = {
        "rollout__engine": "server",
        "rollout__verify_sync": "off",
        "parallel__pipeline": 2,
        "logging__trace": True,
        "trainer__offload": True,
        "trainer__steps": STEPS,
        "trainer__save_every": 2,
        "trainer__eval_every": 0,
    }
    config = copy_task(folder, **keys, rollout__servers=["http://127.0.0.1:1"])
    loaded = load_config(str(config), [])
    shape = model_shape(loaded.model)
    name = served_model_name(loaded, shape, load_tokenizer(loaded, shape))
    with Imitation(name) as first, Imitation(name) as second:
        run_ranks(2, train_with_token, str(config), [f"rollout.servers=[{first.url},{second.url}]"])
    return folder / "run"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return traced_run(tmp_path_factory.mktemp("traced"))


def test_durations_are_those_of_the_metrics_on_every_rank(run):
    lines, spans = metrics(run), events(run / "trace.json")
    names = {name for line in lines for name in line if name.startswith("time/")}
    assert names >= {f"time/{each}" for each in ("rollout", "reward", "logprob", "update", "sync", "step", "save")}
    for name in names:
        for line in lines:
            step = line["step"] - (name == "time/save")  # the metrics are written before the step's own save
            traced = {0: 0, 1: 0}
            for span in spans:
                if span["name"] == name and span["args"].get("step") == step:
                    traced[span["pid"]] += span["dur"]
            assert traced[0] / 1e6 == pytest.approx(line[name], abs=2e-5), (name, step)
            assert (traced[1] > 0) == (line[name] > 0), (name, step)


def test_spans_of_a_lane_nest(run):
    spans = sorted(
        events(run / "trace.json"), key=lambda event: (event["pid"], event["tid"], event["ts"], -event["dur"])
    )
    for _, members in groupby(spans, key=lambda event: (event["pid"], event["tid"])):
        ends: list[int] = []  # of the spans that are open
        for event in members:
            while ends and ends[-1] <= event["ts"]:
                ends.pop()
            assert not ends or event["ts"] + event["dur"] <= ends[-1], event
            ends.append(event["ts"] + event["dur"])


def test_ranks_are_on_one_clock(run):
    """None leaves an exchange before the last one has come."""
    exchanges: dict[int, list[dict]] = {}
    for event in events(run / "trace.json"):
        if event["name"] == "rollout exchange":
            exchanges.setdefault(event["args"]["step"], []).append(event)
    assert sorted(exchanges) == list(range(1, STEPS + 1))
    for step, both in exchanges.items():
        assert [event["pid"] for event in both] == [0, 1]
        assert max(event["ts"] for event in both) <= min(event["ts"] + event["dur"] for event in both), step
        assert abs(both[0]["ts"] / 1e6 - time.time()) < 600


def test_micro_batches_syncs_and_both_servers_are_there(run):
    spans = events(run / "trace.json")
    lanes = {
        (event["pid"], event["tid"]): event["args"]["name"]
        for event in events(run / "trace.json", "M")
        if event["name"] == "thread_name"
    }
    assert {(event["pid"], event["tid"]) for event in spans} <= set(lanes)
    servers = {lane for lane in lanes.values() if lane.startswith("server 127.0.0.1:")}
    assert len(servers) == 2
    for rank in (0, 1):
        mine = [event for event in spans if event["pid"] == rank]
        for name in ("forward-compute", "backward-compute", "weight sync", "gather decoder.layers.1", "optimizer step"):
            assert sum(event["name"] == name for event in mine) >= STEPS, name
        assert all(event["args"]["tokens"] > 0 for event in mine if event["name"] == "forward-compute")
        sampled = {lanes[rank, event["tid"]] for event in mine if event["name"] == "sampling"}
        assert sampled == servers
    assert {lanes[0, event["tid"]] for event in spans if event["name"] == "update_weights"} == servers
    counts = [event["args"]["requests"] for event in events(run / "trace.json", "C")]
    assert max(counts) > 1 and counts[-1] == 0


def shifts(late: float) -> float:
    """Seconds to the wall clock, of rank 1 with another machine's clock. To be run on a forked rank."""
    from megatron_dypo.runtime import distributed

    layout = distributed.init()
    if layout.rank == 1:
        trace_file._machine = lambda: "another"
        clock, time.perf_counter = time.perf_counter, lambda: clock() + late
    return trace_file._clock_shift(layout.rank)


def test_the_clock_of_another_machine_is_found_by_when_collectives_end():
    here, there = run_ranks(2, shifts, 5000.0)
    assert here - there == pytest.approx(5000.0, abs=0.05)


def span(number: int) -> str:
    return trace_file.event(trace.Span("x", "phase", "main", number, number + 0.5, {"step": number}), 0, 0.0)


def steps_of(path: Path) -> list[int]:
    return [event["args"]["step"] for event in events(path)]


@pytest.mark.parametrize("torn", range(0, 120, 7))
def test_a_file_that_a_kill_has_torn_anywhere_is_gone_on_with(torn, tmp_path):
    path = tmp_path / "trace.json"
    first = TraceFile(path)
    for number in range(3):
        first.append([], [span(number)])
        assert steps_of(path) == list(range(number + 1)), "valid after every step"
    os.truncate(path, path.stat().st_size - torn)
    TraceFile(path).append([], [span(7)])
    found = steps_of(path)
    assert found[-1] == 7 and found[:-1] == list(range(len(found) - 1)) and len(found) >= 2 + (torn == 0)


def test_the_files_are_bounded_and_each_names_its_lanes(tmp_path, monkeypatch):
    monkeypatch.setattr(trace_file, "MOST_BYTES", 2000)
    path, name = tmp_path / "trace.json", trace_file._name(0, "thread_name", 0, name="main")
    file = TraceFile(path)
    for number in range(60):
        file.append([name] if number == 0 else [], [span(number)])
    before = tmp_path / "trace.1.json"
    assert sorted(tmp_path.iterdir()) == [before, path]
    assert steps_of(before) + steps_of(path) == list(range(steps_of(before)[0], 60))
    for each in (before, path):
        assert each.stat().st_size <= 2000
        assert [event["args"]["name"] for event in events(each, "M")] == ["main"]


def test_a_full_disk_is_a_warning_and_leaves_the_file_whole(disk, caplog):
    large = trace_file.event(trace.Span("x" * 9000, "phase", "main", 1, 2, {"step": 1}), 0, 0.0)
    path = disk / "trace.json"
    file = TraceFile(path)
    file.append([], [span(0)])
    ballast = fill_disk(disk, leave=4096)
    for _ in range(2):
        file.append([], [large])
        assert steps_of(path) == [0]
    ballast.unlink()
    file.append([], [large])
    assert steps_of(path) == [0, 1]
    assert [each.message.startswith("trace not written") for each in caplog.records] == [True]


def test_spans_beyond_the_limit_are_counted(monkeypatch):
    monkeypatch.setattr(trace, "LIMIT", 3)
    recorder = trace.start()
    for _ in range(5):
        trace.add("x", "phase", 0.0)
    trace.stop()
    trace.add("x", "phase", 0.0)
    *kept, dropped = recorder.take()
    assert len(kept) == 3 and dropped.details == {"spans": 2}
    assert recorder.take() == []
