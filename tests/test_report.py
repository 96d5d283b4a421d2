"""The report of several runs, and its tables, samples and layouts."""

from __future__ import annotations

import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dypo.cli import main
from megatron_dypo.data.arithmetic import arithmetic_tokens
from megatron_dypo.errors import UserError
from megatron_dypo.monitor.axis import linear_axis
from megatron_dypo.monitor.chart import WIDTH, Chart, Series, draw
from megatron_dypo.monitor.figures import run_color
from megatron_dypo.monitor.loggers import Writers
from megatron_dypo.monitor.panels import TABLE
from megatron_dypo.monitor.report import write_report
from megatron_dypo.monitor.run_data import read_runs
from megatron_dypo.monitor.samples import GROUPS, LONGEST, RESPONSES, SEARCHED
from megatron_dypo.monitor.tables import differing_keys
from megatron_dypo.records import Group, Prompt, Response
from megatron_dypo.rollout import recording
from tests.test_monitor import Outline, config, fill

ROOT = Path(__file__).resolve().parents[1]
HOSTILE = "</script></pre><script>alert(1)</script><img src=x onerror=alert(2)>"
KINDS = {"all right": [1.0, 1.0], "one right": [0.0, 1.0], "all wrong": [0.0, 0.0]}


def write_config(run_dir: Path, text: str) -> Path:
    (run_dir / "config.yaml").write_text(text)
    return run_dir


def record(folder: Path, step: int, groups: list[tuple[str, str, list[float]]], answer: str = "7") -> None:
    """Record a step of (id, prompt, rewards) in the built-in tokenizer's ids."""

    def ids(text: str) -> np.ndarray:
        return np.asarray(arithmetic_tokens().encode(text).ids, np.int32)

    made = [
        Group(
            Prompt(name, "", ()),
            ids(prompt),
            [Response(ids(answer), np.zeros(len(ids(answer)), np.float32), "stop", reward) for reward in rewards],
        )
        for name, prompt, rewards in groups
    ]
    recording.record(folder, step, made)


def results(value: float = 0.5, low: float = 0.25, high: float = 0.75) -> dict:
    figures = {name: {"value": value, "low": low, "high": high} for name in ("avg@4", "pass@1", "pass@4")}
    return {
        "model": "m",
        "problems": 30,
        "samples": 4,
        "figures": figures,
        "response_tokens": 812.4,
        "truncated_frac": 0.125,
        "faults": 0,
    }


# ---------------------------------------------------------------------------------------------------- several runs


def test_runs_are_laid_over_one_another_each_in_its_colour(tmp_path):
    runs = [
        fill(tmp_path / name / "run", steps, value=value) for name, steps, value in (("a", 30, 0.25), ("b", 60, 0.5))
    ]
    path = write_report(*runs, out=tmp_path / "both.html")
    page = Outline(path.read_text())
    assert path == tmp_path / "both.html" and not (runs[0] / "report.html").exists()
    charts = {title: json.loads(data) for title, data in zip(page.data["h3"], page.data["script"][:-1], strict=True)}
    # A panel of several metrics is a chart for each; the axis spans the longer run.
    assert {"Regimes: easy", "Regimes: offline ratio", "Losses: KL", "Reward", "Mismatch by size: ≥ 1"} <= set(charts)
    for series in charts["Reward"]["series"], charts["Losses: GRPO"]["series"]:
        assert [line["x"][-1] for line in series] == [30, 60]
        assert np.mean(series[0]["y"][1:]) == pytest.approx(0.25, rel=0.1)
        assert np.mean(series[1]["y"][1:]) == pytest.approx(0.5, rel=0.1)
    assert charts["Reward"]["x"] == [0, 60]
    assert all(len(chart["series"]) == 2 for chart in charts.values())
    text = path.read_text()
    for place, name in enumerate(("a/run", "b/run")):
        assert f'<i class="{run_color(place)}"></i>{name} <b>' in text
    assert page.tags.count("svg") == len(charts)


