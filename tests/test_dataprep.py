"""Dataset preparation: every layout, every filter's count, overlaps, and a kill that changes nothing in the output."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_dypo.data import rows
from megatron_dypo.data.tokenizer import arithmetic_backend
from megatron_dypo.dataprep import reading, sources
from megatron_dypo.dataprep.filters import EvaluationProblems, normalised, problem_key, words
from megatron_dypo.dataprep.options import INSTRUCTION, Options
from megatron_dypo.dataprep.prepare import prepare
from megatron_dypo.dataprep.sources import find_sources
from megatron_dypo.dataprep.store import Store
from megatron_dypo.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared/data"
TOOL = ROOT / "tools/prepare_data.py"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not there")


def write(path: Path, *records: Any) -> str:
    if path.suffix == ".parquet":
        names = {name: None for record in records for name in record}
        table = pa.Table.from_pylist([names | record for record in records])
        parquet.write_table(table, path, row_group_size=max(3, len(records) // 20))
    elif path.suffix == ".json":
        path.write_text(json.dumps(records))
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def run(folder: Path, *records: Any, name: str = "in.jsonl", **options: Any) -> tuple[list[dict], dict[str, int]]:
    """Return (output rows, counts) for these records."""
    return run_files(folder, write(folder / name, *records), **options)


def run_files(folder: Path, *files: str, **options: Any) -> tuple[list[dict], dict[str, int]]:
    counts = prepare(Options(files, **options), folder / "out.jsonl")
    check_sums(counts)
    rows.read(str(folder / "out.jsonl"))  # the output is what training reads
    return [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()], counts


def check_sums(counts: dict[str, int]) -> None:
    """Check that nothing is counted twice or lost without a count."""
    of = counts.get
    problems = of("rows written", 0) + of("problems without a trace, left out", 0)
    assert of("rows: new problem", 0) == problems
    written = sum(count for name, count in counts.items() if name.startswith("traces written: "))
    assert of("traces: kept", 0) == written + of("kept traces beyond the number per teacher", 0)


def asked(problem: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"{problem}\n\n{INSTRUCTION}"}]


def teacher(name: str, trace: str) -> dict[str, str]:
    return {"name": name, "trace": trace}


# --- layouts

OPENR1 = {
    "problem": "What is $2+3$?",
    "solution": "It is 5.",
    "answer": "5",
    "uuid": "u-1",
    "source": "olympiads",
    "question_type": "math-word-problem",
    "generations": ["<think>a</think> \\boxed{6}", "<think>b", "<think>c</think> \\boxed{5}", "d \\boxed{5}"],
    "is_reasoning_complete": [True, False, True, True],
    "correctness_math_verify": [False, False, True, True],
    "finish_reasons": ["stop", "length", "stop", "stop"],
}
CHAT = [{"role": "system", "content": "Think."}, {"role": "user", "content": "What is 2 + 3?"}]
LUFFY = {
    "prompt": CHAT,
    "target": [{"role": "assistant", "content": "<think>x</think>\\boxed{5}"}],
    "reward_model": {"ground_truth": "5", "style": "rule"},
    "data_source": "openr1",
    "extra_info": {"index": 7, "split": "train"},
}
GSM8K = {"question": "Half of 48 and 48?", "answer": "Half is 48/2=<<48/2=24>>24.\nAll: <<24+48=72>>72 clips.\n#### 72"}
MATH = {"problem": "What is 1/2 of 1?", "solution": "So \\boxed{\\frac{1}{2}}", "level": "Level 1", "type": "Algebra"}


def test_openr1(tmp_path):
    found, counts = run(tmp_path, OPENR1)
    assert found == [
        {
            "id": "u-1",
            "prompt": asked("What is $2+3$?"),
            "ground_truth": "5",
            "teachers": [teacher("deepseek-r1", "<think>c</think> \\boxed{5}")],
            "data_source": "olympiads",
        }
    ]
    assert counts["traces read"] == 4 and counts["traces: incomplete"] == counts["traces: wrong answer"] == 1
    assert counts["traces: kept"] == 2 and counts["kept traces beyond the number per teacher"] == 1
    assert len(run(tmp_path, OPENR1, traces_per_teacher=0)[0][0]["teachers"]) == 2


@pytest.mark.parametrize("name", ["in.jsonl", "in.json", "in.parquet"])
def test_luffy_keeps_its_prompt(tmp_path, name):
    (row,), _ = run(tmp_path, LUFFY, name=name)
    assert row["prompt"] == CHAT and row["teachers"] == [teacher("deepseek-r1", "<think>x</think>\\boxed{5}")]
    assert row["extra_info"] == {"index": 7, "split": "train"} and row["data_source"] == "openr1"


def test_luffy_with_several_targets_numbers_them_as_training_does(tmp_path):
    (row,), _ = run(tmp_path, LUFFY | {"target": None, "target_lst": ["a \\boxed{5}", "b \\boxed{5}"]})
    assert [entry["name"] for entry in row["teachers"]] == ["target-0", "target-1"]


@pytest.mark.parametrize(
    "options, prompt",
    [
        ({"instruction": "Go."}, [CHAT[0], {"role": "user", "content": "What is 2 + 3?\n\nGo."}]),
        ({"system": ""}, asked("What is 2 + 3?")),
        ({"system": "S", "instruction": ""}, [{"role": "system", "content": "S"}, CHAT[1]]),
    ],
)
def test_instruction_and_system_message_make_the_prompt_anew(tmp_path, options, prompt):
    assert run(tmp_path, LUFFY, **options)[0][0]["prompt"] == prompt


def test_gsm8k_gives_two_teachers(tmp_path):
    (row,), _ = run(tmp_path, GSM8K)
    assert row["prompt"] == asked("Half of 48 and 48?") and row["ground_truth"] == "72"
    assert row["teachers"] == [
        teacher("solution", "Half is 48/2=24.\nAll: 72 clips.\nThe answer is \\boxed{72}."),
        teacher("equations", "48/2=24\n24+48=72\n\\boxed{72}"),
    ]


@pytest.mark.parametrize("worked", ["No marks. #### 1,080", "<<1+1=2>>2, and so on. #### 1,080"])
def test_gsm8k_without_a_chain_to_the_answer_has_one_teacher(tmp_path, worked):
    (row,), _ = run(tmp_path, {"question": "q", "answer": worked})
    assert [entry["name"] for entry in row["teachers"]] == ["solution"] and row["ground_truth"] == "1080"
    assert row["teachers"][0]["trace"].endswith("\\boxed{1080}.") and "<<" not in row["teachers"][0]["trace"]


def test_math_takes_the_last_box_for_the_answer(tmp_path):
    (row,), _ = run(tmp_path, MATH)
    assert row["ground_truth"] == "\\frac{1}{2}" and row["teachers"] == [teacher("solution", MATH["solution"])]
    (row,), _ = run(tmp_path, MATH | {"answer": "0.5"})
    assert row["ground_truth"] == "0.5", "the grader knows that the solution's box is the same"


def test_boxes_that_together_are_the_answer_of_a_solution_are_its_ground_truth(tmp_path):
    solution = "So $x=\\boxed{1}$ or $x=\\boxed{-2}$."
    (row,), _ = run(tmp_path, MATH | {"solution": solution})
    assert row["ground_truth"] == "1, -2" and row["teachers"] == [teacher("solution", solution)]


def test_any_columns(tmp_path):
    record = {"q": "What is 1+1?", "a": 2, "cot": "\\boxed{2}", "who": "qwen", "nr": 9}
    names = {"prompt": "q", "ground_truth": "a", "trace": "cot"}
    (row,), _ = run(tmp_path, record, columns=names | {"teacher": "who", "id": "nr"})
    assert row == {
        "id": "9",
        "prompt": asked("What is 1+1?"),
        "ground_truth": "2",
        "teachers": [teacher("qwen", "\\boxed{2}")],
    }
    assert run(tmp_path, record, columns=names)[0][0]["teachers"] == [teacher("cot", "\\boxed{2}")]
    assert run(tmp_path, record, columns=names, teacher="me")[0][0]["teachers"] == [teacher("me", "\\boxed{2}")]


def test_our_own_rows_come_out_as_they_went_in(tmp_path):
    records = [
        {"id": "a", "prompt": "plain?", "ground_truth": "1", "teachers": [teacher("t", "\\boxed{1}")]},
        {"id": "b", "prompt": CHAT, "ground_truth": "5", "teachers": [teacher("t", "\\boxed{5}")], "data_source": "s"},
    ]
    found, _ = run(tmp_path, *records)
    assert found == records
    again, _ = run_files(tmp_path, str(tmp_path / "out.jsonl"))
    assert again == records


def test_a_file_of_no_known_layout_is_named(tmp_path):
    with pytest.raises(
        UserError, match=r"in\.jsonl: no known layout has these columns \(a, b\): name it with --layout"
    ):
        run(tmp_path, {"a": 1, "b": 2})


# --- problems: merging, answers


def test_traces_of_one_problem_are_merged_over_files(tmp_path):
    first = write(tmp_path / "a.jsonl", OPENR1, OPENR1 | {"problem": "other", "uuid": "u-2"})
    second = write(tmp_path / "b.parquet", LUFFY | {"target": "<think>y</think>\\boxed{5}"})
    found, _ = run_files(tmp_path, first, second)
    assert [len(row["teachers"]) for row in found] == [1, 1]  # both are deepseek-r1's
    found, counts = run_files(tmp_path, first, second, traces_per_teacher=0)
    assert [entry["trace"][:8] for entry in found[0]["teachers"]] == ["<think>c", "d \\boxed", "<think>y"]
    assert counts["rows: problem seen before, traces merged"] == 1 and counts["rows: new problem"] == 2


def problem(text: str, answer: str = "5", *traces: str, **fields: Any) -> dict:
    return {
        "prompt": text,
        "ground_truth": answer,
        "teachers": [teacher("t", trace) for trace in traces or [f"\\boxed{{{answer}}}"]],
    } | fields


def test_the_first_of_conflicting_answers_stands(tmp_path):
    records = [
        problem("p", "1/2", "a \\boxed{1/2}"),
        problem("p", "0.5", "b \\boxed{0.5}"),
        problem("p", "2", "c \\boxed{2}"),
        problem("p", "3", "c \\boxed{1/2}"),
    ]
    (row,), counts = run(tmp_path, *records, traces_per_teacher=0)
    assert row["ground_truth"] == "1/2" and len(row["teachers"]) == 3, "0.5 is the same answer"
    assert counts["ground truths that differ from an earlier row's"] == 2 and counts["traces: wrong answer"] == 1


@pytest.mark.parametrize(
    "left, right, same",
    [
        ("What is $2+3$?", "what is  \\(2 + 3\\)?", True),
        ("Find \\dfrac{1}{2}x.", "Find $\\frac{1}{2} x$", True),
        ("Costs \\$5", "Costs $5", True),
        ("caf\u00e9", "cafe\u0301", True),
        ("What is 2+3?", "What is 2-3?", False),
        ("What is 2\u00b2?", "What is 22?", False),
        ("What is \\left(1\\right)?", "What is (1)?", True),
        ("Let \\leftarrow be", "Let arrow be", False),
    ],
)
def test_what_makes_two_problems_the_same(left, right, same):
    assert (problem_key(left) == problem_key(right)) is same, (normalised(left), normalised(right))


def test_ids_are_kept_where_they_tell_problems_apart(tmp_path):
    found, _ = run(tmp_path, problem("p", id="x"), problem("q", id="x"), problem("r"))
    assert [row["id"] for row in found] == ["x", problem_key("q")[:16], problem_key("r")[:16]]


# --- filters


def test_traces_that_are_no_examples_are_counted_and_end_markers_taken_off(tmp_path):
    folder = tmp_path / "tokenizer"
    arithmetic_backend().save_pretrained(folder)
    traces = {
        "no answer after the thought": "<think>so \\boxed{5}</think>\n",
        "thought twice": "<think>a</think>\n<think>a</think>\\boxed{5}",
        "incomplete": "[THINK]a \\boxed{5}",
        "end token inside": "a<eos>b \\boxed{5}",
        "kept": "<think>a</think>\\boxed{5}<eos>\n",
    }
    teachers = [teacher(f"t{i}", trace) for i, trace in enumerate(traces.values())]
    row = {"prompt": "1?", "ground_truth": "5", "teachers": teachers}
    found, counts = run(tmp_path, row, tokenizer=str(folder))
    assert {name: counts[f"traces: {name}"] for name in traces} == dict.fromkeys(traces, 1)
    assert [each["trace"] for each in found[0]["teachers"]] == ["<think>a</think>\\boxed{5}"]
    found, _ = run(tmp_path, {**row, "teachers": [teacher("t", "\\boxed{5}<|im_end|>")]})
    assert found[0]["teachers"][0]["trace"] == "\\boxed{5}", "without a tokenizer, too"


@pytest.mark.parametrize("layout", ["rows", "math"])
def test_swallowed_backslashes_are_refused_by_row_or_put_back_and_counted(tmp_path, layout):
    broken = {
        "rows": {
            "prompt": "What is $\\frac12$ of 1?",
            "ground_truth": "\frac12",
            "teachers": [teacher("t", "\boxed{\frac12}")],
        },
        "math": {"problem": "What is $\frac12$ of 1?", "solution": "It is $\boxed{\\frac12}$."},
    }
    good = {"rows": problem("1?", "1", "\\boxed{1}"), "math": {"problem": "1?", "solution": "\\boxed{1}"}}
    source = write(tmp_path / "in.jsonl", good[layout], broken[layout])
    with pytest.raises(UserError, match=r"in\.jsonl:2: .* holds a control character where .*--repair-escapes"):
        run_files(tmp_path, source)
    found, counts = run_files(tmp_path, source, repair_escapes=True)
    assert counts["swallowed backslashes put back, rows"] == 1
    assert "What is $\\frac12$" in str(found[-1]["prompt"]).replace("\\\\", "\\")
    assert found[-1]["ground_truth"] == "\\frac12" and "\\boxed{\\frac12}" in found[-1]["teachers"][0]["trace"]
    counts = prepare(Options((str(tmp_path / "in.jsonl"),), skip_bad_rows=True), tmp_path / "skipped.jsonl")
    assert counts["rows: malformed"] == 1


def test_every_filter_has_its_count(tmp_path):
    folder = tmp_path / "tokenizer"
    backend = arithmetic_backend()  # one token per character
    backend.save_pretrained(folder)
    open_thought = "<think>so <think>on</think> and <think>on \\boxed{5}"
    records = [
        problem("1?", "5", "fine \\boxed{5}"),
        problem("1?", "5", "fine \\boxed{5}"),  # the same trace
        problem("1?", "5", "x" * 60 + "\\boxed{5}"),
        problem("2?", "5", "wrong \\boxed{6}"),
        problem("3?", "5", open_thought),
        problem("4" * 50 + "?", "5"),
        problem("5?", "", "x"),
        problem("6?", "not found", "x"),
        problem("7?", "proof", "Q.E.D."),
        problem("In an urn are seven red and nine blue balls; how many are there?", "16"),
    ]
    evaluation = write(tmp_path / "eval.json", {"question": "In an urn are $7$ red balls"}, {"problem": "9?"},
                       {"prompt": "In an urn are seven red and nine blue balls, how many are there"})  # fmt: skip
    limits = {"tokenizer": str(folder), "max_prompt_tokens": 40, "max_trace_tokens": 60}
    found, counts = run(tmp_path, *records, decontaminate=(evaluation,), **limits)
    assert counts == {
        "rows read": 10,
        "traces read": 5,
        "rows: new problem": 3,
        "rows: no answer": 2,
        "rows: overlaps with evaluation": 1,
        "rows: problem seen before, traces merged": 2,
        "rows: prompt too long": 1,
        "rows: proof, nothing to check": 1,
        "traces: duplicate": 1,
        "traces: incomplete": 1,
        "traces: kept": 1,
        "traces: too long": 1,
        "traces: wrong answer": 1,
        "problems without a trace, left out": 2,
        "rows written": 1,
        "traces written: t": 1,
    }
    assert [row["prompt"] for row in found] == ["1?"]
    report = json.loads((tmp_path / "out.jsonl.report.json").read_text())
    assert report["counts"] == counts and report["overlaps"][0]["where"].endswith("eval.json:3")
    kept, _ = run(tmp_path, *records, keep_without_trace=True)
    assert [(row["prompt"], len(row["teachers"])) for row in kept][1:3] == [("2?", 0), ("3?", 0)]


def test_a_limit_is_in_tokens_with_the_end_token(tmp_path):
    folder = tmp_path / "tokenizer"
    backend = arithmetic_backend()
    backend.save_pretrained(folder)
    length = len(backend("\\boxed{5}")["input_ids"]) + 1
    for limit, written in ((length, 1), (length - 1, 0)):
        found, _ = run(tmp_path, problem("p"), tokenizer=str(folder), max_trace_tokens=limit)
        assert len(found) == written


def test_marks_are_believed_only_when_asked_for(tmp_path):
    lying = OPENR1 | {"correctness_math_verify": [True, False, False, None], "finish_reasons": None}
    (row,), _ = run(tmp_path, lying, verify="marks", traces_per_teacher=0)
    assert [entry["trace"][-2] for entry in row["teachers"]] == ["6", "5"], "where there is no mark, the grader decides"
    (row,), _ = run(tmp_path, lying, verify="none", traces_per_teacher=0)
    assert [entry["trace"][-2] for entry in row["teachers"]] == ["6", "5", "5"]
    (row,), _ = run(tmp_path, lying, traces_per_teacher=0)
    assert [entry["trace"][-2] for entry in row["teachers"]] == ["5", "5"]


def test_proofs_are_known_by_their_type(tmp_path):
    _, counts = run(tmp_path, OPENR1 | {"question_type": "proof"}, MATH | {"generations": [], "answer": "Proof."})
    assert counts["rows: proof, nothing to check"] == 2


@pytest.mark.parametrize(
    "record, complaint",
    [
        ({"prompt": "p", "ground_truth": "1", "teachers": "t"}, "in.jsonl:2: teachers: expected a list"),
        ([1], "in.jsonl:2: expected an object"),
        (problem("p \ud800"), "in.jsonl:2: .*half a surrogate pair"),
    ],
)
def test_malformed_rows_stop_or_are_counted(tmp_path, record, complaint):
    source = write(tmp_path / "in.jsonl", problem("first"), record)
    with pytest.raises(UserError, match=complaint):
        run_files(tmp_path, source)
    found, counts = run_files(tmp_path, source, skip_bad_rows=True)  # continues from what the first run left
    assert len(found) == 1 and counts["rows: malformed"] == 1


# --- overlaps with evaluation


@needs_shared
def test_evaluation_problems_are_found_in_another_typesetting():
    evaluation = EvaluationProblems(find_sources([str(SHARED / "eval")]), 8, 0.5, INSTRUCTION)
    texts = [text for text, _, _ in evaluation._problems]
    assert len(texts) > 1700
    for text in texts:
        changed = text.replace("$", " \\) ").replace("\\left(", "(").replace(" ", "\n ").replace("Find", "FIND")
        assert evaluation.hit(changed)
        if len(words(text)) >= 8:
            assert evaluation.hit(f"Problem 7, for 3 points. {text.replace(',', ' ')} Explain your answer.")


@needs_shared
def test_phrases_that_many_problems_share_are_no_overlap():
    """AIME's closing sentence alone is longer than the 13 words that some treat as proof of contamination."""
    names = ["AIME24.json", "AIME25.json", "AMC23.json", "MATH-500.json"]
    for name in names:
        others = find_sources([str(SHARED / "eval" / other) for other in names if other != name])
        (own,) = find_sources([str(SHARED / "eval" / name)])
        evaluation = EvaluationProblems(others, 8, 0.5, INSTRUCTION)
        hits = [hit for _, row in own.rows() if (hit := evaluation.hit(row["prompt"]))]
        assert not hits
        if name.startswith("AIME"):
            strict = EvaluationProblems(others, 13, 1e-9, INSTRUCTION)
            assert any(strict.hit(row["prompt"]) for _, row in own.rows())


