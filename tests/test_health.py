"""A run's health: skipped steps, warnings, and full disks; a resume changes none of it."""

from __future__ import annotations

import json
import logging
import math
import os
import random
import re
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from megatron_dypo import run_folder
from megatron_dypo.checkpoint.catalog import complete_steps
from megatron_dypo.checkpoint.manager import Counters
from megatron_dypo.config.schema import Config
from megatron_dypo.monitor.health import CALM, EMPTY_STEPS, RULES, TRUNCATED_STEPS, Health, Past, warnings_of
from megatron_dypo.monitor.metrics_file import MetricsFile, read_metrics
from megatron_dypo.monitor.monitor import Monitor
from megatron_dypo.monitor.progress import Progress, summary
from megatron_dypo.records import Group, Prompt, Response
from megatron_dypo.rollout.recording import record, step_file
from megatron_dypo.runtime.distributed import Layout
from megatron_dypo.runtime.recent import NEEDED, RECENT, recent_level
from tests.batches import make_groups, trace_ids
from tests.full_disk import fill_disk
from tests.launch import copy_task, metrics, without_times
from tests.ranks import run_ranks

ALONE = Layout()

# ---------------------------------------------------------------------------------------------------- rules


def steps_of(lines: list[str]) -> list[int]:
    return [int(re.match(r"step (\d+): ", line)[1]) for line in lines]


def stream(key: str, values: list[float | None], **others: float) -> list[dict]:
    """Return lines of metrics, from step 1 on; ``others``: names with ``__`` for the slash."""
    constant = {name.replace("__", "/"): value for name, value in others.items()}
    return [{"step": step, key: value, **constant} for step, value in enumerate(values, start=1)]


def noisy(level: float, count: int, spread: float = 0.2, seed: int = 0) -> list[float]:
    draw = random.Random(seed)
    return [level * math.exp(draw.gauss(0, spread)) for _ in range(count)]


def learning_from_noise(start: float, end: float, steps: int = 300) -> list[float]:
    """Return the fastest healthy fall known from the quickstart: most of the way in 40 steps."""
    return [end + (start - end) * math.exp(-step / 15) for step in range(steps)]


HALF = {"reward__mean": 0.5}
SICK = {
    "norm": ("train/grad_norm", [*noisy(1.0, 40), 12.0, *noisy(1.0, 20)], {}, 41),
    "sft": ("loss/sft", [*noisy(1.5, 40), 9.0], {}, 41),
    "total": ("loss/total", [*noisy(0.3, 40, spread=0.05), 1.5], {}, 41),
    "entropy falls": ("rollout/entropy", [*noisy(0.5, 40), 0.08], HALF, 41),
    "entropy is gone": ("rollout/entropy", [0.5 * 0.97**step for step in range(200)], HALF, 130),
    "entropy rises": ("rollout/entropy", [*noisy(0.2, 40), 1.5], HALF, 41),
    "reward": ("reward/mean", [*noisy(0.4, 40), 0.0, 0.3, *[0.02] * 10], {}, 47),
    "length": ("rollout/response_tokens", [*noisy(600.0, 40), 120.0], {}, 41),
    "saturated": ("gal/saturated_frac", [0.1, 0.2, 0.6], {"gal__spread": 12.0}, 3),
    "truncated": ("rollout/truncated_frac", [0.2, *[0.7] * 40], {}, 1 + TRUNCATED_STEPS),
    "mismatch": ("rollout/mismatch_mean", [0.01, 0.2], {}, 2),
    "one token's mismatch": ("rollout/mismatch_max", [*noisy(1e-6, 40), 0.16], {}, 41),
    "one token's mismatch in bf16": ("rollout/mismatch_max", [*noisy(0.3, 40), 12.0], {}, 41),
    "empty": ("train/empty_steps", [0, 0, *range(1, 40)], {}, 2 + EMPTY_STEPS),
}


@pytest.mark.parametrize("name", SICK)
def test_each_trouble_is_said_once_at_its_step_with_advice(name):
    key, values, others, step = SICK[name]
    found = warnings_of(stream(key, values, **others))
    assert steps_of(found) == [step], found
    assert found[0].endswith(tuple(f": {rule.advice}" for rule in RULES if rule.key == key))


