r"""The grader against hand-checked pairs, its exact arithmetic against math-verify, real files against themselves."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_dypo.config.schema import Reward
from megatron_dypo.records import Prompt
from megatron_dypo.reward import RewardFunction, Score, build_reward, final_answer, last_boxed
from megatron_dypo.reward.characters import plain
from megatron_dypo.reward.choice import chosen, label
from megatron_dypo.reward.equivalence import equivalent
from megatron_dypo.reward.math import bare_truth, compare
from megatron_dypo.reward.numbers import number
from megatron_dypo.reward.spelling import canonical
from tests.answer_pairs import KNOWN_DIFFERENCES, PAIRS

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
HANGS = {"9^{9^{9^{9}}}"}


@pytest.fixture(scope="module")
def reward() -> Iterator[RewardFunction]:
    with build_reward(Reward(workers=2)) as function:
        yield function


def boxed(answers: list[str]) -> list[str]:
    return [f"\\boxed{{{answer}}}" for answer in answers]


def graded(reward: RewardFunction, truths: list[str], texts: list[str]) -> list[Score]:
    return reward([Prompt(str(index), truth, ()) for index, truth in enumerate(truths)], texts)


# --- hand-checked pairs


def test_there_are_two_hundred_hand_checked_pairs_all_different():
    pairs = [(truth, answer) for listed in PAIRS.values() for truth, answer, _ in listed]
    assert len(set(pairs)) == len(pairs) >= 200
    assert sum(equal for listed in PAIRS.values() for *_, equal in listed) >= 100


@pytest.mark.parametrize("category", PAIRS)
def test_the_grader_says_what_a_mathematician_would(reward, category):
    truths, answers, _ = zip(*PAIRS[category], strict=True)
    scores = graded(reward, list(truths), boxed(list(answers)))
    differing = [pair for pair, score in zip(PAIRS[category], scores, strict=True) if bool(score.value) != pair[2]]
    assert differing == []
    assert {answer for answer, score in zip(answers, scores, strict=True) if score.fault} <= HANGS


def test_the_grader_is_known_to_differ_here(reward):
    truths, answers, equal, _ = zip(*KNOWN_DIFFERENCES, strict=True)
    scores = graded(reward, list(truths), boxed(list(answers)))
    assert [(score.value, score.fault) for score in scores] == [(float(not says), None) for says in equal]


# --- whole responses


@pytest.mark.parametrize(
    ("truth", "response", "right"),
    [
        ("5", r"First \boxed{4}, no: \boxed{5}", True),
        ("4", r"First \boxed{4}, no: \boxed{5}", False),
        ("5", r"\boxed{5} and a truncated \boxed{4", True),
        ("5", r"a truncated \boxed{5", False),
        ("4", r"the answer is not \boxed{4}", True),  # a reader of boxes cannot tell, and nobody gains by it
        ("7", r"\boxed{7} " * 10_000, True),
        ("8", r"\boxed{7} " * 10_000, False),
        ("7", r"\boxed{7}" + "{" * 1_000_000, True),
        ("7", "{" * 1_000_000 + r"\boxed{7}", True),
        ("7", r"\boxed{" + "7" * 1_000_000 + "}", False),
        ("7", r"\boxed{" + "{" * 500_000 + "}" * 500_000 + "}", False),
        ("7", r"\boxed{" + r"\frac{" * 3_000 + "7" + "}{1}" * 3_000 + "}", False),
        ("7", r"\boxed{\boxed{7}}", True),
        ("7", r"\boxed{$7$}", True),
        ("7", r"\boxed{\(7\)}", True),
        ("7", "\\boxed{\n7\n}", True),
        ("x", r"\boxed{" + "x+" * 1_900 + "x}", False),
    ],
)
def test_whole_responses(reward, truth, response, right):
    start = time.process_time()
    (score,) = graded(reward, [truth], [response])
    assert score == Score(float(right))
    assert time.process_time() - start < 3.0  # of this process; a worker's time is bounded anyway


@pytest.mark.parametrize(
    "answer",
    [
        "a b " * 999,
        "5 " + "a/" * 1900,
        "1,234," * 600,
        "(" * 3_999,
        "x=" * 1999,
        "\\frac" * 700,
        "√" * 3_999,
        "1 2 " * 999,
    ],
)
def test_text_rules_take_linear_time_for_all_practical_purposes(answer):
    start = time.process_time()
    compare(canonical(answer), "5")
    assert time.process_time() - start < 0.5


# --- what counts as the final answer


@pytest.mark.parametrize(
    ("response", "boxed_", "marked", "number_"),
    [
        (r"so \boxed{5}", "5", "5", "5"),
        (r"\boxed{5} #### 6", "5", "5", "5"),
        ("so\n#### 72", None, "72", "72"),
        ("#### 71\n#### 72\nbye", None, "72", "72"),
        ("####\n72", None, "72", "72"),
        ("####", None, None, None),
        ("the answer is 72.", None, None, "72"),
        ("it costs $1,234.50 in all", None, None, "1,234.50"),
        (r"it costs \$5.", None, None, "5"),
        ("he lost -$5", None, None, "-5"),
        ("x = -3/4", None, None, "-3/4"),
        ("12-5", None, None, "5"),
        ("between 3 and -7", None, None, "-7"),
        ("a rise of 12.5%", None, None, "12.5%"),
        ("half, .5", None, None, ".5"),
        ("in 1999, 12,345,678 people", None, None, "12,345,678"),
        ("it is −４２。", None, None, "-42"),
        ("no number", None, None, None),
        ("", None, None, None),
    ],
)
def test_the_final_answer(response, boxed_, marked, number_):
    assert [final_answer(response, how) for how in ("boxed", "marked", "number")] == [boxed_, marked, number_]


@pytest.mark.parametrize("text", ["7" * 1_000_000, "1,234" * 200_000, "-$" * 500_000, "1/" * 500_000, "#" * 1_000_000])
def test_time_to_find_the_final_answer_is_linear(text):
    start = time.process_time()
    final_answer(text, "number")
    chosen(text, "number")
    assert time.process_time() - start < 4.0


# --- options


@pytest.mark.parametrize(
    ("answer", "option"),
    [
        *(
            (text, "C")
            for text in ("C", "(C)", "C.", "C)", "C:", "c", "(c)", r"\text{C}", r"\textbf{(C)}", "$C$", "**C**")
        ),
        *((text, "C") for text in ("C) some text", "(C) some text", "C. some text", "C: some text", "option C")),
        *(
            (text, "C")
            for text in ("Option (C)", "the answer is C", "Answer: C", r"\text{C. some text}", r"\textbf{(C)}")
        ),
        *((text, "3") for text in ("3", "(3)", "3.", "3) some text")),
        *((text, None) for text in ("", "C and D", "(C) or (D)", "C, D", "A dog", "cat", "AB", "12", "C/D", "(A) (B)")),
        *((text, None) for text in ("C or D", "not C", "A) x and (B) y")),
    ],
)
def test_what_names_an_option(answer, option):
    assert label(answer) == option


@pytest.mark.parametrize(
    ("response", "boxed_", "number_"),
    [
        (r"\boxed{C}", "C", "C"),
        (r"\boxed{A} no \boxed{\text{(C)}}", "C", "C"),
        (r"\boxed{7 cats}, the answer is C.", None, None),
        ("The answer is (C).", None, "C"),
        ("The correct answer is **C**.", None, "C"),
        ("Answer: C", None, "C"),
        ("The answer is (A). Wait, the answer is (C)!", None, "C"),
        ("The answer is a good one.", None, None),
        ("The answer is not (C).", None, None),
        ("Thus\nC", None, "C"),
        ("Thus\n(C)\n", None, "C"),
        ("A dog and a cat.", None, None),
    ],
)
def test_the_option_that_a_response_chooses(response, boxed_, number_):
    assert [chosen(response, how) for how in ("boxed", "number")] == [boxed_, number_]


@pytest.mark.parametrize(("truth", "answer", "value"), [("C", "(c)", 1), ("C", "D", 0), ("3", "3", 1), ("3", "C", 0)])
def test_options_are_scored_without_any_process(truth, answer, value):
    with build_reward(Reward(function="choice")) as function:
        assert graded(function, [truth], boxed([answer])) == [Score(value)]
        assert not function._pool._workers


# --- numbers, exactly

signs = st.sampled_from(["", "-", "+"])
naturals = st.integers(0, 10**6).map(str) | st.integers(0, 99).map(str)
decimals = st.builds("{}.{}".format, st.integers(0, 999) | st.just(""), st.text("0123456789", min_size=1, max_size=7))
rationals = st.one_of(
    st.builds("{}{}".format, signs, naturals | decimals),
    st.builds("{}{:,}".format, signs, st.integers(1000, 10**9)),
    st.builds("{}{}/{}".format, signs, st.integers(0, 99), st.integers(1, 99)),
    st.builds("{}\\frac{{{}}}{{{}}}".format, signs, st.integers(0, 99), st.integers(1, 99)),
    st.builds("{}\\frac{}{}".format, signs, st.integers(1, 9), st.integers(1, 9)),
    st.builds("{}{}\\frac{{{}}}{{{}}}".format, signs, st.integers(1, 9), st.integers(1, 5), st.integers(6, 9)),
)


@settings(max_examples=400)
@given(rationals, rationals | st.none())
@example("0.333333", r"\frac{1}{3}")
@example("0.666667", r"\frac{2}{3}")
def test_exact_arithmetic_never_contradicts_math_verify(answer, truth):
    """But for tiny numbers, where six decimals are too coarse: there a difference of more than 1e-4 of it is one."""
    truth = truth or answer
    verdict = compare(canonical(answer), canonical(truth))
    if isinstance(verdict, tuple):
        return
    theirs = equivalent(answer.replace(",", ""), truth.replace(",", ""))  # it reads +1,000 as a list
    if verdict != theirs:
        x, y = number(canonical(answer)).value, number(canonical(truth)).value
        assert not verdict and 1e-4 * abs(y) < abs(x - y) <= 1e-6, (answer, truth, theirs)


@given(rationals)
def test_a_number_is_equal_to_itself_in_other_forms(text):
    value = number(canonical(text)).value
    forms = [str(value), f"\\frac{{{value.numerator}}}{{{value.denominator}}}", f"{{{value}}}"[1:-1], text.strip("+")]
    assert [compare(canonical(form), canonical(text)) for form in forms] == [True] * len(forms)
    assert compare(canonical(str(value + Fraction(1, 7))), canonical(text)) is False


@given(st.text(st.characters(codec="ascii")))
def test_ascii_is_left_as_it_is(text):
    assert plain(text) is text


@settings(max_examples=300)
@given(st.text(max_size=40) | st.text("0123456789.,/%$\\{}() xcm^_-=√½²°", max_size=30))
def test_no_text_makes_the_rules_fail(text):
    assert compare(canonical(text), bare_truth("5")) in (True, False) or canonical(text)
    assert label(text) is None or len(label(text)) == 1


# --- real files

needs_files = pytest.mark.skipif(not SHARED.is_dir(), reason="no folder ../shared/data")
SAME_AS_THE_NEXT = {("5", "x=5")}  # neighbours in MATH-500 whose answers mean the same


def truths_of(name: str) -> list[str]:
    return [row["answer"] for row in json.loads((SHARED / "eval" / f"{name}.json").read_text())]


@needs_files
@pytest.mark.parametrize(("name", "count"), [("AIME24", 30), ("AIME25", 30), ("AMC23", 40), ("MATH-500", 500)])
def test_truths_of_a_suite_are_right_against_themselves_and_wrong_against_the_next(reward, name, count):
    truths = truths_of(name)
    bare = [last_boxed(truth) or truth for truth in truths]
    assert len(truths) == count
    assert graded(reward, truths, boxed(bare)) == [Score(1.0)] * count
    others = [
        next(other for other in bare[i + 1 :] + bare[:i] if bare_truth(other) != bare_truth(bare[i]))
        for i in range(count)
    ]
    scores = graded(reward, truths, boxed(others))
    assert {score.fault for score in scores} == {None}
    right = {pair for pair, score in zip(zip(bare, others, strict=True), scores, strict=True) if score.value}
    assert right == (SAME_AS_THE_NEXT if name == "MATH-500" else set())


@needs_files
def test_truths_of_arc_are_options_right_against_themselves_alone():
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = parquet.read_table(SHARED / "eval" / "arc_c.parquet").to_pylist()
    truths = [row["reward_model"]["ground_truth"] for row in rows]
    assert (len(truths), set(truths)) == (1172, set("ABCD1234"))
    with build_reward(Reward(function="choice")) as function:
        assert graded(function, truths, boxed(truths)) == [Score(1.0)] * 1172
        nexts = [{"D": "A", "4": "1"}.get(truth, chr(ord(truth) + 1)) for truth in truths]
        assert graded(function, truths, boxed(nexts)) == [Score(0.0)] * 1172


@needs_files
@pytest.mark.parametrize("extract", ["marked", "number"])
def test_solutions_of_gsm8k_are_right_against_their_truths(extract):
    rows = [json.loads(line)["answer"] for line in (SHARED / "gsm8k" / "train.jsonl").read_text().splitlines()]
    truths = [answer.rpartition("#### ")[2] for answer in rows]
    texts = rows if extract == "marked" else [answer.replace("####", "So it is") for answer in rows]
    with build_reward(Reward(extract=extract)) as function:
        assert graded(function, truths, texts) == [Score(1.0)] * 7473
        assert graded(function, truths[:-1], texts[1:]).count(Score(1.0)) == sum(
            one.replace(",", "") == other.replace(",", "") for one, other in itertools.pairwise(truths)
        )
        assert not function._pool._workers