def test_gradient_shares_are_each_runs_own(tmp_path):
    for name, grpo, sft in (("a", 1.0, 3.0), ("b", 6.0, 2.0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(
            json.dumps({"step": 1, "grad_share/grpo": grpo, "grad_share/sft": sft}) + "\n"
        )
    page = Outline(write_report(tmp_path / "a", tmp_path / "b", out=tmp_path / "r.html").read_text())
    charts = dict(zip(page.data["h3"], map(json.loads, page.data["script"][:-1]), strict=True))
    assert [line["y"] for line in charts["Gradient shares: GRPO"]["series"]] == [[0.25], [0.75]]
    assert [line["y"] for line in charts["Gradient shares: SFT"]["series"]] == [[0.75], [0.25]]


def test_a_new_term_schedule_and_queue_have_panels_without_an_edit_and_absent_terms_have_none(tmp_path):
    """Only runs with a term are in its chart; the recipe follows a run's name that does not contain it."""
    steps = range(1, 4)
    rows = {
        "srft": [
            {"loss/total": 1.0, "loss/grpo": 0.0, "loss/sign": s, "grad_share/sign": 1.0, "stage": 2} for s in steps
        ],
        "chord": [
            {"loss/total": 1.0, "loss/grpo": 2.0, "loss/expert": 3.0, "objective/mu": 1 / s, "queue/length": s - 1}
            | {"source_share/rollout": 0.75, "source_share/teacher": 0.0, "source_share/expert": 0.25}
            for s in steps
        ],
    }  # fmt: skip
    for name, lines in rows.items():
        (tmp_path / name).mkdir()
        text = "".join(json.dumps({"step": step, **line}) + "\n" for step, line in zip(steps, lines, strict=True))
        (tmp_path / name / "metrics.jsonl").write_text(text)
        write_config(tmp_path / name, f"objective: {{method: {name.replace('chord', 'mix')}}}\n")
    text = write_report(tmp_path / "srft", tmp_path / "chord", out=tmp_path / "r.html").read_text()
    page = Outline(text)
    charts = dict(zip(page.data["h3"], map(json.loads, page.data["script"][:-1]), strict=True))
    assert list(charts) == [
        *("Losses: total", "Losses: GRPO", "Losses: expert", "Losses: sign", "Gradient shares"),
        *("Trained tokens: responses", "Trained tokens: experts", "Schedules", "Queue", "Stage"),
    ]  # fmt: skip
    assert [len(charts[f"Losses: {term}"]["series"]) for term in ("total", "GRPO", "expert", "sign")] == [2, 1, 1, 1]
    assert charts["Losses: sign"]["series"][0]["y"] == [1, 2, 3] and charts["Queue"]["series"][0]["y"] == [0, 1, 2]
    assert "</i>srft <b>" in text and "</i>chord (mix) <b>" in text
    alone = Outline(write_report(tmp_path / "chord").read_text())
    assert alone.data["h3"] == ["Losses", "Trained tokens", "Schedules", "Queue"]
    assert {"GRPO ", "expert ", "mu ", "length "} <= set(alone.data["span"]) and "sign " not in alone.data["span"]


def test_a_run_of_stages_is_named_with_each_stage_s_recipe(tmp_path):
    stages = "stages:\n- objective: {method: sft}\n- objective: {method: grpo}\n- objective: {method: sft}\n"
    write_config(fill(tmp_path / "both", 3), f"objective: {{method: sft}}\n{stages}")
    write_config(fill(tmp_path / "sft", 3), "objective: {method: sft}\n")
    text = write_report(tmp_path / "both", tmp_path / "sft", out=tmp_path / "r.html").read_text()
    assert "</i>both (sft, grpo) <b>" in text and "</i>sft <b>" in text


def test_final_figures_and_differing_keys_stand_side_by_side(tmp_path):
    a = write_config(fill(tmp_path / "a", 30, value=0.25), "trainer: {run_dir: a, steps: 30}\noptimizer: {lr: 1e-6}\n")
    b = write_config(
        fill(tmp_path / "b", 60, value=0.5), "trainer: {run_dir: b, steps: 60}\noptimizer: {lr: 1e-6}\nx: {y: [1, 2]}\n"
    )
    assert differing_keys(read_runs([a, b])) == {"trainer.steps": ["30", "60"], "x.y": [None, "[1, 2]"]}
    page = Outline(write_report(a, b, out=tmp_path / "r.html").read_text())
    cells = page.data["td"]
    assert cells[:2] == ["30", "60"]  # steps
    rewards = [
        np.mean([row["reward/mean"] for row in map(json.loads, (run / "metrics.jsonl").open()) if row["step"]][-10:])
        for run in (a, b)
    ]
    place = cells.index(f"{rewards[0]:.3f}")
    assert cells[place + 1] == f"{rewards[1]:.3f}"
    assert "1 keys that only some of the runs have" in page.data["summary"]


def test_of_more_than_four_lines_the_means_alone_are_drawn_and_make_the_axis(tmp_path):
    """Light lines of every step would hide each other; the pointer still reads every step."""
    values = np.ones(100)
    values[50] = 1000.0
    for count in (4, 5):
        series = [Series(str(k), "c1", np.arange(100), values) for k in range(count)]
        svg, data = draw(Chart(lines=series, extent=(0, 99)), "t")
        assert svg.count('class="raw ') == (4 if count == 4 else 0) and svg.count('class="line ') == count
        assert (data["y"][1] >= 1000) == (count == 4) and data["y"][1] > 200
        assert max(data["series"][0]["y"]) == 1000


@pytest.mark.slow
def test_eighteen_runs_can_be_told_apart_and_stay_small(tmp_path):
    assert len({run_color(place).split()[0] for place in range(12)}) == 12  # one colour per run, and then dashes
    assert len({run_color(place) for place in range(36)}) == 36
    runs = [fill(tmp_path / f"run{place}", 1000) for place in range(18)]
    path = write_report(*runs, out=tmp_path / "r.html")
    assert path.stat().st_size < 5_000_000
    Outline(path.read_text())


@pytest.mark.slow
def test_three_runs_of_ten_thousand_steps_are_small_and_quick(tmp_path):
    runs = [fill(tmp_path / name, 10_000, every=100) for name in "abc"]
    start = time.process_time()  # not wall time: others may be using the machine
    path = write_report(*runs, out=tmp_path / "r.html")
    assert time.process_time() - start < 15.0
    assert path.stat().st_size < 2_000_000


def test_runs_that_share_nothing_and_a_run_given_twice(tmp_path):
    for name, row in (("a", {"step": 1, "loss/grpo": 1.0}), ("b", {"step": 7, "x<y": None})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    page = Outline(write_report(tmp_path / "a", tmp_path / "b", out=tmp_path / "r.html").read_text())
    assert page.data["h3"] == ["Losses", "x<y"]
    with pytest.raises(UserError, match="given twice"):
        write_report(tmp_path / "a", tmp_path / "b" / ".." / "a")


def test_command_line(tmp_path, monkeypatch, capsys):
    a, b = (fill(tmp_path / name, 5) for name in "ab")
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(a)]) == 0 and (a / "report.html").exists() and not Path("report.html").exists()
    assert main(["report", str(a), str(b)]) == 0 and "2 runs compared" in Path("report.html").read_text()
    assert main(["report", str(b), "--out", "other.html"]) == 0 and Path("other.html").exists()
    assert not (b / "report.html").exists()
    assert main(["report", str(a), str(tmp_path / "none")]) == 2
    assert "none/metrics.jsonl: cannot read" in capsys.readouterr().err


def test_report_is_written_without_torch(tmp_path):
    """This includes decoding samples: a laptop with a copy of the run folder need not have torch."""
    run = write_config(fill(tmp_path / "run", 5), f"rollout: {{record: {tmp_path / 'r'}}}\nmodel: {{preset: tiny}}\n")
    record(tmp_path / "r", 1, [("p", "first 1=", [1.0])])
    check = "import sys; from megatron_dypo.cli import main; sys.exit(main(sys.argv[1:]) or 'torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", check, "report", str(run)], check=True, timeout=120)
    assert "first 1=" in (run / "report.html").read_text()