def test_every_rule_is_tried():
    said = [warnings_of(stream(key, values, **others))[0] for key, values, others, _ in SICK.values()]
    assert all(any(line.endswith(f": {rule.advice}") for line in said) for rule in RULES)
    assert len({rule.name for rule in RULES}) == len(RULES)


HEALTHY = {
    "norm": ("train/grad_norm", [*learning_from_noise(7.0, 0.3), *noisy(0.3, 300, spread=0.5)], {}),
    "sft": ("loss/sft", learning_from_noise(5.0, 0.02), {}),
    "sft with the last Hard prompts": ("loss/sft", [0.0 if step % 3 else 0.2 for step in range(200)], {}),
    "policy gradient": ("loss/total", [x**3 for x in np.random.default_rng(0).normal(0, 0.2, 500)], {}),
    "rounding": ("loss/total", [x * 1e-10 for x in np.random.default_rng(1).standard_cauchy(500)], {}),
    "entropy": ("rollout/entropy", learning_from_noise(4.6, 0.05), {"reward__mean": 0.3}),
    "entropy of a few words": ("rollout/entropy", [*noisy(0.1, 100), 0.9, 0.7], {"reward__mean": 0.3}),
    "rewards by the draw of the prompts": ("reward/mean", [*noisy(0.15, 100), *[0.03] * 10], {}),
    "solved at once": ("rollout/entropy", [*[0.5] * 40, 0.02, 0.02], {"reward__mean": 0.97}),
    "solved": ("rollout/entropy", [0.5 * 0.97**step for step in range(200)], {"reward__mean": 0.97}),
    "length": ("rollout/response_tokens", learning_from_noise(30.0, 17.0), {}),
    "learning to stop": ("rollout/truncated_frac", learning_from_noise(0.9, 0.0), {}),
    "few empty": ("train/empty_steps", [step // 2 for step in range(200)], {}),
    "rounding differs": ("rollout/mismatch_max", [*noisy(1e-6, 100, spread=1.0), 3e-3], {}),
    "bf16's tail": ("rollout/mismatch_max", noisy(0.3, 500, spread=0.7), {}),
    "unknown": ("gal/saturated_frac", [None, math.nan, math.inf] * 30, {}),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_what_healthy_runs_do_is_not_warned_about(name):
    key, values, others = HEALTHY[name]
    assert warnings_of(stream(key, values, **others)) == []


def test_warnings_that_the_page_on_wrong_runs_quotes_are_those_of_the_rules():
    page = Path(__file__).resolve().parents[1] / "docs/when-training-goes-wrong.md"
    quoted = re.findall(r"^> (step .*)$", page.read_text(), re.MULTILINE)
    advice = tuple(f": {rule.advice}" for rule in RULES)
    assert len(quoted) > 3 and [line for line in quoted if not line.endswith(advice)] == []


def test_entropy_that_falls_as_the_reward_rises_is_learning():
    """A task with one right answer of five tokens, from random weights: 1.6 to 0.2 nats in fifteen steps."""
    entropies, rewards = [*[1.6] * 21, *np.linspace(1.5, 0.2, 15)], [*[0.1] * 21, *np.linspace(0.1, 0.84, 15)]
    lines = [
        line | {"reward/mean": float(reward)}
        for line, reward in zip(stream("rollout/entropy", entropies), rewards, strict=True)
    ]
    assert warnings_of(lines) == []
    lost = [line | {"reward/mean": 0.1} for line in lines]
    assert steps_of(warnings_of(lost)) == [35]


def test_a_rule_warns_again_only_after_calm():
    bad, calm = [0.9], [0.1]
    values = bad * 30 + calm * (CALM - 1) + bad * 5 + calm * CALM + bad * 30
    assert steps_of(warnings_of(stream("gal/saturated_frac", values))) == [1, 30 + CALM - 1 + 5 + CALM + 1]


def test_a_level_needs_some_steps():
    for before, expected in ((NEEDED - 1, []), (NEEDED, [NEEDED + 1])):
        assert steps_of(warnings_of(stream("train/grad_norm", [1.0] * before + [50.0]))) == expected


@given(st.integers(0, 120), st.integers(0, 2**32))
def test_read_back_from_json_a_stream_goes_on_as_if_never_stopped(cut, seed):
    draw = random.Random(seed)
    lines = [
        {
            "step": step,
            "train/grad_norm": draw.choice([1.0, 1.1, 1 / 3, 20.0, math.nan]),
            "gal/saturated_frac": draw.choice([0.1, 0.9]) if draw.random() < 0.5 else None,
            "rollout/truncated_frac": float(step % 50 < 40),
        }
        for step in range(1, 121)
    ]
    straight, resumed = Health(), Health()
    expected = [straight.check(line["step"], line) for line in lines]
    for line in lines[:cut]:
        written = {name: None if value is None or math.isnan(value) else value for name, value in line.items()}
        resumed.check(line["step"], json.loads(json.dumps(written)))
    assert [resumed.check(line["step"], line) for line in lines[cut:]] == expected[cut:]
    assert resumed.said == straight.said


# ---------------------------------------------------------------------------------------------------- monitor


def config(run_dir: Path, steps: int = 100, **sections: dict) -> Config:
    run_dir.mkdir(exist_ok=True)
    return Config(
        model={"preset": "tiny"},
        data={"train": "x.jsonl"},
        trainer={"steps": steps, "run_dir": str(run_dir)},
        **sections,
    )


def one_step(step: int, **others: float) -> dict:
    """Return a step's metrics as the loop passes them, of about a real one's size."""
    filler = {f"time/{name}": step / 7 for name in ("rollout", "reward", "logprob", "update", "sync", "save")}
    norm = {"train/grad_norm": 1.0 + step % 7 / 10}
    return {"tokens": 1000, "devices": 8, "time/step": 0.5, **norm, "reward/mean": step / 1000} | filler | others


def test_throughput_is_also_given_per_device(tmp_path):
    with Monitor(config(tmp_path / "run", steps=1), ALONE, 0) as monitor:
        monitor.step(1, one_step(1))
    (row,) = metrics(tmp_path / "run")
    assert (row["perf/tokens_per_second"], row["perf/tokens_per_second_per_gpu"]) == (2000, 250)
    assert not {"tokens", "devices"} & row.keys()


def test_the_monitor_shows_counts_and_sums_up_warnings_across_a_resume(tmp_path, capsys):
    def run(folder: Path, *parts: tuple[int, int]) -> list[dict]:
        for start, end in parts:
            with Monitor(config(folder), ALONE, start) as monitor:
                for step in range(start + 1, end + 1):
                    spike = {30: 40.0, 31: 41.0, 90: 42.0}.get(step, 1.0)
                    monitor.step(step, one_step(step, **{"train/grad_norm": spike}))
                monitor.finish(0)
        return without_times(metrics(folder))

    straight = run(tmp_path / "straight", (0, 100))
    shown = capsys.readouterr().out
    assert shown.count("warning: step 30: the gradient norm is 40, 40 times its recent median") == 1
    assert shown.count("warning: step") == 2 and re.search(r"warnings +gradient norm 2", shown)
    assert [line["train/warnings"] for line in straight] == [0] * 29 + [1] * 60 + [2] * 11
    assert run(tmp_path / "resumed", (0, 35), (35, 100)) == straight
    page = (tmp_path / "resumed" / "report.html").read_text()
    assert "step 30: the gradient norm" in page and "step 90: the gradient norm" in page


# ---------------------------------------------------------------------------------------------------- full disk


def test_lines_wait_for_room_and_none_is_torn_lost_or_doubled(disk):
    rows = [{"step": step} | {f"metric/{i}": i / step for i in range(60)} for step in range(1, 41)]
    file = MetricsFile(disk / "metrics.jsonl", resume_step=0)
    for row in rows[:10]:
        file.write(row["step"], row)
    ballast = fill_disk(disk)
    refused = []
    for row in rows[10:25]:  # the first fill the rest of the last page
        try:
            file.write(row["step"], row)
        except OSError as error:
            assert "No space left" in str(error) and "metrics.jsonl" in str(error)
            refused.append(row["step"])
        content = file.path.read_bytes()
        assert content.endswith(b"\n"), "a torn line"
        assert file.rows() == rows[: row["step"]], "seen from inside, every line is there"
    assert len(refused) >= 12 and refused[-1] == 25
    assert len(read_metrics(file.path)) == refused[0] - 1
    ballast.unlink()
    with file.path.open("ab") as torn:  # as if even the rollback had failed
        torn.write(b'{"step": 11, "metr')
    for row in rows[25:]:
        file.write(row["step"], row)
    file.close()
    assert read_metrics(file.path) == rows


def test_lines_that_never_find_room_are_named(disk):
    file = MetricsFile(disk / "metrics.jsonl", resume_step=0)
    fill_disk(disk)
    for step in (1, 2, 3):
        with pytest.raises(OSError, match="No space left"):
            file.write(step, {"x": 1.0})
    with pytest.raises(OSError, match=r"steps 1 to 3 are lost"):
        file.close()


def test_training_goes_on_over_a_full_disk_and_the_record_is_whole(disk, capfd):
    """Metrics, TensorBoard, report and recordings, by the classes that a run uses."""
    settings = config(disk / "run", steps=60, logging={"tensorboard": True})
    with Monitor(settings, ALONE, 0) as monitor:
        for step in range(1, 61):
            if step == 20:
                ballast = fill_disk(disk)
            if step == 40:
                ballast.unlink()
            monitor.step(step, one_step(step))
        monitor.finish(0)
    shown = capfd.readouterr().out
    assert shown.count("warning: metrics not written, training continues: ") == 1
    assert shown.count("metrics written again, nothing is missing") == 1
    assert len(re.findall(r"warning: TensorBoard failed and is dropped at step 2\d, training continues: ", shown)) == 1
    assert [line["step"] for line in metrics(disk / "run")] == list(range(1, 61))
    assert (disk / "run" / "report.html").exists() and "report.html" in shown


def test_a_run_ends_in_order_on_a_disk_that_stays_full(disk, capfd):
    settings = config(disk / "run", steps=30)
    with Monitor(settings, ALONE, 0) as monitor:
        for step in range(1, 31):
            if step == 10:
                fill_disk(disk)
            monitor.step(step, one_step(step))
        monitor.finish(0)
    shown = capfd.readouterr().out
    assert "warning: report not written, training continues: " in shown and re.search(r"report +not written", shown)
    assert re.search(r"steps +30\n", shown), "the summary knows the steps that the file lacks"
    assert sorted(path.name for path in (disk / "run").iterdir() if path.suffix in (".tmp", ".html")) == []
    assert read_metrics(disk / "run" / "metrics.jsonl")[-1]["step"] < 30


def test_a_resume_on_a_full_disk_leaves_the_run_folder_as_it_was(disk):
    settings = config(disk / "run")
    with Monitor(settings, ALONE, 0) as monitor:
        for step in range(1, 6):
            monitor.step(step, one_step(step))
    before = {path.name: path.read_bytes() for path in (disk / "run").iterdir()}
    fill_disk(disk)
    with pytest.raises(OSError, match=r"No space left.*fingerprint\.json"):
        run_folder.describe(settings, disk / "run")
    with pytest.raises(OSError, match=r"No space left.*metrics\.jsonl"), Monitor(settings, ALONE, 3):
        pass
    assert {path.name: path.read_bytes() for path in (disk / "run").iterdir()} == before


def test_a_step_that_cannot_be_recorded_is_a_warning_that_names_it(disk, caplog):
    from megatron_dypo.rollout.manager import RolloutManager

    folder = disk / "rollouts"
    source = RolloutManager(config(disk / "run", rollout={"record": str(folder)}), [], None, None, None, ALONE, None)
    groups = make_groups()
    source.record(1, groups)
    whole = step_file(folder, 1).read_bytes()
    ballast = fill_disk(disk)
    with caplog.at_level(logging.WARNING):
        for step in (1, 2):
            source.record(step, groups)
    assert [os.fspath(step_file(folder, step)) in line for step, line in enumerate(caplog.messages, 1)] == [True, True]
    assert [path.name for path in folder.iterdir()] == ["step_000001.jsonl"]
    assert step_file(folder, 1).read_bytes() == whole
    ballast.unlink()
    source.record(3, groups)
    assert step_file(folder, 3).read_bytes() == whole
    assert len(caplog.messages) == 2


def test_an_output_that_goes_to_a_full_disk_is_not_worth_the_run():
    with open("/dev/full", "w") as full:
        console = Console(file=full, force_terminal=False)
        with Progress(10, console=console) as progress:
            progress.update(1, {})
        summary([("steps", "1")], "done", console)
        with pytest.raises(OSError):
            full.flush()  # nothing got through, so it was indeed refused
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())


# ---------------------------------------------------------------------------------------------------- spikes


@given(st.lists(st.floats(0, 1e12, allow_subnormal=True), max_size=12), st.integers(0, 20))
def test_the_history_survives_a_checkpoint_bit_for_bit(part, at_once):
    counters, grad_norms = Counters(), part * 10
    for start in range(0, len(grad_norms), at_once + 1):
        counters.count(start, 0, skipped=False, empty=False, grad_norms=grad_norms[start : start + at_once + 1])
    back = Counters(**json.loads(json.dumps(asdict(counters))))
    assert back == counters and back.grad_norms == grad_norms[-RECENT:]
    assert recent_level(back.grad_norms) == recent_level(grad_norms)


def test_the_recent_level_is_the_median_of_the_last_fifty_from_twenty_on():
    drawn = np.random.default_rng(0).exponential(size=120).tolist()
    for length in range(len(drawn)):
        values = drawn[:length]
        expected = float(np.median(values[-50:])) if length >= 20 else None
        assert recent_level(values) == expected == Past(tuple(values[-50:])).level


def test_a_checkpoint_of_before_there_was_a_history_loads():
    assert Counters(step=3, weight_version=3, skipped_steps=0).grad_norms == []


def test_the_device_s_peak_leaves_out_what_a_sleeping_engine_has_given_back(monkeypatch):
    """torch counts the engine's 100 bytes throughout; each phase has its own peak (CUDA's counters are imitated)."""
    import torch

    from megatron_dypo.runtime.measure import DevicePeak

    now = {"allocated": 100, "peak": 100}
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: now["peak"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: now.update(peak=now["allocated"]))

    def use(size: int) -> None:
        """Allocate and free ``size`` bytes."""
        now["peak"] = max(now["peak"], now["allocated"] + size)

    memory = DevicePeak()
    use(5)  # sampling
    memory.unmapped(100)
    use(60)  # training while the engine sleeps
    assert memory.take() == 105
    use(60)
    assert memory.take() == 60
    use(30)
    memory.unmapped(40)  # the engine's weights are awake for a sync
    use(20)
    assert memory.take() == 80


def digest(policy) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in policy.named_tensors()}


def spiking_update(
    spike_factor: float, times: float, unequal: bool, bound: float = 0.0, past: int = NEEDED
) -> tuple[dict, float]:
    """Return an update's result, with a norm of ``times`` the median of its past, and this rank's peak memory (GiB).

    ``unequal``: rank 1 sees a slightly larger norm. ``bound``: the largest norm to apply, in such medians; ``past``:
    previous updates.
    """
    from megatron_dypo.runtime.measure import take_peaks
    from megatron_dypo.training.minibatch import build_minibatches
    from megatron_dypo.training.passes import logprob_passes
    from megatron_dypo.training.step import StepContext, run_updates
    from tests.test_training import build

    settings, policy = build({})
    settings.trainer.spike_factor = spike_factor
    minibatches = build_minibatches(policy.layout, make_groups(), settings, trace_ids)
    logprob_passes(policy, minibatches, settings)
    probe = run_updates(policy, minibatches, settings, StepContext(1, 0.0)).grad_norms[0]
    settings.trainer.max_grad_norm_to_apply = bound * probe / times
    before, version = digest(policy), policy.version
    if unequal and policy.layout.rank == 1:
        exact = policy.grad_norm
        policy.grad_norm = lambda: exact() * (1 + 1e-6)
    kept = np.ones(300_000_000, np.uint8) if policy.layout.rank == 1 else None  # one rank needs more memory
    peak = take_peaks()["perf/host_memory_gib"]
    context = StepContext(1, 1e-3, grad_norms=[probe / times] * past)
    outcome = run_updates(policy, minibatches, settings, context)
    del kept
    changed = digest(policy) != before
    return {
        "skipped": outcome.skipped,
        "changed": changed,
        "applied": policy.version - version,
        "norms": outcome.grad_norms,
        "metrics": outcome.metrics,
        "memory": outcome.memory,
    }, peak


def test_a_spiking_update_is_left_out_on_all_ranks():
    (result, peak), (other, larger_peak) = run_ranks(2, spiking_update, 10.0, 12.0, False)
    assert result == other
    assert not result["changed"] and result["applied"] == 0 and result["norms"] == []
    norm = result["metrics"]["train/grad_norm"]
    assert f"gradient norm {norm:.4g}, 12 times the median" in result["skipped"]
    assert "on prompts p0, p1, p2, p3, p4, p5, p6, p7 and 4 more" in result["skipped"]
    assert "trainer.spike_factor" in result["skipped"], "says what to change"
    assert result["memory"]["perf/host_memory_gib"] >= larger_peak > peak + 0.1, "of the rank that needed most"


def test_an_update_above_an_absolute_norm_is_left_out_without_any_history_and_named():
    """The norm is judged before clipping, like the other bound, and equally on ranks that round differently."""
    (result, _), (other, _) = run_ranks(2, spiking_update, 0.0, 2.0, True, 2.0 * (1 + 5e-7), 0)
    assert result == other and not result["changed"] and result["norms"] == []
    norm = result["metrics"]["train/grad_norm"]
    assert re.search(
        rf"gradient norm {norm:.4g} exceeds trainer.max_grad_norm_to_apply: [\d.]+, on prompts p0, p1, .*; if this is",
        result["skipped"],
    )
    (applied, _), _ = run_ranks(2, spiking_update, 0.0, 2.0, True, 2.1, 0)
    assert applied["skipped"] is None and applied["changed"] and applied["applied"] == 1


@pytest.mark.parametrize(("factor", "times"), [(0.0, 1e6), (10.0, 9.0)], ids=["switched off", "below"])
def test_other_updates_are_applied_and_remembered(factor, times):
    for result, _ in run_ranks(2, spiking_update, factor, times, False):
        assert result["skipped"] is None and result["changed"] and result["applied"] == 1
        assert result["norms"] == [result["metrics"]["train/grad_norm"]]


def test_ranks_that_round_differently_decide_alike():
    """The limit lies between the two ranks' norms."""
    (first, _), (second, _) = run_ranks(2, spiking_update, 10.0, 10.0 * (1 - 5e-7), True)
    assert first == second and "gradient norm" in first["skipped"] and not first["changed"]


ODD = 127  # a token that only one teacher's trace contains


def spoilt_update(fault: str) -> dict:
    """Make an update with something non-finite, planted on one rank or in one sequence."""
    import torch

    from megatron_dypo.training.minibatch import build_minibatches
    from megatron_dypo.training.passes import logprob_passes
    from megatron_dypo.training.step import StepContext, run_updates
    from tests.test_training import build

    def one_odd_trace(group: Group, teacher: int) -> np.ndarray:
        ids = np.minimum(trace_ids(group, teacher), ODD - 1)
        ids[1] = ODD if (group.prompt.id, teacher) == ("p5", 1) else ids[1]
        return ids

    settings, policy = build({})
    minibatches = build_minibatches(policy.layout, make_groups(vocabulary=ODD), settings, one_odd_trace)
    if fault == "teacher":
        with torch.no_grad():
            policy.parameters["embedding.word_embeddings.weight"][ODD] = math.nan
    _, offenders = logprob_passes(policy, minibatches, settings)
    assert offenders is None
    if fault == "backward" and policy.layout.rank == 1:
        policy.parameters["decoder.final_layernorm.weight"].register_hook(lambda gradient: gradient * math.inf)
    before = digest(policy)
    outcome = run_updates(policy, minibatches, settings, StepContext(1, 1e-3))
    return {"skipped": outcome.skipped, "changed": digest(policy) != before, "norms": outcome.grad_norms}


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("teacher", r": prompt p5, teacher b: non-finite policy log-prob$"),
        ("backward", r"arises in the model's backward pass; its prompts are p0, p1, .* p7 and 4 more$"),
    ],
)
def test_what_is_not_finite_is_named(fault, expected):
    first, second = run_ranks(2, spoilt_update, fault)
    assert first == second and not first["changed"] and first["norms"] == []
    assert re.search(expected, first["skipped"]), first["skipped"]


