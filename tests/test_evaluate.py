"""Evaluation: suites in their published forms, estimators against brute force, options, and recovery from a kill."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import random
import signal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch.distributed as dist
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from megatron_dypo.cli import main
from megatron_dypo.config.schema import Config, Data, Evaluation, Model, Reward, Trainer
from megatron_dypo.errors import UserError
from megatron_dypo.evaluate import evaluate as command
from megatron_dypo.evaluate import run as evaluation_run
from megatron_dypo.evaluate.choices import Choices, find_choices
from megatron_dypo.evaluate.evaluate import _name
from megatron_dypo.evaluate.respond import Answer, AnswerFile, ChatServer, Question, Said, server_responses
from megatron_dypo.evaluate.run import figures, interval, metrics, pass_at_k, rows, run_suite
from megatron_dypo.evaluate.suites import SUITES, load_suite, load_suites, named_suites
from megatron_dypo.reward import build_reward
from megatron_dypo.runtime.distributed import Layout
from tests.launch import copy_task
from tests.test_teacher_traces import Imitation

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_shared = pytest.mark.skipif(not (SHARED / "eval").is_dir(), reason=f"no data sets in {SHARED}")
COUNTS = {"aime24": 30, "aime25": 30, "amc23": 40, "math500": 500, "arc_c": 1172, "gsm8k": 1319}


# --- the suites


@needs_shared
@pytest.mark.parametrize("name", COUNTS)
def test_a_suite_loads_as_it_circulates_and_grades_its_own_answers_as_right_and_others_as_wrong(name):
    """Every problem's own answer, boxed, is right; the next problem's different one is wrong."""
    prompts = load_suite(SUITES[name], Evaluation(data=str(SHARED)))
    assert len(prompts) == COUNTS[name] and len({prompt.id for prompt in prompts}) == len(prompts)
    assert all(prompt.messages[-1]["content"].endswith("within \\boxed{}.") for prompt in prompts)
    truths = [
        prompt.ground_truth.removeprefix("\\boxed{").removesuffix("}")
        if "boxed" in prompt.ground_truth
        else prompt.ground_truth
        for prompt in prompts
    ]
    others = [next(t for t in truths[i + 1 :] + truths if t != truth) for i, truth in enumerate(truths)]
    suite = SUITES[name]
    with build_reward(Reward(function=suite.reward, extract=suite.extract)) as reward:
        right, wrong = (reward(prompts, [f"So \\boxed{{{text}}}." for text in texts]) for texts in (truths, others))
    assert not any(score.fault for score in right + wrong)
    assert [prompt.ground_truth for prompt, score in zip(prompts, right, strict=True) if score.value < 1] == []
    equal = [
        (prompt.ground_truth, other)
        for prompt, other, score in zip(prompts, others, wrong, strict=True)
        if score.value > 0
    ]
    assert equal == EQUAL_NEIGHBOURS.get(name, [])


# Different texts of the same value.
EQUAL_NEIGHBOURS = {"math500": [("5", "x=5")]}


@pytest.mark.parametrize(
    ("suite", "file", "row", "question", "truth"),
    [
        ("aime24", "aime_2024.jsonl", {"problem": "1+1?", "solution": "It is \\boxed{2}.", "answer": "2"}, "1+1?", "2"),
        ("aime25", "AIME25/test.jsonl", {"problem": "1+1?", "answer": 2}, "1+1?", "2"),
        ("math500", "MATH-500.json", {"prompt": "1+1?", "answer": "2", "id": "x"}, "1+1?", "2"),
        ("minerva", "minerva_math.jsonl", {"question": "1+1?", "answer": "2"}, "1+1?", "2"),
        ("gsm8k", "gsm8k/main/test.jsonl", {"question": "1+1?", "answer": "1+1=2\n#### 2"}, "1+1?", "2"),
        ("gsm8k", "gsm8k/test-00000-of-00001.parquet", {"question": "1+1?", "answer": "#### 2"}, "1+1?", "2"),
        (
            "arc_c",
            "ARC-Challenge/test.parquet",
            {"question": "Sky?", "choices": {"text": ["red", "blue"], "label": ["A", "B"]}, "answerKey": "B"},
            "Sky?\n\nA) red\nB) blue",
            "B",
        ),
        (
            "gpqa_diamond",
            "gpqa_diamond.jsonl",
            {"Question": "Sky?", "Correct Answer": "blue\n"} | {f"Incorrect Answer {i}": f"no {i}" for i in (1, 2, 3)},
            "Sky?\n\nA) blue\nB) no 1\nC) no 2\nD) no 3",
            "A",
        ),
    ],
)
def test_the_hub_s_columns_and_the_files_that_circulate_are_read_alike(tmp_path, suite, file, row, question, truth):
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist([row]), path)
    else:
        path.write_text(json.dumps([row] if path.suffix == ".json" else row))
    settings = Evaluation(data=str(tmp_path), shuffle_options=False, instruction=None, system="Think.")
    [prompt] = load_suite(SUITES[suite], settings)
    assert prompt.messages == ({"role": "system", "content": "Think."}, {"role": "user", "content": question})
    assert (prompt.ground_truth, prompt.source, prompt.id) == (truth, suite, f"{suite}-0")


def test_responses_in_the_same_folder_are_no_file_of_a_suite(tmp_path):
    row = '{"question": "1+1?", "answer": "2"}'
    written = {"gsm8k.jsonl": row, "run/fingerprint.json": "{}", "run/evaluation/step_24/gsm8k.jsonl": "{}"}
    written |= {"elsewhere/results.json": "{}", "elsewhere/gsm8k.jsonl": "{}"}
    for name, text in written.items():
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(text)
    [prompt] = load_suite(SUITES["gsm8k"], Evaluation(data=str(tmp_path)))
    assert prompt.ground_truth == "2"


def test_parts_beside_the_whole_file_are_two_files(tmp_path):
    for name in ("aime2025.jsonl", "aime2025-I.jsonl", "aime2025-II.jsonl"):
        (tmp_path / name).write_text('{"question": "1+1?", "answer": "2"}')
    with pytest.raises(UserError, match=r"two files of the suite aime25: .*aime2025-I.jsonl, .*aime2025.jsonl"):
        load_suite(SUITES["aime25"], Evaluation(data=str(tmp_path)))


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "no file of the suite gsm8k"),
        ({"gsm8k.jsonl": "{}", "gsm8k/test.jsonl": "{}"}, "two files of the suite gsm8k"),
        ({"gsm8k.jsonl": "{"}, "gsm8k.jsonl: cannot be read"),
        ({"gsm8k.json": "{}"}, "expected a list"),
        ({"gsm8k.jsonl": ""}, "holds no problem"),
        ({"gsm8k.jsonl": '{"question": "1+1?", "answer": "2"}\n{"question": "1+2?"}'}, "problem 2: no answer"),
        ({"gsm8k.jsonl": '{"answer": "2"}'}, "problem 1: no question"),
        ({"gsm8k.jsonl": "[]"}, "problem 1: expected an object"),
        ({"gsm8k.parquet": "PAR1"}, "gsm8k.parquet: not a readable Parquet file"),
    ],
)
def test_a_file_that_is_no_suite_is_an_error_that_names_it(tmp_path, files, said):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=said):
        load_suite(SUITES["gsm8k"], Evaluation(data=str(tmp_path)))


def written(path: Path, rows: list[dict], begin: bytes = b"") -> None:
    """Write rows in the form given by the file name; ``begin`` precedes the text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        quoted = [[str(value).replace('"', '""') for value in row.values()] for row in rows]
        lines = [",".join(rows[0]), *(",".join(f'"{value}"' for value in row) for row in quoted)]
        path.write_bytes(begin + "\n".join(lines).encode())
    else:
        text = json.dumps(rows) if path.suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows)
        path.write_bytes(begin + text.encode())