def test_the_instruction_is_no_overlap(tmp_path):
    source = write(tmp_path / "eval.jsonl", {"prompt": asked("What is the sum of one and two?")})
    evaluation = EvaluationProblems(find_sources([source]), 4, 0.3, INSTRUCTION)
    assert not evaluation.hit("Please reason step by step, and put your final answer within \\boxed{}.")
    assert evaluation.hit("So, what is the sum of one and two?").share == pytest.approx(8 / 8)


def test_an_evaluation_file_without_problems_is_named(tmp_path):
    with pytest.raises(UserError, match=r"eval\.jsonl:1: no evaluation problem here"):
        run(tmp_path, problem("p"), decontaminate=(write(tmp_path / "eval.jsonl", {"text": "x"}),))


# --- sources


@pytest.mark.slow
@given(st.lists(st.recursive(st.none() | st.text() | st.floats(allow_nan=False) | st.integers(), st.lists)))
def test_a_json_list_is_read_piece_by_piece(values):
    path = Path(os.environ["PYTEST_LIST_FOLDER"]) / "list.json"
    path.write_text(json.dumps([{"value": value} for value in values], indent=1, ensure_ascii=True))
    (source,) = find_sources([str(path)])
    assert [row["value"] for _, row in source.rows()] == values
    assert [number for number, _ in source.rows(2)] == list(range(3, len(values) + 1))