# ---------------------------------------------------------------------------------------------------- evaluations


def test_evaluation_table_has_training_and_results_files(tmp_path):
    rows = [
        {"step": step, "eval/aime24/avg@4": accuracy, "eval/aime24/pass@4": 0.5, "eval/aime24/response_tokens": 90.0}
        | {"eval/gsm8k/pass@1": accuracy / 2}  # one response per problem
        for step, accuracy in ((0, 0.125), (5, 0.25), (10, 0.375))
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, value in (("step_10", 0.5), ("base", 0.3)):
        folder = tmp_path / "evaluation" / name
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps({"math500": results(value)}))
    page = Outline(write_report(tmp_path).read_text())
    cells = page.data["td"]
    for text in (
        "training, step 0",
        "12.5%",
        "training, step 10",
        "37.5%",
        "50.0% [25.0%, 75.0%]",
        "30.0% [25.0%, 75.0%]",
    ):
        assert text in cells, text
    assert "training, step 5" not in cells and {"base", "step_10", "812", "12.5%", "90"} <= set(cells)
    # Suites of one name are adjacent, and intervals are at their place on the bar.
    suites = [cell for cell in page.data["th"] if cell in ("aime24", "gsm8k", "math500")]
    assert suites == ["aime24"] * 2 + ["gsm8k"] * 2 + ["math500"] * 2
    assert 'style="left:25.0%;width:50.0%"' in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "3",
        '{"a": 1}',
        '{"a": {}}',
        json.dumps({"a": results(low=0.6)}),
        json.dumps({"a": results(high=math.inf)}),
        json.dumps({"a": results() | {"problems": None}}),
        json.dumps({"a": results() | {"figures": {}}}),
        "[" * 100_000,
    ],
)
def test_results_that_evaluate_did_not_write_are_one_line(tmp_path, content):
    fill(tmp_path, 3)
    (tmp_path / "evaluation" / "x").mkdir(parents=True)
    (tmp_path / "evaluation" / "x" / "results.json").write_text(content)
    with pytest.raises(UserError, match=r"results\.json: not the results of an evaluation: ") as error:
        write_report(tmp_path)
    assert "\n" not in str(error.value) and not (tmp_path / "report.html").exists()


