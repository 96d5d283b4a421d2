"""The benchmarks at a tiny size, and the page that shows the stored results."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from benchmarks import linear_logprob, packing
from benchmarks.heads import HEADS, Batch, Setting
from benchmarks.layouts import parse
from benchmarks.tables import PAGE, RESULTS, ROOT, written
from megatron_dypo.policy.micro_batch import MicroBatch
from megatron_dypo.records import Kind, Sequence
from megatron_dypo.training.packing import plan_micro_batches


def test_performance_page_shows_the_stored_results():
    page = PAGE.read_text()
    assert written(page, RESULTS) == page, "run `python -m benchmarks.tables`"


@pytest.mark.faults
def test_head_benchmark_checks_every_head_against_float64(tmp_path):
    out = tmp_path / "linear_logprob_cpu.json"
    sizes = ["--device", "cpu", "--threads", "1", "--rounds", "2", "--active", "1.0", "0.42"]
    sizes += ["--shapes", "64,32,65536", "64,32,512"]
    heads = ["naive", "ours", "ours_compacted", "ours_logprob"]
    command = [sys.executable, "-m", "benchmarks.linear_logprob", *sizes, "--heads", *heads, "--out", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=400)
    report = json.loads(out.read_text())
    records = report["results"]
    assert [(r["head"], r["vocab"], r["active"]) for r in records] == [
        (head, vocab, active)
        for vocab in (65536, 512)
        for active in (1.0, 0.42)
        for head in heads
        if active < 1 or head != "ours_compacted"  # equal to ``ours`` if all are active
    ]
    for record in records:
        assert record["errors"]["logp"] < 2e-5 and record["errors"]["dhidden"] < 1e-5, record
        assert record["errors"]["dweight"] < 1e-5, record
        assert all(figures["cpu_seconds"] > 0 for figures in record["rounds"]), record
    # three [T, V] of 16 MiB and the weight's gradient of 8; afterwards 0.4 MiB, not what the process once used
    naive = {r["vocab"]: [figures["peak_mib"] for figures in r["rounds"]] for r in records if r["head"] == "naive"}
    assert all(40 < peak < 80 for peak in naive[65536]), naive
    assert all(0.2 < peak < 20 for peak in naive[512]), naive
    page = written(PAGE.read_text(), tmp_path)
    assert "| CPU-seconds at most 0.5x naive at 42% active, slopes zero | 64, 32, 512 |" in page


def test_head_benchmark_has_written_what_it_measured_before_it_was_stopped(tmp_path, monkeypatch):
    plan = linear_logprob.PRESETS["tiny"]
    measure, stopped_at = linear_logprob.measure, plan.settings[1]

    def stopped(workers, setting, plan):
        if setting == stopped_at:
            raise KeyboardInterrupt
        return measure(workers, setting, plan)

    monkeypatch.setattr(linear_logprob, "measure", stopped)
    with pytest.raises(KeyboardInterrupt):
        linear_logprob.compare(plan, tmp_path / "out.json")
    report = json.loads((tmp_path / "out.json").read_text())
    assert [(r["head"], r["active"]) for r in report["results"]] == [("naive", 1.0), ("ours", 1.0)]
    assert all(r["errors"]["dhidden"] < 1e-5 and r["rounds"] for r in report["results"])


def test_head_benchmark_goes_on_without_a_head_that_does_not_answer_or_whose_package_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(linear_logprob.HEADS, "cce", dataclasses.replace(linear_logprob.HEADS["cce"], devices=("cpu",)))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "cut_cross_entropy" else object())
    plan = dataclasses.replace(linear_logprob.PRESETS["tiny"], heads=("cce",), answer_seconds=0.01, checked=frozenset())
    report = linear_logprob.compare(plan, tmp_path / "out.json")
    assert report["missing"] == {"cce": "cut-cross-entropy is not installed"}
    assert [(r["head"], r["failed"], r["tflops"]) for r in report["results"]] == [
        ("naive", "no answer within 0.01 s", {}) for _ in plan.settings
    ]


def test_the_benchmark_s_padded_weight_gives_the_same_gradients():
    """Ours on CUDA, unlike peers', has more rows, which contribute nothing, and ``main_grad``."""
    plain = Batch.of(Setting(64, 32, 500, 0.42), "cpu", torch.float32)
    padded = plain.as_in_megatron()
    assert padded.weight_VH.shape == (1024, 32)
    for step in (HEADS["ours"].step, HEADS["ours_compacted"].step, HEADS["ours_logprob"].step):
        expected, found = step(plain), step(padded)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(padded.weight_VH.main_grad[:500], plain.weight_VH.grad)
        assert not padded.weight_VH.main_grad[500:].any() and padded.weight_VH.grad is None
        padded.weight_VH.main_grad.zero_()
        plain.weight_VH.grad = None