@pytest.fixture(autouse=True)
def small_pieces(tmp_path_factory, monkeypatch) -> None:
    """Use small pieces, so that a few rows make many batches."""
    monkeypatch.setenv("PYTEST_LIST_FOLDER", str(tmp_path_factory.getbasetemp()))
    monkeypatch.setattr(sources, "_CHUNK", 5)
    monkeypatch.setattr(reading, "_ROWS", 2)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
@pytest.mark.parametrize("start", [0, 2, 3, 7, 10, 11])
def test_rows_from_any_place_on(tmp_path, name, start):
    (source,) = find_sources([write(tmp_path / name, *({"value": i} for i in range(1, 11)))])
    assert list(source.rows(start)) == [(i, {"value": i}) for i in range(start + 1, 11)]


def test_a_folder_is_its_files_by_name(tmp_path):
    (tmp_path / "in/deep").mkdir(parents=True)
    for name in ("in/b.jsonl", "in/a.json", "in/deep/c.parquet", "in/notes.txt"):
        if name.endswith("txt"):
            (tmp_path / name).write_text("no data")
        else:
            write(tmp_path / name, {"prompt": name})
    assert [row["prompt"] for source in find_sources([str(tmp_path / "in")]) for _, row in source.rows()] == [
        "in/a.json",
        "in/b.jsonl",
        "in/deep/c.parquet",
    ]


