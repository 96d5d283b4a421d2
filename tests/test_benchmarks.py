"""The head's benchmark at a tiny size, and the page that shows the stored results."""

from __future__ import annotations

import json
import subprocess
import sys

from benchmarks.tables import PAGE, RESULTS, ROOT, written


def test_performance_page_shows_the_stored_results():
    page = PAGE.read_text()
    assert written(page, RESULTS) == page, "run `python -m benchmarks.tables`"


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
        if active < 1 or head != "ours_compacted"  # where all are active it is ``ours``
    ]
    for record in records:
        assert record["errors"]["logp"] < 2e-5 and record["errors"]["dhidden"] < 1e-5, record
        assert record["errors"]["dweight"] < 1e-5, record
        assert all(figures["cpu_seconds"] > 0 for figures in record["rounds"]), record
    # three [T, V] of 16 MiB and the weight's gradient of 8; after it 0.4 MiB, not what the process once held
    naive = {r["vocab"]: [figures["peak_mib"] for figures in r["rounds"]] for r in records if r["head"] == "naive"}
    assert all(40 < peak < 80 for peak in naive[65536]), naive
    assert all(0.2 < peak < 20 for peak in naive[512]), naive
    page = written(PAGE.read_text(), tmp_path)
    assert "| CPU-seconds at most 0.5x naive at 42% active, slopes zero | 64, 32, 512 |" in page