STEM = {"stem": "q", "choices": [{"text": "x", "label": "A"}, {"text": "y", "label": "B"}]}  # ARC's own release
GPQA_ROW = {"Question": "Sky?", "Correct Answer": "blue"} | {f"Incorrect Answer {i}": f"no {i}" for i in (1, 2, 3)}
OPTIONS = "Sky?\n\n(A) red\n(B) blue\n(C) green\n(D) grey"
CIRCULATING = [
    # suite, file, row, ground truth
    (
        "aime24",
        "AIME_2024_Problems.parquet",
        {"ID": "I-1", "Problem": "q", "Solution": "so \\boxed{3}", "Answer": 204},
        "204",
    ),
    ("aime24", "AIME24.jsonl", {"PROBLEM": "q", "Solution": "x \\boxed{3} no: \\boxed{\\frac12}"}, "\\frac12"),
    ("aime24", "aime_2024/data/train-00000-of-00001.parquet", {"problem": "q", "answer": "204"}, "204"),
    ("aime25", "aime_2025/data/test-00000-of-00001.parquet", {"problem": "q", "answer": "70"}, "70"),
    ("aime25", "AIME2025_I.jsonl", {"question": "q", "answer": "70"}, "70"),
    ("amc23", "amc23/data/train-00000-of-00001.parquet", {"question": "q", "answer": 27.0}, "27.0"),
    ("math500", "datasets--HuggingFaceH4--MATH-500/snapshots/6e4e/test.jsonl", {"problem": "q", "answer": "3"}, "3"),
    ("minerva", "minerva_math/test.jsonl", {"problem": "q", "solution": "thus $\\boxed{4.5e33}$"}, "4.5e33"),
    ("gsm8k", "openai/gsm8k/main/test-00000-of-00001.parquet", {"question": "q", "answer": "a\n#### 18"}, "18"),
    ("math500", "MATH500.json", {"problem": "q", "final_answer": ["3"]}, "3"),
    ("gpqa_diamond", "gpqa_diamond.csv", GPQA_ROW, "A"),
    (
        "gpqa_diamond",
        "gpqa_diamond_mc/data/test-00000-of-00001.parquet",
        {"problem": OPTIONS, "solution": "\\boxed{B}"},
        "B",
    ),
    ("gpqa_diamond", "gpqa_diamond.jsonl", {"question": OPTIONS, "answer": "(B)"}, "B"),
    ("gpqa_diamond", "gpqa_diamond.jsonl", {"question": "Sky?", "options": ["red", "blue"], "answer": 1}, "B"),
    ("arc_c", "ARC-Challenge-Test.jsonl", {"question": "q", "choices": {"A": "x", "B": "y"}, "answer": "y"}, "B"),
    (
        "arc_c",
        "ai2_arc/ARC-Challenge/test-00000-of-00001.parquet",
        {"question": "q", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"},
        "2",
    ),
    ("arc_c", "ARC_C.jsonl", {"question": STEM, "answerKey": "B"}, "B"),
]


@pytest.mark.parametrize("begin", [b"", b"\xef\xbb\xbf"], ids=["", "byte order mark"])
@pytest.mark.parametrize(("suite", "file", "row", "truth"), CIRCULATING)
def test_files_under_the_names_and_columns_that_people_download_are_read(tmp_path, suite, file, row, truth, begin):
    written(tmp_path / file, [row], begin)
    [prompt] = load_suite(SUITES[suite], Evaluation(data=str(tmp_path), shuffle_options=False))
    assert prompt.ground_truth == truth


def test_parts_are_joined_in_order_and_what_is_missing_is_said(tmp_path, caplog):
    def asked(suite: str) -> list[str]:
        return [
            p.messages[-1]["content"]
            for p in load_suite(SUITES[suite], Evaluation(data=str(tmp_path), instruction=None))
        ]

    for part, problem in (("II", "second"), ("I", "first")):
        written(tmp_path / f"AIME2025/aime2025-{part}.jsonl", [{"question": problem, "answer": "1"}])
    assert asked("aime25") == ["first", "second"] and "2 problems, and the suite aime25 has 30" in caplog.text
    for shard in (1, 0):
        path = tmp_path / f"gsm8k/main/test-0000{shard}-of-00002.parquet"
        written(path, [{"question": f"shard {shard}", "answer": "#### 1"}])
        written(
            tmp_path / f"gsm8k/socratic/test-0000{shard}-of-00002.parquet", [{"question": "no", "answer": "#### 1"}]
        )
        written(tmp_path / f"gsm8k/main/train-0000{shard}-of-00002.parquet", [{"question": "no", "answer": "#### 1"}])
    assert asked("gsm8k") == ["shard 0", "shard 1"]
    path.unlink()
    with pytest.raises(UserError, match="1 of 00002 parts of the suite gsm8k"):
        asked("gsm8k")


def test_the_test_split_is_taken_where_there_is_a_training_split_too(tmp_path):
    for split in ("train", "test"):
        written(tmp_path / f"aime_2024/{split}.jsonl", [{"question": split, "answer": "1"}])
    [prompt] = load_suite(SUITES["aime24"], Evaluation(data=str(tmp_path), instruction=None))
    assert prompt.messages[-1]["content"] == "test"


def test_swallowed_backslashes_of_an_evaluation_file_are_put_back_and_counted(tmp_path, caplog):
    r"""A published AIME25 has this: ``\frac`` is a form feed and ``rac``."""
    written(
        tmp_path / "aime25.jsonl",
        [{"problem": "What is $\frac{m}{n}$?", "answer": "\frac12"}, {"problem": "x", "answer": "1"}],
    )
    first, second = load_suite("aime25", Evaluation(data=str(tmp_path), instruction=None))
    assert (first.messages[-1]["content"], first.ground_truth) == ("What is $\\frac{m}{n}$?", "\\frac12")
    assert "restored in 1 problems" in caplog.text and second.ground_truth == "1"


# --- options


def test_options_move_and_the_answer_goes_with_its_text():
    choices = Choices("Sky?", tuple("ABCD"), ("red", "blue", "green", "pink"), "B")
    seen = {choices.shuffled(0, i) for i in range(200)}
    assert all(one.texts[one.labels.index(one.answer)] == "blue" and one.labels == choices.labels for one in seen)
    assert len({one.texts for one in seen}) == 24 and {one.answer for one in seen} == set("ABCD")
    assert choices.shuffled(0, 7) == choices.shuffled(0, 7)


@needs_shared
def test_shuffled_arc_asks_the_same_questions():
    plain, moved = (
        load_suite(SUITES["arc_c"], Evaluation(data=str(SHARED), shuffle_options=on)) for on in (False, True)
    )
    differing = 0
    for before, after in zip(plain, moved, strict=True):
        one, other = (
            find_choices(p.messages[-1]["content"].rpartition("\n\n")[0], p.ground_truth) for p in (before, after)
        )
        right = [c.texts[c.labels.index(c.answer)] for c in (one, other)]
        assert one.question == other.question and sorted(one.texts) == sorted(other.texts) and right[0] == right[1]
        differing += one != other
    assert differing > 1000


@pytest.mark.parametrize("text", ["What?", "What?\nA) one", "A) one\nB) two\nthree"])
def test_a_question_without_options_is_refused(text):
    with pytest.raises(ValueError, match="no options"):
        find_choices(text, "A")
    with pytest.raises(ValueError, match="not one of the option labels"):
        find_choices("What?\nA) one\nB) two", "C")


def test_numbered_statements_above_the_options_stay_where_they_are():
    text = "Which?\n1. Water is wet\n2. Ice is hot\nA) 1 only\nB) 2 only"
    found = find_choices(text, "A")
    assert found.labels == ("A", "B") and found.question.endswith("2. Ice is hot")


def test_results_of_other_suites_of_the_same_weights_stay(tmp_path):
    path = tmp_path / "results.json"
    for weights, name in (("a", "aime24"), ("a", "math500")):
        command._write(path, {name: {"weights": weights}}, {"weights": weights})
    assert set(json.loads(path.read_text())) == {"aime24", "math500"}
    command._write(path, {"gsm8k": {"weights": "b"}}, {"weights": "b"})
    assert set(json.loads(path.read_text())) == {"gsm8k"}


# --- figures


@given(st.integers(1, 7).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_is_the_mean_over_all_draws_of_k(case):
    n, right, k = case
    draws = list(itertools.combinations([True] * right + [False] * (n - right), k))
    assert pass_at_k(n, right, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_figures_of_a_suite():
    found = figures([0, 1, 4, 2], 4, seed=0)
    assert list(found) == ["avg@4", "pass@1", "pass@2", "pass@4"]
    assert found["avg@4"]["value"] == found["pass@1"]["value"] == pytest.approx(7 / 16)
    assert found["pass@4"]["value"] == 0.75
    for figure in found.values():
        assert 0 <= figure["low"] <= figure["value"] <= figure["high"] <= 1
    assert figures([0, 1, 4, 2], 4, seed=0) == found
    assert list(figures([1], 32, 0)) == ["avg@32", *(f"pass@{k}" for k in (1, 2, 4, 8, 16, 32))]


@pytest.mark.slow
def test_the_interval_covers_the_truth_as_often_as_it_says():
    generator = np.random.default_rng(1)
    covered = 0
    for trial in range(200):
        low, high = interval((generator.random(100) < 0.4).astype(float), trial)
        covered += low <= 0.4 <= high
    assert 180 <= covered <= 199


# --- a suite, asked


def sums(folder: Path, count: int = 6) -> Evaluation:
    """Return a suite of sums in ``folder``."""
    folder.mkdir(exist_ok=True)
    lines = [json.dumps({"question": f"What is {i}+{i}?", "answer": str(2 * i)}) for i in range(count)]
    (folder / "gsm8k.jsonl").write_text("\n".join(lines))
    return Evaluation(data=str(folder), instruction=None, samples=4)


def config_of(settings: Evaluation) -> Config:
    return Config(
        model=Model(preset="tiny"),
        data=Data(train="none"),
        trainer=Trainer(steps=1, run_dir="none"),
        evaluation=settings,
    )


def respond(questions: list[Question]) -> list[Said]:
    """Answer correctly every other sample of an even problem."""
    found = []
    for question in questions:
        number = int(question.prompt.messages[-1]["content"].removeprefix("What is ").partition("+")[0])
        right = number % 2 == 0 and question.sample % 2 == 0
        found.append(Said(f"It is \\boxed{{{2 * number + (not right)}}}.", 10 + question.sample, "stop"))
    return found


@pytest.fixture
def alone(monkeypatch):
    """Pretend to be one rank, without a process group."""
    monkeypatch.setattr(evaluation_run, "all_gather_objects", lambda value: [value])
    return Layout()


def test_a_suite_s_summary_counts_what_was_right(tmp_path, alone):
    settings = sums(tmp_path)
    told: list[tuple[int, int]] = []
    result = run_suite(
        SUITES["gsm8k"],
        load_suite(SUITES["gsm8k"], settings),
        config_of(settings),
        respond,
        alone,
        round_size=5,
        progress=lambda *c: told.append(c),
    )
    assert result["figures"]["avg@4"]["value"] == 0.25 and result["figures"]["pass@4"]["value"] == 0.5
    assert result["figures"]["pass@2"]["value"] == pytest.approx(0.5 * 5 / 6)
    assert (result["problems"], result["samples"], result["faults"]) == (6, 4, 0)
    assert result["response_tokens"] == 11.5 and result["truncated_frac"] == 0
    assert told == [(0, 24), (5, 24), (10, 24), (15, 24), (20, 24), (24, 24)]
    assert metrics("gsm8k", result) == {
        "eval/gsm8k/avg@4": 0.25,
        "eval/gsm8k/pass@4": 0.5,
        "eval/gsm8k/response_tokens": 11.5,
        "eval/gsm8k/truncated_frac": 0.0,
    }
    header, row = rows({"gsm8k": result})
    assert len(header) == len(row) and row[3].startswith("25.0% [")


def _ask_until_killed(folder: str) -> None:
    """Kill itself with SIGKILL during the third round."""
    settings = sums(Path(folder))
    asked = []

    def dying(questions: list[Question]) -> list[Said]:
        asked.append(questions)
        if len(asked) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return respond(questions)

    evaluation_run.all_gather_objects = lambda value: [value]
    file = AnswerFile(Path(folder) / "answers.jsonl", {"suite": "gsm8k"})
    run_suite(
        SUITES["gsm8k"],
        load_suite(SUITES["gsm8k"], settings),
        config_of(settings),
        dying,
        Layout(),
        file=file,
        round_size=5,
    )


def test_a_killed_evaluation_goes_on_and_asks_nothing_twice(tmp_path, alone):
    process = multiprocessing.get_context("spawn").Process(target=_ask_until_killed, args=(str(tmp_path),))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    path, settings = tmp_path / "answers.jsonl", sums(tmp_path)
    path.write_bytes(path.read_bytes() + b'{"problem": "gsm8k-2", "sam')  # and a torn line
    asked: list[Question] = []

    def noting(questions: list[Question]) -> list[Said]:
        asked.extend(questions)
        return respond(questions)

    prompts = load_suite(SUITES["gsm8k"], settings)
    file = AnswerFile(path, {"suite": "gsm8k"})
    assert len(file.answers) == 10
    result = run_suite(SUITES["gsm8k"], prompts, config_of(settings), noting, alone, file=file)
    assert len(asked) == 14 and len(file.answers) == 24
    file.close()
    assert result == run_suite(SUITES["gsm8k"], prompts, config_of(settings), respond, alone)
    assert len({(answer.problem, answer.sample) for answer in AnswerFile(path, {"suite": "gsm8k"}).answers}) == 24


def test_responses_of_another_evaluation_are_not_counted_in(tmp_path):
    path, answer = tmp_path / "answers.jsonl", Answer("a", 0, "x", 1, "stop", True)
    first = AnswerFile(path, {"temperature": 0.6})
    first.add([answer])
    first.close()
    with AnswerFile(path, {"temperature": 0.6})._file, pytest.raises(UserError, match="another evaluation is using"):
        AnswerFile(path, {"temperature": 0.6})
    with pytest.raises(
        UserError, match=r"answers.jsonl: belongs to another evaluation: temperature \(was 0.6, now 1.0\)"
    ):
        AnswerFile(path, {"temperature": 1.0})
    assert AnswerFile(path, {"temperature": 0.6}).answers == [answer]
    assert AnswerFile(path, {"temperature": 1.0}, restart=True).answers == []
    path.write_text("no JSON\n")
    with pytest.raises(UserError, match="not the responses of an evaluation"):
        AnswerFile(path, {})


def test_a_file_of_one_s_own_is_a_suite_with_its_name_samples_and_extraction(alone, tmp_path):
    settings = sums(tmp_path).model_copy(update={"samples": None})
    file = (tmp_path / "gsm8k.jsonl").rename(tmp_path / "sums to ten.jsonl")
    asked = ["math500", f"tens={file}?samples=2&extract=number", f"boxes={file}"]
    known, tens, boxes = named_suites(asked, "--suite")
    assert known is SUITES["math500"] and (tens.name, boxes.name) == ("tens", "boxes")
    config, prompts = config_of(settings), load_suite(tens, settings)
    assert [prompt.id for prompt in prompts] == [f"tens-{i}" for i in range(6)]

    def plain(questions):
        return [Said(said.text.replace("\\boxed{", "").replace("}", ""), 1, "stop") for said in respond(questions)]

    result = run_suite(tens, prompts, config, plain, alone)
    assert metrics("tens", result)["eval/tens/avg@2"] == 0.25
    result = run_suite(boxes, load_suite(boxes, settings), config, plain, alone)
    assert result["samples"] == 1 and result["figures"]["pass@1"]["value"] == 0, "no box, no answer"
    over = settings.model_copy(update={"samples": 5, "extract": "marked"})
    assert (tens.samples_in(over), tens.extract_in(over)) == (2, "number"), "what is said of the file itself stands"
    assert (boxes.samples_in(over), boxes.extract_in(over)) == (5, "marked")
    assert tens.samples_in(settings.model_copy(update={"temperature": 0.0})) == 1
    (tmp_path / "own.csv").write_text('question,answer\n"Which?\nA) one\nB) two",A\n')
    (choice,) = named_suites([f"{tmp_path / 'own.csv'}?reward=choice"], "--suite")
    [prompt] = load_suite(choice, settings)
    assert prompt.id == "own-0" and prompt.ground_truth in "AB" and "A)" in prompt.messages[-1]["content"]


def test_a_file_of_one_s_own_may_be_graded_by_a_function_that_gets_what_training_gives_it(alone, tmp_path):
    (tmp_path / "one_of.py").write_text(
        "def compute_score(data_source, solution_str, ground_truth, extra_info):\n"
        "    assert data_source == 'colours' and extra_info['hint'] == 'sky' and extra_info['id'].startswith('own-')\n"
        "    return solution_str in ground_truth\n"
    )
    row = {"prompt": "?", "ground_truth": ["blue", "grey"], "data_source": "colours", "extra_info": {"hint": "sky"}}
    (tmp_path / "own.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row))
    settings = Evaluation(instruction=None)
    asked = f"{tmp_path / 'own.jsonl'}?reward={tmp_path / 'one_of.py'}:compute_score"
    [(suite, prompts)] = load_suites([asked], settings, "--suite").items()
    assert prompts[0].ground_truth == ["blue", "grey"]
    said = [Said("grey", 1, "stop"), Said("red", 1, "stop")]
    result = run_suite(suite, prompts, config_of(settings), lambda questions: said, alone)
    assert result["figures"]["pass@1"]["value"] == 0.5 and result["faults"] == 0


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("own.jsonl?reward=none.py:score", "suite own: reward.function: none.py:score: "),
        ("own.jsonl?reward=maths", "reward is 'maths', not math, choice or path/file.py:function"),
        ("own.jsonl?samples=0", "samples is '0', not a number from 1 on"),
        ("own.jsonl?samples=many", "samples is 'many', not a number"),
        ("own.jsonl?extract=box", "extract is 'box', not boxed, marked or number"),
        ("own.jsonl?sample=8", "'sample=8' is not one of [NAME=]FILE["),
        ("own.jsonl?samples=8&samples=9", "'samples=9' is not one of"),
        ("own.jsonl?", "'' is not one of"),
        ("own.txt", "not one of the suites aime24"),
        ("gsm8k?samples=8", "not one of the suites aime24"),
        ("gsm8k.jsonl", "the name 'gsm8k' is taken"),
        ("valid=own.jsonl", "the name 'valid' is taken"),
        ("../up=own.jsonl", "the name '../up' has more than letters"),
        ("=own.jsonl", "the name '' has more than"),
        ("two words.jsonl", "the name 'two words' has more than letters"),
        ("nowhere.jsonl", "there is no file nowhere.jsonl"),
        ("own.jsonl,own.jsonl", "two suites are called 'own'"),
        ("math500,math500", "two suites are called 'math500'"),
    ],
)
def test_a_suite_of_one_s_own_in_a_bad_form_is_one_line(tmp_path, monkeypatch, capsys, asked, said):
    monkeypatch.chdir(tmp_path)
    for name in ("own.jsonl", "own.txt", "gsm8k.jsonl", "two words.jsonl"):
        Path(name).write_text('{"question": "1+1?", "answer": "2"}\n')
    config = str(copy_task(tmp_path))
    assert main(["evaluate", config, "--suite", asked]) == 2
    line = capsys.readouterr().err
    assert said in line and line.startswith("megatron_dypo: --suite: ") and line.count("\n") == 1
    assert main(["evaluate", config, f"evaluation.suites={json.dumps(asked.split(','))}"]) == 2
    assert said in (line := capsys.readouterr().err) and line.startswith("megatron_dypo: evaluation.suites: ")


def test_weights_are_called_as_their_folder_is(tmp_path, monkeypatch):
    (tmp_path / "mine" / "deeper").mkdir(parents=True)
    (tmp_path / "linked").symlink_to(tmp_path / "mine")
    monkeypatch.chdir(tmp_path / "mine")
    for path, name in ((".", "mine"), ("..", tmp_path.name), ("deeper/..", "mine"), ("../linked/", "linked")):
        assert _name(Path(path)) == name


def test_a_pure_guess_is_told_from_knowledge_by_the_interval(alone, tmp_path):
    """With shuffled labels and a model that always says A, accuracy is a quarter, and the interval shows it."""
    generator = random.Random(0)
    path = tmp_path / "gpqa_diamond.jsonl"
    lines = []
    for _ in range(198):
        texts = generator.sample(range(1000), 4)
        row = {"Question": f"{texts}?", "Correct Answer": str(texts[0])}
        lines.append(json.dumps(row | {f"Incorrect Answer {i}": str(texts[i]) for i in (1, 2, 3)}))
    path.write_text("\n".join(lines))
    settings = Evaluation(data=str(tmp_path))
    prompts = load_suite(SUITES["gpqa_diamond"], settings)
    always_a = lambda questions: [Said("\\boxed{A}", 3, "stop") for _ in questions]  # noqa: E731
    figure = run_suite(SUITES["gpqa_diamond"], prompts, config_of(settings), always_a, alone)["figures"]["pass@1"]
    assert figure["low"] < 0.25 < figure["high"] < 0.36


def test_a_server_is_asked_with_a_seed_for_each_response_and_its_refusal_is_one_line(alone, tmp_path):
    async def wrong_for_one(server, body, n):
        return {"content": "It is \\boxed{1}."} if "1+1" in body["messages"][-1]["content"] else None

    settings = sums(tmp_path)
    config, prompts = config_of(settings), load_suite(SUITES["gsm8k"], settings)
    with Imitation(wrong_for_one) as endpoint:
        asked = server_responses(ChatServer(endpoint.url, "m", "secret", concurrency=3), config)
        result = run_suite(SUITES["gsm8k"], prompts, config, asked, alone)
        assert endpoint.keys == {"Bearer secret"} and endpoint.most_under_way <= 3
        bodies = endpoint.asked
    assert len({body["seed"] for body in bodies}) == len(bodies) == 24
    assert {(body["temperature"], body["max_tokens"]) for body in bodies} == {(0.6, 8192)}
    assert result["figures"]["pass@4"]["value"] == pytest.approx(5 / 6) and result["response_tokens"] == 11

    async def too_long(server, body, n):
        if "3+3" in body["messages"][-1]["content"]:
            return web.json_response({"error": "this prompt is too long"}, status=400)

    path = tmp_path / "answers.jsonl"
    with Imitation(too_long) as endpoint, pytest.raises(UserError, match=r"HTTP 400: .*too long.*is kept"):
        asked, file = server_responses(ChatServer(endpoint.url, "m", None, 3), config), AnswerFile(path, {})
        run_suite(SUITES["gsm8k"], prompts, config, asked, alone, file=file)
    assert len(file.answers) == 20, "what came is there"

    async def unknown(server, body, n):
        return web.json_response({"error": "no such model"}, status=404)

    with Imitation(unknown) as endpoint, pytest.raises(UserError, match=r"'m': HTTP 404: .*no such model") as caught:
        run_suite(
            SUITES["gsm8k"], prompts, config, server_responses(ChatServer(endpoint.url, "m", None, 3), config), alone
        )
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--suite", "gsm9k"], "--suite: 'gsm9k' is not one of the suites aime24"),
        ([], "no suite: give --suite, or evaluation.suites"),
        (["--suite", "gsm8k"], "holds no checkpoint, and a preset has no weights"),
        (["--suite", "gsm8k", "--checkpoint", "nowhere"], "nowhere: holds no checkpoint"),
        (["--suite", "gsm8k", "--hf", "./x"], "megatron_dypo: --hf: there is no folder ./x"),
        (["--suite", "gsm8k", "model.hf=./x", "model.preset=null"], "megatron_dypo: model.hf: there is no folder ./x"),
        (["--suite", "gsm8k", "--server", "http://127.0.0.1:1/v1"], "--server needs --model"),
        (["--suite", "gsm8k", "--server", "x", "--model", "m", "--key-env", "NOWHERE_SET"], "NOWHERE_SET is not set"),
        (["--suite", "gsm8k", "--server", "x", "--model", "m"], "url: expected http"),
        (["--suite", "gsm8k", "rollout.engine=replay", "rollout.replay=x"], "replay samples nothing"),
        (
            ["--suite", "gsm8k", "rollout.engine=server", "rollout.servers=[http://127.0.0.1:1]"],
            "would take the servers",
        ),
    ],
)
def test_what_cannot_be_evaluated_is_refused_in_one_line(tmp_path, capsys, arguments, said):
    """Options are accepted before and after overrides."""
    sums(tmp_path)
    config = copy_task(tmp_path)
    here = [f"evaluation.data={tmp_path}", "evaluation.instruction=null"]
    assert main(["evaluate", str(config), here[0], *arguments, here[1]]) == 2
    line = capsys.readouterr().err
    assert said in line and line.count("\n") == 1
    assert not dist.is_initialized()