@pytest.mark.parametrize(
    "name, content, complaint",
    [
        ("a.jsonl", None, "a.jsonl: No such file"),
        ("a.csv", "x", "a.csv: expected a file .jsonl, .json, .parquet"),
        ("a.jsonl", '{"prompt": "x", "ground_truth": 1}\n{"pro', "a.jsonl: row 2: not valid JSON"),
        ("a.json", '[{"prompt": "x", "ground_truth": 1}, {"pro', "a.json: row 2: the list is cut off"),
        ("a.json", '{"prompt": "x"}', "a.json: expected a list of rows"),
        ("a.parquet", "PAR1 no", "a.parquet: not a readable Parquet file"),
    ],
)
def test_unreadable_inputs_are_named(tmp_path, name, content, complaint):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=complaint):
        run_files(tmp_path, str(tmp_path / name))


def test_data_sets_of_the_hub_need_the_library(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"^hub:some/set: data sets of the hub need the library `datasets`"):
        run_files(tmp_path, "hub:some/set")


def test_a_hub_data_set_streams_from_any_row_on(tmp_path):
    """Stream from a folder with a hub data set's layout, which the library reads the same way."""
    pytest.importorskip("datasets")
    (tmp_path / "set").mkdir()
    write(tmp_path / "set/train-00000.parquet", *(problem(f"{i}?", id=str(i)) for i in range(10)))
    (source,) = find_sources([f"hub:{tmp_path}/set?split=train"])
    assert [(number, row["prompt"]) for number, row in source.rows(7)] == [(8, "7?"), (9, "8?"), (10, "9?")]
    found, _ = run_files(tmp_path, f"hub:{tmp_path}/set?split=train")
    assert [row["id"] for row in found] == [str(i) for i in range(10)]
    with pytest.raises(UserError, match="cannot be read from the hub"):
        run_files(tmp_path, f"hub:{tmp_path}/set?split=none")