def test_tflops_are_given_in_both_conventions_and_of_a_bare_product_as_it_is():
    """T 32768, H 3584, V 152064: 35.7 TFLOP per product."""
    sizes = {"tokens": 32768, "hidden": 3584, "vocab": 152064}

    def of(head: str, active: float, seconds: float) -> dict:
        rounds = [{"cuda_seconds": x} for x in (1.0, seconds, seconds)]
        return linear_logprob.tflops(sizes | {"head": head, "active": active, "rounds": rounds})

    assert of("ours", 1.0, 0.1827) == pytest.approx({"useful": 586.5, "four_products": 782.0}, rel=1e-3)
    assert of("ours", 0.5, 0.1827) == pytest.approx({"useful": 293.2, "four_products": 391.0}, rel=1e-3)
    assert of("matmul", 0.5, 0.0515) == pytest.approx(dict.fromkeys(["useful", "four_products"], 693.5), rel=1e-3)
    assert of("three_products", 1.0, 0.1545)["useful"] == pytest.approx(693.5, rel=1e-3)


def test_stored_packing_is_the_planners():
    assert json.loads((RESULTS / "packing.json").read_text()) == packing.report(), "run `python -m benchmarks.packing`"


@pytest.mark.parametrize(("tensor", "context"), [(1, 1), (4, 1), (1, 2), (2, 2)])
def test_packing_counts_the_tokens_that_micro_batches_hold(tensor, context):
    lengths = packing.lognormal_lengths(20, 50, 200, seed=0)
    plan = plan_micro_batches(lengths, ranks=3, budget=200, multiple=10)  # some are empty
    sequences = [Sequence(np.zeros(length, np.int32), 1, Kind.ROLLOUT, 0, 0) for length in lengths]
    batches = [
        MicroBatch.pack(sequences, members, 1.0, tensor=tensor, context=context) for share in plan for members in share
    ]
    assert not all(batch.places for batch in batches)
    assert packing.packed_tokens(lengths, plan, tensor, context) == sum(batch.cu_seqlens[-1] for batch in batches)


def test_padded_batches_are_as_wide_as_their_longest_sequence():
    assert packing.padded_tokens([3, 5, 4, 9, 1], budget=10) == 2 * 5 + 4 + 9 + 1
    assert packing.padded_tokens([2, 2, 2], budget=100) == 6


def test_layouts_are_read_from_their_names():
    parallel = {"tensor": 2, "sequence_parallel": True, "pipeline": 2, "virtual_pipeline": 3}
    assert parse("tp2-sp-pp2-vpp3-dp4") == (16, parallel)
    assert parse("dp1") == (1, {})
    with pytest.raises(ValueError, match="ep2"):
        parse("tp2-ep2")


@pytest.mark.faults
def test_layouts_benchmark_trains_the_same_batch_in_every_layout(tmp_path):
    out = tmp_path / "layouts_cpu.json"
    sizes = {"hidden": 64, "ffn": 64, "vocab": 64, "heads": 2, "groups": 2, "prompts": 2, "mean": 32, "cap": 64}
    options = [f"--{name}={value}" for name, value in (sizes | {"budget": 100, "rounds": 1, "updates": 1}).items()]
    layouts = ["dp1", "pp2-vpp2"]
    command = [sys.executable, "-m", "benchmarks.layouts", "--device", "cpu", *options, "--layouts", *layouts]
    subprocess.run([*command, "--out", str(out)], cwd=ROOT, check=True, timeout=400)
    report = json.loads(out.read_text())
    (alone,), (pipeline,) = [update for record in report["results"] for update in record["rounds"]]
    assert alone["tokens"] == pipeline["tokens"] > 100
    assert pipeline["gradient_norm"] == pytest.approx(alone["gradient_norm"], rel=1e-4)
    assert alone["gradient_norm"] > 0 and min(alone["wall_seconds"], alone["cpu_seconds"]) > 0
    assert alone["micro_batches"] % 2 and pipeline["micro_batches"] == alone["micro_batches"] + 1
    page = written(PAGE.read_text(), tmp_path)
    assert "| one rank | 1 |" in page and "| PP2 x VPP2 | 2 |" in page