def non_finite_batch() -> str:
    from megatron_dypo.training.minibatch import build_minibatches
    from megatron_dypo.training.passes import logprob_passes
    from tests.test_training import build

    settings, policy = build({})
    groups = make_groups()
    groups[0].responses[2].logprobs[0] = math.nan
    groups[3].responses[1].reward = math.inf
    return logprob_passes(policy, build_minibatches(policy.layout, groups, settings, trace_ids), settings)[1]


def test_all_offenders_of_a_bad_batch_are_named():
    expected = "prompt p3: non-finite reward, prompt p0, response 2: non-finite engine log-prob"
    assert run_ranks(2, non_finite_batch) == [expected] * 2


def recorded_run(folder: Path, steps: int) -> list[str]:
    """Write a task, made-up rollouts, and return the overrides of a run that replays them: eight updates per step."""
    config_path = copy_task(folder)
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    for step in range(1, steps + 1):
        draw = np.random.default_rng(step)
        groups = []
        for row in draw.choice(rows, 8, replace=False):
            responses = [
                Response(
                    draw.integers(3, 40, length := int(draw.integers(1, 9))).astype(np.int32),
                    draw.normal(-4.6, 0.3, length).astype(np.float32),
                    "stop",
                    float(draw.random() < 0.3),
                )
                for _ in range(4)
            ]
            prompt_ids = draw.integers(3, 40, 6).astype(np.int32)
            groups.append(Group(Prompt(row["id"], "1", ()), prompt_ids, responses))
        record(folder / "rollouts", step, groups)
    keys = {
        "rollout.engine": "replay",
        "rollout.replay": folder / "rollouts",
        "objective.updates_per_rollout": 8,
        "data.valid": "null",
        "trainer.eval_every": 0,
        "trainer.steps": steps,
        "trainer.save_every": 1,
        "optimizer.lr": 1e-5,  # so slow that the norms keep their level, and from the 20th update on, ...
        "trainer.spike_factor": 1.01,  # ... nearly every step has an update above it
    }
    return [str(config_path), *(f"{name}={value}" for name, value in keys.items())]