# --- output, resume


def test_parquet_holds_the_same_rows(tmp_path):
    records = [
        problem("p", "1", prompt=CHAT, extra_info={"index": 1}),
        problem("q", "2", prompt=[{"role": "user", "content": "q"}], extra_info={"split": "x"}),
    ]
    source = write(tmp_path / "in.jsonl", *records)
    for name in ("out.jsonl", "out.parquet"):
        prepare(Options((source,)), tmp_path / name)
    lines, table = (rows.read(str(tmp_path / name)) for name in ("out.jsonl", "out.parquet"))
    assert len(lines) == 2 and [vars(p) | {"extra": ""} for p in lines] == [vars(p) | {"extra": ""} for p in table]
    assert [json.loads(p.extra) for p in table] == [{"index": 1, "split": None}, {"index": None, "split": "x"}]


def test_parquet_takes_one_kind_of_prompt(tmp_path):
    source = write(tmp_path / "in.jsonl", problem("p"), problem("q", prompt=CHAT))
    with pytest.raises(UserError, match="Parquet takes chats or plain prompts, not both"):
        prepare(Options((source,)), tmp_path / "out.parquet")
    assert not (tmp_path / "out.parquet").exists()
    prepare(Options((source,), instruction="Go."), tmp_path / "out.parquet", restart=True)
    assert len(rows.read(str(tmp_path / "out.parquet"))) == 2