# ---------------------------------------------------------------------------------------------------- samples


def test_samples_show_one_group_of_each_regime(tmp_path):
    run = write_config(fill(tmp_path / "run", 9), "rollout: {record: ../rec}\nmodel: {preset: tiny}\n")
    record(tmp_path / "rec", 1, [(f"h{i}", f"last {i}=", [0.0, 0.0]) for i in range(5)])
    groups = [(f"{name} {i}", f"first {i}=", rewards) for name, rewards in KINDS.items() for i in range(3)]
    for step in (4, 7, 12):  # 12 is later than the metrics: the run was resumed from an older checkpoint
        record(tmp_path / "rec", step, groups, answer=" \\boxed{7}")
    page = Outline(write_report(run).read_text())
    assert page.data["h4"] == ["Step 1", "Step 4", "Step 7"]
    names = page.data["b"]
    assert [name for name in names if name in {group[0] for group in groups} or name[0] == "h"] == [
        "h0",
        "h1",
        "h2",
        *("all right 0", "one right 0", "all wrong 0") * 2,
    ]
    badges = [text for text in page.data["i"] if text in ("easy", "mid", "hard")]
    assert badges == ["hard"] * 3 + ["easy", "mid", "hard"] * 2
    assert "first 0=" in page.data["pre"] and " \\boxed{7}" in page.data["pre"]
    assert page.data["p"].count(" · right · 3 tokens · stop") == 2 * 3  # two steps, 2 + 1 + 0 responses
    several = Outline(write_report(run, fill(tmp_path / "other", 3), out=tmp_path / "r.html").read_text())
    assert several.data["h4"] == ["run", "Step 7"]


def test_samples_are_graded_by_the_run_s_own_threshold_and_hard_max_solved(tmp_path):
    keys = f"rollout: {{record: {tmp_path / 'rec'}}}\nmodel: {{preset: tiny}}\n"
    run = write_config(fill(tmp_path / "run", 3), keys + "objective: {reward_threshold: 0.3, hard_max_solved: 1}\n")
    record(tmp_path / "rec", 1, [("a", "a", [0.6, 0.0, 0.0]), ("b", "b", [0.3, 0.4]), ("c", "c", [0.3, 0.3, 0.2])])
    page = Outline(write_report(run).read_text())
    shown = [text for text in page.data["i"] + page.data["b"] if text in ("easy", "mid", "hard", "a", "b", "c")]
    assert shown == ["easy", "mid", "hard", "b", "c", "a"]


def test_hostile_and_long_texts_do_nothing(tmp_path):
    run = write_config(fill(tmp_path / "run", 3), f"rollout: {{record: {tmp_path / 'rec'}}}\nmodel: {{preset: tiny}}\n")
    record(tmp_path / "rec", 1, [(HOSTILE, HOSTILE, [0.0] * 20)], answer="x" * 5 * LONGEST)
    path = tmp_path / "rec" / "step_000001.jsonl"
    line = json.loads(path.read_text())
    line["responses"][0] |= {"fault": "\ud800\x00" + HOSTILE}
    path.write_text(json.dumps(line) + "\n")
    (run / "evaluation" / "x<b>").mkdir(parents=True)
    (run / "evaluation" / "x<b>" / "results.json").write_text(json.dumps({HOSTILE + "\udc00": results()}))
    text = write_report(run).read_text()
    page = Outline(text)
    assert not {"img", "b>"} & set(page.tags) and "onerror" not in page.attributes
    assert page.tags.count("script") == page.tags.count("figure") + 1
    assert HOSTILE in page.data["pre"] and any(HOSTILE[:60] in name for name in page.data["b"])
    assert page.data["p"].count("and 12 more") == 1 and text.count("characters left out") == RESPONSES
    assert not re.search(r"[\x00-\x08\x0b-\x1f]", text)