def train_here(arguments: list[str]) -> None:
    from megatron_dypo.config import load_config
    from megatron_dypo.preflight import check_inputs
    from megatron_dypo.trainer import train

    loaded = load_config(arguments[0], arguments[1:])
    train(loaded, check_inputs(loaded, arguments[0]))


def test_a_run_that_skips_too_often_stops_with_prompt_ids_and_resumes_exactly(tmp_path):
    arguments = recorded_run(tmp_path, steps=5)
    straight, stopped = (tmp_path / name for name in ("straight", "stopped"))
    run_ranks(2, train_here, [*arguments, "trainer.max_skipped_steps=9", f"trainer.run_dir={straight}"])
    expected = without_times(metrics(straight))
    skipped = [line["train/skipped_steps"] for line in expected]
    assert skipped[1] == 0 and skipped[3] > skipped[2] and skipped[4] > skipped[3]
    with pytest.raises(AssertionError) as error:
        run_ranks(2, train_here, [*arguments, "trainer.max_skipped_steps=1", f"trainer.run_dir={stopped}"])
    assert re.search(
        r"TrainingError: 2 steps in a row were skipped; the last: update \d of 8: gradient norm .*, on prompts \d-\d;"
        r" .* resume with trainer.spike_factor higher",
        str(error.value),
    )
    before = without_times(metrics(stopped))
    assert before == expected[: len(before)]
    assert 2 <= max(complete_steps(stopped)) < 5, "what it resumes from, with a history of 16 norms at least"
    run_ranks(2, train_here, [*arguments, "trainer.max_skipped_steps=9", f"trainer.run_dir={stopped}"])
    assert without_times(metrics(stopped)) == expected