def mixed(count: int) -> Iterator[dict]:
    """Yield rows with every outcome, in a fixed order, including repeated problems."""
    for i in range(count):
        wrong = f"no \\boxed{{{i}.5}}" if i % 5 == 0 else f"{i} \\boxed{{{i % 7}}}"
        answer = "" if i % 11 == 0 else str(i % 7)
        yield problem(f"What is number {i % (count * 2 // 3)}?", answer, wrong, "<think>" if i % 3 else "\\boxed{1}")


class Stopped(Exception):
    pass


def test_stopped_at_any_commit_it_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    files = (write(tmp_path / "a.jsonl", *mixed(9)), write(tmp_path / "b.parquet", *mixed(12)))
    options = Options(files, decontaminate=(write(tmp_path / "e.json", {"problem": "What is number 4?"}),))
    counts = prepare(options, tmp_path / "whole.jsonl")
    commit, commits = Store.commit, []

    def stopping(self: Store, *place: int) -> None:
        commit(self, *place)
        commits.append(place)
        raise Stopped

    monkeypatch.setattr(Store, "commit", stopping)
    out = tmp_path / "stopped.jsonl"
    for _ in range(100):
        try:
            assert prepare(options, out) == counts
            break
        except Stopped:
            assert not out.exists()
    assert len(commits) == 5 + 6 + 2, "a batch of two rows each, and the end of each file"
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert sorted(path.name for path in tmp_path.glob("stopped*")) == ["stopped.jsonl", "stopped.jsonl.report.json"]


