"""Data: every layout gives the same record, malformed input is named, the order is a function of seed and step."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dypo.config.schema import Data, Reward
from megatron_dypo.data import rows
from megatron_dypo.data.dataset import batch_indices, load_data, load_prompts
from megatron_dypo.data.tasks import generate
from megatron_dypo.data.tokenizer import Tokenizer, arithmetic_backend
from megatron_dypo.errors import UserError
from megatron_dypo.records import Prompt, Teacher
from megatron_dypo.reward import build_reward
from megatron_dypo.rollout.sampling import encode_prompts

GSM8K = Path(__file__).resolve().parents[2] / "shared/data/gsm8k"
UNKNOWN = arithmetic_backend().unk_token_id
SUMS = "reasoning_gym:chain_sum?min_terms=2&max_terms=4&min_digits=1&max_digits=2&size={}&seed={}"

CHAT = [{"role": "user", "content": "What is 2 + 3?"}]
TRACES = ["2+3=5 \\boxed{5}", "3+2=5 \\boxed{5}"]
OURS = {
    "prompt": CHAT,
    "ground_truth": "5",
    "data_source": "sums",
    "teachers": [{"name": f"target-{i}", "trace": trace} for i, trace in enumerate(TRACES)],
}
LUFFY = {"prompt": CHAT, "reward_model": {"ground_truth": "5", "style": "rule"}, "data_source": "sums"}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    backend = arithmetic_backend()
    return Tokenizer(backend, backend.eos_token_id)


def jsonl(folder: Path, *records: Any, name: str = "rows.jsonl") -> str:
    """Write these rows to a file; a string is a verbatim line."""
    path = folder / name
    path.write_text("".join((record if isinstance(record, str) else json.dumps(record)) + "\n" for record in records))
    return str(path)


def on_disk(folder: Path, form: str, *records: dict) -> str:
    if form == "jsonl":
        return jsonl(folder, *records)
    path = folder / "rows.parquet"
    columns = {name: None for record in records for name in record}
    parquet.write_table(pa.Table.from_pylist([columns | record for record in records]), path)
    return str(path)


def problem(text: str, **fields: Any) -> dict:
    return {"prompt": text, "ground_truth": "1", "teachers": []} | fields


# --- layouts


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    "row",
    [
        OURS,
        LUFFY | {"target_lst": TRACES},
        LUFFY | {"target_lst": [[{"role": "assistant", "content": trace}] for trace in TRACES]},
        LUFFY | {"target_lst": [{"role": "assistant", "content": trace} for trace in TRACES], "target": None},
    ],
    ids=["ours", "luffy-strings", "luffy-chats", "luffy-messages"],
)
def test_every_layout_gives_the_same_prompt(tmp_path, form, row):
    teachers = tuple(Teacher(f"target-{i}", trace) for i, trace in enumerate(TRACES))
    assert rows.read(on_disk(tmp_path, form, row)) == [Prompt("row-1", "5", teachers, "sums", tuple(CHAT))]


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
@pytest.mark.parametrize("target", [TRACES[0], [{"role": "assistant", "content": TRACES[0]}]])
def test_a_single_target_is_one_teacher(tmp_path, form, target):
    (prompt,) = rows.read(on_disk(tmp_path, form, LUFFY | {"target": target}))
    assert prompt.teachers == (Teacher("target-0", TRACES[0]),)


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_columns_that_only_some_rows_fill_are_absent_in_the_others(tmp_path, form):
    """Parquet has every column in every row, null if a row has no value."""
    records = [problem("a", id="first", data_source="s"), LUFFY | {"prompt": "b", "target": "t"}]
    first, second = rows.read(on_disk(tmp_path, form, *records))
    assert first == Prompt("first", "1", (), "s", (), "a")
    assert second == Prompt("row-2", "5", (Teacher("target-0", "t"),), "sums", (), "b")


@pytest.mark.parametrize("truth, text", [("1/2", "1/2"), (3, "3"), (2.5, "2.5"), (-4, "-4")])
def test_a_ground_truth_may_be_a_number(tmp_path, truth, text):
    assert rows.read(jsonl(tmp_path, problem("a", ground_truth=truth)))[0].ground_truth == text


def test_blank_lines_and_byte_order_marks_are_no_rows(tmp_path):
    path = jsonl(tmp_path, problem("a"), "", "  ", problem("b\u2028c"))
    Path(path).write_bytes(b"\xef\xbb\xbf" + Path(path).read_bytes().replace(b"\n", b"\r\n"))
    assert [prompt.id for prompt in rows.read(path)] == ["row-1", "row-4"]


@settings(deadline=None)
@given(
    st.lists(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip),
        unique=True,
        min_size=1,
        max_size=5,
    )
)
def test_any_text_survives_both_forms_exactly(tmp_path_factory, texts):
    folder = tmp_path_factory.getbasetemp()
    records = [problem(text, ground_truth=text, teachers=[{"name": text, "trace": text}]) for text in texts]
    for form in ("jsonl", "parquet"):
        assert [(p.text, p.ground_truth, p.teachers) for p in rows.read(on_disk(folder, form, *records))] == [
            (text, text, (Teacher(text, text),)) for text in texts
        ]


# --- malformed rows

MALFORMED = [  # (row, the field that the error names)
    ("{not json", "not valid JSON"),
    ("[" * 100_000, "not valid JSON"),
    ('{"prompt": "cut', "not valid JSON"),
    ([1, 2], "expected an object"),
    (None, "expected an object"),
    ({"ground_truth": "1"}, "prompt"),
    (problem(""), "prompt"),
    (problem("  "), "prompt"),
    (problem([]), "prompt"),
    (problem({"role": "user"}), "prompt"),
    (problem(["text"]), "prompt"),
    (problem([{"role": "user"}]), "prompt"),
    (problem([{"role": "user", "content": None}]), "prompt"),
    ({"prompt": "a"}, "ground_truth"),
    (problem("a", ground_truth=None), "ground_truth"),
    (problem("a", ground_truth=" "), "ground_truth"),
    (problem("a", ground_truth=True), "ground_truth"),
    (problem("a", ground_truth=["1"]), "ground_truth"),
    (problem("a", ground_truth=float("nan")), "ground_truth"),
    (problem("a", ground_truth=float("-inf")), "ground_truth"),
    (problem("a", ground_truth="\ud800"), "ground_truth"),
    (problem("a\udc00"), "prompt"),
    (problem("a", teachers=[{"name": "x", "trace": "\ud83d alone"}]), "teachers"),
    ({"prompt": "a", "reward_model": {"style": "rule"}}, "ground_truth"),
    ({"prompt": "a", "reward_model": "1"}, "ground_truth"),
    (problem("a", teachers={"name": "x", "trace": "y"}), "teachers"),
    (problem("a", teachers=["trace"]), "teachers"),
    (problem("a", teachers=[{"name": "x"}]), "teachers"),
    (problem("a", teachers=[{"name": "x", "trace": ""}]), "teachers"),
    (problem("a", teachers=[{"name": 1, "trace": "y"}]), "teachers"),
    (LUFFY | {"target": 5}, "target"),
    (LUFFY | {"target": [{"role": "assistant"}]}, "target"),
    (LUFFY | {"target_lst": "one string"}, "target_lst"),
    (LUFFY | {"target_lst": [[]]}, "target"),
    (LUFFY | {"target_lst": [None]}, "target"),
    (problem("a", id=["x"]), "id"),
    (problem("a", id="taken"), "id"),
]


@pytest.mark.parametrize("row, field", MALFORMED)
def test_a_malformed_row_is_named_by_file_line_and_field_or_skipped_and_counted(tmp_path, caplog, row, field):
    path = jsonl(
        tmp_path, problem("good", id="taken"), "", row if isinstance(row, str) else json.dumps(row), problem("better")
    )
    with pytest.raises(UserError) as caught:
        rows.read(path)
    assert str(caught.value).startswith(f"{path}:3: {field}")
    assert len(str(caught.value)) < len(path) + 250
    with caplog.at_level(logging.WARNING):
        assert [prompt.text for prompt in rows.read(path, skip_bad_rows=True)] == ["good", "better"]
    assert "1 malformed rows skipped, 2 read" in caplog.text


def test_bytes_that_are_not_utf8_are_a_malformed_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(problem("a")).encode() + b'\n{"prompt": "\xff"}\n')
    with pytest.raises(UserError, match=r"rows\.jsonl:2: not valid JSON"):
        rows.read(str(path))
    assert len(rows.read(str(path), skip_bad_rows=True)) == 1


def test_a_malformed_parquet_row_is_named_by_its_number(tmp_path):
    path = on_disk(tmp_path, "parquet", problem("a"), problem(None))
    with pytest.raises(UserError, match=r"rows\.parquet:2: prompt"):
        rows.read(path)


def test_a_missing_an_empty_or_a_damaged_file_is_named(tmp_path):
    damaged = tmp_path / "rows.parquet"
    damaged.write_bytes(b"PAR1 but not for long")
    absent, empty = str(tmp_path / "absent.jsonl"), jsonl(tmp_path)
    for path, about in (
        (absent, "no such file"),
        (str(tmp_path), "no such file"),
        (empty, "no prompt"),
        (str(damaged), "Parquet"),
    ):
        with pytest.raises(UserError, match=about) as caught:
            load_prompts(path, skip_bad_rows=True)
        assert path in str(caught.value)


# --- swallowed backslashes

SWALLOWED = [  # field, its text in Python (an unescaped backslash), the intended text
    ("prompt", "Find $\frac{1}{2}$.", r"Find $\frac{1}{2}$."),
    ("prompt", "Put it in \boxed{}.", r"Put it in \boxed{}."),
    ("prompt", "$x \neq y$, $a \to b$", r"$x \neq y$, $a \to b$"),
    ("prompt", "3 \times 4", r"3 \times 4"),
    ("prompt", "$\left( \begin{array} \right)$", r"$\left( \begin{array} \right)$"),
    ("ground_truth", "\frac{1}{2}", r"\frac{1}{2}"),
    ("ground_truth", "x \neq 2", r"x \neq 2"),
    ("ground_truth", "\tan x", r"\tan x"),
    ("ground_truth", "\alpha\vec{v}", r"\alpha\vec{v}"),
]
ORDINARY = [
    "a\tan apple",
    "so\nequal parts",
    "1\r\n2",
    "page\x0cNext",
    "nul\x00",
    "$$\na = b\n\nequal\n$$",
    "\x1b[0m",
    "\tword\ttext here",
]


@pytest.mark.parametrize("field, text, meant", SWALLOWED)
def test_a_swallowed_backslash_is_refused_by_line_or_put_back_and_counted(tmp_path, caplog, field, text, meant):
    row = problem("a", **{field: text})
    path = jsonl(tmp_path, problem("good"), row)
    with pytest.raises(
        UserError, match=rf"rows\.jsonl:2: {field}: holds a control character where '\\\\.*repair_escapes"
    ):
        rows.read(path)
    _, repaired = rows.read(path, escapes="repair")
    assert (
        meant in (repaired.text, repaired.ground_truth) and "1 rows with swallowed backslashes repaired" in caplog.text
    )
    assert [prompt.text for prompt in rows.read(path, skip_bad_rows=True)] == ["good"]
    _, kept = rows.read(path, escapes="keep")
    assert text in (kept.text, kept.ground_truth)


def test_a_swallowed_backslash_of_a_chat_and_of_a_trace_is_seen(tmp_path):
    chat = [{"role": "user", "content": "\frac12?"}]
    for field, row in (
        ("prompt", problem(chat)),
        ("teachers", problem("a", teachers=[{"name": "t", "trace": "\boxed{1}"}])),
    ):
        with pytest.raises(UserError, match=f":1: {field}: .* control character"):
            rows.read(jsonl(tmp_path, row))
        (prompt,) = rows.read(jsonl(tmp_path, row), escapes="repair")
        assert "\\frac12?" in str(prompt.messages) or prompt.teachers[0].trace == r"\boxed{1}"


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_control_characters_are_left_alone(tmp_path, text):
    for escapes in ("refuse", "repair"):
        (prompt,) = rows.read(jsonl(tmp_path, problem(text)), escapes=escapes)
        assert prompt.text == text


# --- ground truths for functions of one's own


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    "truth", [["4", "four"], [1, 2], {"answer": "4", "unit": "km"}], ids=["texts", "numbers", "object"]
)
def test_a_function_of_ones_own_gets_a_list_as_it_stands_and_ours_refuse_it(tmp_path, form, truth):
    path = on_disk(tmp_path, form, LUFFY | {"reward_model": {"ground_truth": truth, "style": "rule"}})
    with pytest.raises(UserError, match=":1: ground_truth: expected a non-empty string"):
        load_data(Data(train=path, prompts_per_step=1))
    (prompt,), _ = load_data(Data(train=path, prompts_per_step=1), any_truth=True)
    function = tmp_path / "own.py"
    function.write_text(
        "def score(data_source, solution_str, ground_truth, extra_info=None):\n"
        f"    return 1.0 if ground_truth == {truth!r} else 0.0\n"
    )
    with build_reward(Reward(function=f"{function}:score")) as reward:
        assert reward([prompt], ["x"])[0].value == 1.0


# --- sets


def test_a_prompt_that_comes_again_with_another_answer_is_counted_and_the_first_stands(tmp_path, caplog):
    path = jsonl(tmp_path, problem("a"), problem("a", ground_truth="2"), problem("a"), problem("b", ground_truth="2"))
    first, _ = load_prompts(path, False)
    assert first.ground_truth == "1"
    assert "1 prompts recur with another ground truth" in caplog.text and "row-1 has '1', row-2 '2'" in caplog.text


def test_traces_with_something_wrong_about_their_thoughts_are_counted_by_kind(tmp_path, caplog):
    traces = {
        "has its thought twice": ["<think>a</think><think>a</think>2", "[THINK]a[/THINK][THINK]a[/THINK]2"],
        "has no answer after its thought": [
            "<think>a</think>",
            "a</think>\n<|im_end|>",
            "<|START_THINKING|>a<|END_THINKING|>",
        ],
        "does not end its thought": ["<think>a", "<thought>2"],
        "": ["2", "<think>a</think>2", "a</think>2", "<seed:think>a</seed:think>2"],
    }
    texts = [text for each in traces.values() for text in each]
    load_prompts(jsonl(tmp_path, problem("a", teachers=[{"name": text, "trace": text} for text in texts])), False)
    said = "\n".join(record.getMessage() for record in caplog.records)
    for fault, broken in traces.items():
        assert not fault or f"{len(broken)} traces: each {fault}; the first: prompt row-1, teacher {broken[0]}" in said
    assert len(caplog.records) == 3


def test_duplicate_prompts_are_dropped_and_the_first_keeps_its_place(tmp_path):
    path = jsonl(tmp_path, *(problem(text) for text in "abacb"))
    assert [(prompt.text, prompt.id) for prompt in load_prompts(path, False)] == [
        ("a", "row-1"),
        ("b", "row-2"),
        ("c", "row-4"),
    ]


def test_a_chat_is_a_duplicate_only_if_every_message_is_the_same(tmp_path):
    other = [{"role": "system", "content": "Be brief."}, *CHAT]
    assert len(load_prompts(jsonl(tmp_path, problem(CHAT), problem(other), problem(CHAT)), False)) == 2


def test_a_string_is_the_same_prompt_as_a_chat_of_that_one_user_message(tmp_path):
    train = jsonl(tmp_path, *(problem([{"role": "user", "content": text}]) for text in "abcd"), problem("a"))
    assert len(load_prompts(train, False)) == 4
    other = problem([{"role": "system", "content": "c"}])
    valid = jsonl(tmp_path, problem("b"), other, name="valid.jsonl")
    training, _ = load_data(Data(train=train, valid=valid, prompts_per_step=2))
    assert [prompt.messages[0]["content"] for prompt in training] == ["a", "c", "d"]


def test_held_out_prompts_are_never_trained_on(tmp_path):
    train = jsonl(tmp_path, *(problem(text) for text in "abcd"))
    valid = jsonl(tmp_path, *(problem(text) for text in "cxa"), name="valid.jsonl")
    training, held_out = load_data(Data(train=train, valid=valid, prompts_per_step=2))
    assert [prompt.text for prompt in training] == ["b", "d"]
    assert [prompt.text for prompt in held_out] == ["c", "x", "a"]
    with pytest.raises(UserError, match=r"data\.prompts_per_step"):
        load_data(Data(train=train, valid=valid, prompts_per_step=3))


def test_too_long_a_prompt_is_named(tokenizer):
    prompts = [Prompt("short", "1", (), text="1+1"), Prompt("the-long-one", "1", (), text="1" * 20)]
    with pytest.raises(UserError, match=r"the-long-one has 20 tokens; data\.max_prompt_tokens is 19"):
        encode_prompts(prompts, tokenizer, 19)
    assert [len(group.prompt_ids) for group in encode_prompts(prompts, tokenizer, 20)] == [3, 20]


@pytest.mark.parametrize(
    "template, text, about",
    [
        ("{{ raise_exception('no system\nmessage, please') }}", "1+1", "no system message, please"),
        ("{{ messages[0].absent.field }}", "1+1", "absent"),
        ("{% if %}", "1+1", "TemplateSyntaxError"),
        ("{{ 1 + messages[0].content }}", "1+1", "TypeError"),
        ("{{ messages[0].content }}", "\ud800", "TypeError"),
        (None, "\ud800", "TypeError"),
    ],
)
def test_a_prompt_that_template_or_tokenizer_refuse_is_named_in_one_line(template, text, about):
    backend = arithmetic_backend()
    backend.chat_template = template
    prompt = Prompt("the-odd-one", "1", (), messages=({"role": "user", "content": text},))
    with pytest.raises(UserError, match=r"^data: prompt the-odd-one cannot be tokenized: ") as caught:
        Tokenizer(backend, backend.eos_token_id, plain_chat=True).encode_prompt(prompt)
    assert about in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not GSM8K.is_dir(), reason="needs shared/data/gsm8k beside the repository")
def test_real_problems_load_from_both_forms_with_their_answers(tmp_path):
    with (GSM8K / "train.jsonl").open() as lines:
        real = [json.loads(line) for line, _ in zip(lines, range(200), strict=False)]
    records = []
    for item in real:
        trace, _, answer = item["answer"].rpartition("\n#### ")
        solution = f"{trace}\n\\boxed{{{answer}}}"
        records.append(
            {
                "prompt": [{"role": "user", "content": item["question"]}],
                "ground_truth": answer,
                "teachers": [{"name": "gsm8k", "trace": solution}],
            }
        )
    loaded = [load_prompts(on_disk(tmp_path, form, *records), False) for form in ("jsonl", "parquet")]
    assert loaded[0] == loaded[1]
    assert [prompt.messages[0]["content"] for prompt in loaded[0]] == [item["question"] for item in real]
    with build_reward(Reward()) as reward:
        traces = [prompt.teachers[0].trace for prompt in loaded[0]]
        assert [score.value for score in reward(loaded[0], traces)] == [1.0] * len(real)


# --- generated tasks


def test_options_of_a_generated_task_are_typed_and_obeyed():
    prompts = generate(SUMS.format(30, 5))
    assert len(prompts) == 30
    for prompt in prompts:
        terms = prompt.text.partition(": ")[2].split(" ")
        assert 2 <= len([term for term in terms if term.isdigit()]) <= 4
    assert prompts == generate(SUMS.format(30, 5)) != generate(SUMS.format(30, 10_005))


@pytest.mark.parametrize(
    "task",
    [
        "chain_sm?size=2", "?size=2", "chain_sum?siez=2", "chain_sum?size=a", "chain_sum?size=0", "chain_sum?size=",
        "chain_sum?size", "chain_sum?size=[", "chain_sum?min_terms=4&max_terms=2", "chain_sum?seed=x&size=2",
        "chain_sum?min_terms=2.5&max_terms=3.5&size=2",
    ],
)  # fmt: skip
def test_an_unknown_task_or_option_is_refused_by_the_source_that_asked(task):
    with pytest.raises(UserError) as caught:
        generate(f"reasoning_gym:{task}")
    assert str(caught.value).startswith(f"reasoning_gym:{task}: ")


def test_a_task_without_built_in_teachers_says_so(caplog):
    with caplog.at_level(logging.WARNING):
        (prompt,) = generate("reasoning_gym:leg_counting?size=1")
    assert (prompt.teachers, prompt.source) == ((), "reasoning_gym:leg_counting")
    assert "no built-in teacher" in caplog.text


@pytest.mark.parametrize("options", ["", "&allow_negation=true"])
def test_teachers_end_in_the_right_answer_by_different_ways(tokenizer, options):
    prompts = generate(SUMS.replace("min_terms=2", "min_terms=3").format(100, 1) + options)
    assert options == "" or any("+ -" in prompt.text or "- -" in prompt.text for prompt in prompts)
    traces = [[teacher.trace for teacher in prompt.teachers] for prompt in prompts]
    with build_reward(Reward()) as reward:
        for teacher in range(2):
            texts = [pair[teacher] for pair in traces]
            assert [score.value for score in reward(prompts, texts)] == [1.0] * 100
    for prompt, pair in zip(prompts, traces, strict=True):
        assert pair[0] != pair[1]
        assert all(trace.endswith(f" \\boxed{{{prompt.ground_truth}}}") for trace in pair)
        for line in pair:  # every intermediate result is right
            for word in line.split()[1:-1:2]:
                left, result = word.split("=")
                assert sum(map(int, re.findall(r"[+-]?\d+", left.replace("--", "+")))) == int(result)
    assert any(int(prompt.ground_truth) < 0 for prompt in prompts)


def test_whatever_is_generated_round_trips_through_the_built_in_tokenizer(tokenizer):
    for prompt in generate(SUMS.format(50, 3)):
        ids = tokenizer.encode_prompt(prompt)
        assert tokenizer.decode(ids) == prompt.text
        assert UNKNOWN not in ids
        for teacher in prompt.teachers:
            ids = tokenizer.encode_trace(teacher.trace)
            assert ids[-1] == tokenizer.eos_id
            assert UNKNOWN not in ids
            assert tokenizer.decode(ids) == teacher.trace


@settings(deadline=None)
@given(st.text(st.characters(min_codepoint=32, max_codepoint=126) | st.just("\n")).filter(lambda text: "<" not in text))
def test_printable_text_round_trips_through_the_built_in_tokenizer(tokenizer, text):
    ids = tokenizer.encode_trace(text)
    assert tokenizer.decode(ids) == text
    assert UNKNOWN not in ids


# --- order


@settings(deadline=None)
@given(st.integers(1, 8), st.integers(0, 30), st.integers(0, 3))
def test_an_epoch_visits_no_row_twice_and_leaves_out_less_than_a_batch(per_step, more, seed):
    count = per_step + more
    batches = count // per_step
    for epoch in range(3):
        steps = range(epoch * batches + 1, (epoch + 1) * batches + 1)
        visited = [index for step in steps for index in batch_indices(step, per_step, count, seed)]
        assert len(visited) == len(set(visited)) > count - per_step
        assert set(visited) <= set(range(count))


@settings(deadline=None)
@given(st.permutations(range(1, 9)), st.integers(0, 2**40))
def test_a_step_visits_the_same_rows_whatever_was_visited_before(steps, seed):
    in_order = {step: batch_indices(step, 5, 13, seed) for step in range(1, 9)}
    assert {step: batch_indices(step, 5, 13, seed) for step in steps} == in_order


def test_epochs_and_seeds_visit_in_their_own_order():
    orders = {tuple(batch_indices(step, 50, 50, seed)) for seed in range(3) for step in (1, 2, 3)}
    assert len(orders) == 9