def test_a_large_step_is_not_read_to_its_end(tmp_path):
    run = write_config(fill(tmp_path / "run", 3), f"rollout: {{record: {tmp_path / 'rec'}}}\n")
    record(tmp_path / "rec", 1, [(f"p{i}", "1=", [0.0, 0.0]) for i in range(SEARCHED)])
    with (tmp_path / "rec" / "step_000001.jsonl").open("a") as file:
        file.write("never read\n")
    text = write_report(run).read_text()
    page = Outline(text)
    assert text.count('<details class="group"') == GROUPS
    assert any("Token ids: the tokenizer has no tokenizer.json here." in text for text in page.data["p"])
    assert "1 82" not in page.data["pre"] and any(re.fullmatch(r"\d+ \d+", text) for text in page.data["pre"])


@pytest.mark.parametrize(
    "line", ["{", "[]", "{}", '{"id": 1, "prompt_ids": [1], "responses": []}', "null", "[" * 100_000]
)
def test_a_file_that_is_no_recorded_step_is_named(tmp_path, line):
    run = write_config(fill(tmp_path / "run", 3), f"rollout: {{record: {tmp_path / 'rec'}}}\n")
    record(tmp_path / "rec", 2, [("p", "1=", [0.0])])
    with (tmp_path / "rec" / "step_000002.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(UserError, match=r"step_000002\.jsonl:2: not a recorded rollout"):
        write_report(run)


def test_sft_records_no_response_and_has_a_report(tmp_path):
    config = f"rollout: {{record: {tmp_path / 'rec'}}}\nobjective: {{method: sft}}\n"
    run = write_config(fill(tmp_path / "run", 3), config)
    step = recording.step_file(tmp_path / "rec", 2)
    recording.record(tmp_path / "rec", 2, [Group(Prompt("p", "2", (), "1+1="), np.array([1, 2]))])
    assert json.loads(step.read_text())["responses"] == []
    assert "Sample rollouts" not in Outline(write_report(run).read_text()).data["h2"]
    other = write_config(fill(tmp_path / "other", 3), "objective: {method: sft}\n")
    assert Outline(write_report(run, other, out=tmp_path / "r.html").read_text()).data["h2"]


def test_a_models_own_tokenizer_decodes(tmp_path):
    run = write_config(
        fill(tmp_path / "run", 3), f"rollout: {{record: {tmp_path / 'rec'}}}\nmodel: {{hf: {tmp_path / 'model'}}}\n"
    )
    record(tmp_path / "rec", 1, [("p", "last 5=", [0.0])])
    (tmp_path / "model").mkdir()
    tokens = arithmetic_tokens()
    tokens.save(str(tmp_path / "model" / "tokenizer.json"))
    assert "last 5=" in Outline(write_report(run).read_text()).data["pre"]
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    assert "last 5=" not in Outline(write_report(run).read_text()).data["pre"]


# ---------------------------------------------------------------------------------------------------- TensorBoard


def test_tensorboard_gets_the_reports_panels(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.custom_scalar import layout_pb2

    writers = Writers(config(tmp_path, tensorboard=True), tmp_path)
    writers.write(1, {"gal/eta": 0.5})
    writers.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (event,) = events.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    found = {category.title: [chart.title for chart in category.chart] for category in layout.category}
    assert found == {
        heading: [panel.title for panel in panels] + ["Held-out evaluation"] * (heading == "Learning")
        for heading, panels in TABLE.items()
    }
    charts = {chart.title: list(chart.multiline.tag) for category in layout.category for chart in category.chart}
    keys = [curve.key for panels in TABLE.values() for panel in panels for curve in panel.curves]
    for key in random.Random(0).sample(keys, 20):
        assert sum(bool(re.match(tag, key)) for tags in charts.values() for tag in tags) == 1, key
    (evaluation,) = charts["Held-out evaluation"]
    assert [bool(re.match(evaluation, f"eval/x/{name}")) for name in ("avg@32", "pass@4", "response_tokens")] == [
        1,
        1,
        0,
    ]


# ---------------------------------------------------------------------------------------------------- axes


def count_ticks(values: np.ndarray) -> list[str]:
    series = Series("ranks", "c1", np.arange(len(values)), values)
    svg, _ = draw(Chart(lines=[series], exact=True, count=True, extent=(0, len(values))), "t")
    return re.findall(r'class="tick y"[^>]*>([^<]*)<', svg)


@given(
    st.lists(st.integers(0, 5000).map(float), min_size=1, max_size=12)
    | st.lists(st.floats(0, 5000) | st.floats(5.1, 5.9), min_size=1, max_size=12)
)
@settings(deadline=None)
def test_counts_and_ranks_have_whole_ticks_whatever_their_values(values):
    """Also means of counts, and those that lie between two whole numbers: an axis has two ticks at least."""
    numbers = np.array(values)
    ticks = count_ticks(numbers)
    assert len(ticks) > 1 and all("." not in tick or tick.endswith("k") for tick in ticks)
    assert len(set(ticks)) == len(ticks)
    lo, hi, marks = linear_axis(numbers, False, whole=True)
    assert lo <= numbers.min() and numbers.max() <= hi and all(mark % 1 == 0 for mark, _ in marks)


def test_panels_of_counts_have_whole_ticks(tmp_path):
    """Whichever metrics of a run count tokens, prompts, updates, steps or ranks."""
    rows = [{"step": step, **dict.fromkeys(COUNTS, 5.2 + 0.1 * step)} for step in range(4)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    figures = re.findall(r"<figure>.*?</figure>", write_report(tmp_path).read_text(), re.DOTALL)
    ticks = {figure: re.findall(r'class="tick y"[^>]*>([^<]*)<', figure) for figure in figures}
    assert len(ticks) == 8 and all("." not in "".join(marks) and len(marks) > 1 for marks in ticks.values())


COUNTS = (
    *("queue/length", "stage", "train/skipped_steps", "train/warnings", "rollout/staleness_mean"),
    *("rollout/response_tokens", "rollout/refilled", "perf/straggler_rank"),
)


def test_what_is_not_counted_keeps_its_ticks():
    series = Series("lr", "c1", np.arange(3), np.array([0.1, 0.5, 1.0]))
    svg, _ = draw(Chart(lines=[series], exact=True, extent=(0, 3)), "t")
    assert ">0.2<" in svg


# ---------------------------------------------------------------------------------------------------- style


STYLE = (ROOT / "megatron_dypo/monitor/page/report.css").read_text()


def chart_widths(page: int) -> set[float]:
    """Widths of a chart on a page this wide: a column less the figure's padding (14) and border (1), both sides."""
    main = min(page, 1480) - 2 * (12 if page <= 480 else 20)
    columns = max(1, (main + 14) // (400 + 14))
    return {(main - 14 * (columns - 1)) / columns - 2 * (14 + 1)}


def test_text_is_at_least_11_pixels_high_at_every_width_of_a_screen():
    (wide,) = re.findall(r"^svg \{[^}]*font: ([\d.]+)px", STYLE, re.MULTILINE)
    rules = re.findall(r"@container \(max-width: ([\d.]+)px\) \{\s*svg \{ font-size: ([\d.]+)px \}\s*\}", STYLE)
    for page in range(320, 2001):
        for width in chart_widths(page):
            units = [wide, *(size for most, size in rules if width <= float(most))][-1]
            assert float(units) * width / WIDTH >= 11, (page, width)
    sizes = re.findall(r"font(?:-size)?: ([\d.]+)px", STYLE)
    assert len(sizes) > 20 and min(map(float, sizes)) >= 11


# ---------------------------------------------------------------------------------------------------- package files


def test_a_wheel_writes_the_same_report(tmp_path):
    """The templates, the style sheet and the script are in it."""
    source = tmp_path / "source"  # which the build writes to
    shutil.copytree(ROOT / "megatron_dypo", source / "megatron_dypo", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"  # as pip does
    built = subprocess.run([sys.executable, "-c", build, tmp_path], cwd=source, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    run = fill(tmp_path / "run", 3)
    check = "import sys; from megatron_dypo import cli; print(cli.__file__); cli.main(sys.argv[1:])"
    shown = subprocess.run(
        [sys.executable, "-c", check, "report", str(run)],
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert shown.returncode == 0 and shown.stdout.startswith(str(tmp_path / "site")), shown.stderr
    written = (run / "report.html").read_text()
    assert written == write_report(run, out=tmp_path / "here.html").read_text()