def tool(*arguments: Any) -> list[str]:
    return [sys.executable, str(TOOL), *map(str, arguments)]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}


def test_killed_it_goes_on_to_the_same_bytes(tmp_path):
    source = write(tmp_path / "in.jsonl", *mixed(9000))
    whole, out = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    subprocess.run(tool(source, "--out", whole), env=environment(), check=True, timeout=120, stdout=subprocess.DEVNULL)
    work = out.with_name(out.name + ".work")
    for size in (100_000, 300_000):
        process = subprocess.Popen(tool(source, "--out", out), env=environment())
        while not work.exists() or work.stat().st_size < size:
            assert process.poll() is None, "it was done before it could be killed"
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL and not out.exists()
    subprocess.run(tool(source, "--out", out), env=environment(), check=True, timeout=120, stdout=subprocess.DEVNULL)
    assert out.read_bytes() == whole.read_bytes()
    reports = [json.loads(path.with_name(path.name + ".report.json").read_text()) for path in (out, whole)]
    assert reports[0] == reports[1] and reports[0]["counts"]["rows read"] == 9000


def test_other_options_or_inputs_do_not_go_on_from_what_was_left(tmp_path, monkeypatch):
    source = write(tmp_path / "in.jsonl", *mixed(8))
    out = tmp_path / "out.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr("megatron_dypo.dataprep.prepare.write_rows", lambda *_: (_ for _ in ()).throw(Stopped))
        with pytest.raises(Stopped):
            prepare(Options((source,)), out)
    with pytest.raises(UserError, match=r"has another --verify \(\"grader\", now \"none\"\): --restart"):
        prepare(Options((source,), verify="none"), out)
    write(tmp_path / "in.jsonl", *mixed(9))
    with pytest.raises(UserError, match=r"has another input 1 \(.*in\.jsonl: \d+ bytes"):
        prepare(Options((source,)), out)
    assert prepare(Options((source,)), out, restart=True)["rows read"] == 9


def test_a_name_that_is_taken_twice_over_leaves_the_whole_key(tmp_path):
    store = Store(tmp_path / "out.jsonl.work", {})
    key = "0123456789abcdef" * 2
    for number, (each, name) in enumerate([("k1", "a"), ("k2", key[:16]), (key, "a")], start=1):
        assert store.add_problem(each, name, "1", {}) == number
    store.close()


def test_extra_info_of_two_kinds_is_refused_for_parquet_in_one_line(tmp_path):
    rows = [
        {"prompt": f"{i}?", "ground_truth": "1", "extra_info": {"index": value}} for i, value in enumerate((1, "x"))
    ]
    source = write(tmp_path / "in.jsonl", *rows)
    options = Options((source,), layout="rows", verify="none", keep_without_trace=True)
    with pytest.raises(UserError, match=r"extra_info does not fit into one Parquet column, write \.jsonl"):
        prepare(options, tmp_path / "out.parquet")


def test_two_runs_do_not_share_a_work_file(tmp_path):
    source = write(tmp_path / "in.jsonl", *mixed(8))
    store = Store(tmp_path / "out.jsonl.work", {})
    with pytest.raises(UserError, match=r"out\.jsonl\.work: another run is using this file"):
        prepare(Options((source,)), tmp_path / "out.jsonl")
    store.close()
    (tmp_path / "out.jsonl.work").write_text("my notes, which are not to be touched " * 100)
    with pytest.raises(UserError, match="is not a work file of this tool"):
        prepare(Options((source,)), tmp_path / "out.jsonl")
    with pytest.raises(UserError, match=r"--out .*in\.jsonl/out\.jsonl: "):
        prepare(Options((source,)), tmp_path / "in.jsonl/out.jsonl")
    assert prepare(Options((source,)), tmp_path / "new/folder/out.jsonl")["rows written"] > 0


def test_a_dry_run_counts_and_writes_nothing(tmp_path):
    source = write(tmp_path / "in.jsonl", *mixed(40))
    before = sorted(tmp_path.iterdir())
    counts = prepare(Options((source, source)), tmp_path / "out.jsonl", dry_run=50)
    check_sums(counts)
    assert counts["rows read"] == 50 and sorted(tmp_path.iterdir()) == before


MEASURE = """
import sys
from pathlib import Path
from megatron_dypo.dataprep.options import Options
from megatron_dypo.dataprep.prepare import prepare
prepare(Options((sys.argv[1],)), Path(sys.argv[2]))
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_memory_does_not_grow_with_the_data(tmp_path, suffix):
    """Ten times the rows (4 and 40 MB) need the same memory."""
    peaks = []
    for count in (2_000, 20_000):
        records = [problem(f"Number {i} of them?", "5", f"{i} " * 400 + "\\boxed{5}") for i in range(count)]
        source = write(tmp_path / f"{count}{suffix}", *records)
        out = tmp_path / f"out-{count}{'.parquet' if suffix == '.parquet' else '.jsonl'}"
        command = [sys.executable, "-c", MEASURE, source, str(out)]
        result = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True, timeout=120)
        peaks.append(int(result.stdout))
        assert len(rows.read(str(out))) == count
    assert peaks[1] - peaks[0] < 12_000, f"KiB: {peaks}"


# --- the command


def test_the_command_says_what_is_wrong_in_one_line(tmp_path):
    result = subprocess.run(
        tool(tmp_path / "none.jsonl", "--out", tmp_path / "o.jsonl"), env=environment(), capture_output=True, text=True
    )
    assert result.returncode == 2 and result.stderr.startswith("prepare_data: ") and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "options, complaint",
    [
        ({"max_trace_tokens": 5}, "need --tokenizer"),
        ({"columns": {"prompt": "q"}}, "--columns: expected prompt=..,ground_truth=.."),
        ({"columns": {"prompt": "q", "ground_truth": "a"}, "layout": "math"}, "--columns and --layout"),
        ({"ngram": 0}, "--ngram must be at least 1"),
        ({"tokenizer": str(Path(__file__).parent)}, "tests: cannot be loaded"),
    ],
)
def test_unusable_options(tmp_path, options, complaint):
    with pytest.raises(UserError, match=complaint):
        run(tmp_path, problem("p"), **options)


@needs_shared
def test_real_gsm8k(tmp_path):
    lines = (SHARED / "gsm8k/train.jsonl").read_text().splitlines()[:300]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    found, counts = run_files(tmp_path, str(tmp_path / "in.jsonl"))
    assert len(found) == 300 and counts["traces: kept"] == counts["traces read"]
    assert all(row["teachers"][0]["name"] == "solution" for row in found)
    assert 270 < sum(len(row["teachers"]) == 2 for row in found) < 300
