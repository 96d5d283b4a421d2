r"""The grader against hand-checked pairs, its exact arithmetic against math-verify, real files against themselves."""

from __future__ import annotations

import itertools
import json
import re
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
from megatron_dypo.reward.choice import chosen, label
from megatron_dypo.reward.equivalence import equivalent
from megatron_dypo.reward.exact import exact, fraction
from megatron_dypo.reward.math import bare_truth, compare
from megatron_dypo.reward.normalize import canonical, unicode_math
from megatron_dypo.reward.numbers import number
from megatron_dypo.reward.units import quantity
from tests.answer_pairs import KNOWN_DIFFERENCES, PAIRS
from tests.answer_pairs_kinds import KINDS

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


def test_there_are_hundreds_of_hand_checked_pairs_all_different_and_wrong_ones_as_many_as_right_ones():
    pairs = [(truth, answer) for listed in PAIRS.values() for truth, answer, _ in listed]
    assert len(set(pairs)) == len(pairs) >= 600
    assert sum(equal for listed in PAIRS.values() for *_, equal in listed) >= 300
    verdicts = [equal for listed in KINDS.values() for *_, equal in listed]
    assert len(verdicts) >= 250
    assert 2 * sum(verdicts) <= len(verdicts)


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
        ("4", r"the answer is not \boxed{4}", True),  # a parser of boxes cannot tell, and it is harmless
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
    """Except for tiny numbers, for which six decimals are too coarse: there a relative difference above 1e-4 counts."""
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
    assert unicode_math(text) is text


@settings(max_examples=300)
@given(st.text(max_size=40) | st.text("0123456789.,/%$\\{}() xcm^_-=√½²°", max_size=30))
def test_no_text_makes_the_rules_fail(text):
    assert compare(canonical(text), bare_truth("5")) in (True, False) or canonical(text)
    assert label(text) is None or len(label(text)) == 1


# --- real files

needs_files = pytest.mark.skipif(not SHARED.is_dir(), reason="no folder ../shared/data")
SAME_AS_THE_NEXT = {("5", "x=5")}  # neighbours in MATH-500 with equivalent answers


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


# --- exact arithmetic, bounded


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("-2^2", "-4"),
        ("(-2)^2", "4"),
        (r"2^{-3}", "1/8"),
        (r"4^{1/2}", "2"),
        (r"\sqrt[3]{\frac{8}{27}}", "2/3"),
        (r"\frac{7!}{5!}+\binom{4}{2}", "48"),
        ("3!^2", "36"),
        ("2(3)", "6"),
        ("1/2/2", "1/4"),
        (r"3\cdot-2", "-6"),
        (r"(-1)^{10^{30}}", "1"),
        *(
            (text, None)
            for text in ("2^3^2", "3!!!", "2^{3}!", r"2\frac{1}{2}", "1/2(3)", "2 3", "0^0", "1/0", "x", "((3)")
        ),
        *((text, None) for text in (r"\sqrt{2}", r"(-8)^{1/3}", "2^{1/2}", "(-1)!", r"\binom{2}{5}", "", "-", "3+")),
    ],
)
def test_arithmetic_is_read_exactly_or_not_at_all(text, value):
    found = exact(text)
    assert (found and fraction(found)) == (value and Fraction(value))


whole = st.integers(0, 40).map(str)
sums = st.recursive(
    whole,
    lambda inner: st.one_of(
        st.builds("({}+{})".format, inner, inner),
        st.builds("({}-{})".format, inner, inner),
        st.builds("{}\\cdot {}".format, inner, inner),
        st.builds("\\frac{{{}}}{{{}}}".format, inner, st.integers(1, 50)),
        st.builds("({})^{{{}}}".format, inner, st.integers(1, 4)),
    ),
    max_leaves=6,
)


@given(sums)
def test_exact_arithmetic_is_python_s(text):
    spelled = re.sub(r"\\frac\{(.*?)\}\{(\d+)\}$", r"(\1)/\2", text) if text.count("frac") == 1 else text
    if "frac" in spelled:
        return
    spelled = re.sub(r"\d+(?!\d)", r"Fraction(\g<0>)", spelled.replace("\\cdot", "*"))
    spelled = re.sub(r"\^\{Fraction\((\d)\)\}", r"**\1", spelled)
    assert fraction(exact(text)) == eval(spelled, {"Fraction": Fraction})  # noqa: S307 - its own digits and operators


@pytest.mark.parametrize(
    "text",
    [
        "5^{5^{5^{5^5}}}", "99999999999!", "9^{9^{9^{9}}}", r"\binom{10^{9}}{5 \cdot 10^{8}}", "10^{10^{10}}",
        "+".join(["3^{80000}"] * 400), "+".join(["1/3^{20000}"] * 100), "(" * 3_999, "1" + "/7^{9999}" * 400,
        "2^{-999999999}", "((9^{9999})^{9999})^{9999}", "9" * 3_000 + "!", "(1/3)^{" + "9" * 900 + "}",
    ],
)  # fmt: skip
def test_what_is_too_large_is_not_computed(text):
    start = time.process_time()
    assert exact(text) is None
    assert time.process_time() - start < 0.2


# --- several boxes, order


@pytest.mark.parametrize(
    ("truth", "response", "right"),
    [
        ("1,-2", r"so $x=\boxed{1}$ or $x=\boxed{-2}$", True),
        ("1,-2", r"so $x=\boxed{1}$ or $x=\boxed{2}$", False),
        ("-2", r"so $x=\boxed{1}$ or $x=\boxed{-2}$", False),
        (r"x=\boxed{1}$ or $x=\boxed{-2}", r"\boxed{-2, 1}", True),
        (r"x=\boxed{1}$ or $x=\boxed{-2}", r"\boxed{-2}", False),
        (r"\frac{1}{2}", r"\boxed{4}, no: \boxed{\frac{1}{2}}", True),
        ("4, 0.5", r"\boxed{4}, no: \boxed{\frac{1}{2}}", False),
        ("x=1, y=2", r"$x=\boxed{1}$, $y=\boxed{2}$", True),
        ("x=1, y=2", r"$x=\boxed{2}$, $y=\boxed{1}$", False),
        ("5", r"\boxed{5}, \boxed{5}", True),
        ("5", r"\boxed{4}, \boxed{5}", False),
        ("5", r"\fbox{5}", True),
    ],
)
def test_neighbouring_boxes_are_one_answer(reward, truth, response, right):
    assert graded(reward, [truth], [response]) == [Score(float(right))]


@pytest.mark.parametrize(
    ("question", "right"),
    [
        ("", True),
        ("Find all integers $n$ with $f(n)=n$, separated by commas.", True),
        ("What are the roots of $x^2-3x+2$?", True),
        ("Solve $x^2-3x+2=0$.", True),
        ("Find $a$, $b$ such that $a+2b=5$ holds for all $x$. Which digits are they, in any order?", True),
        ("The code of the safe has two digits. What is the code?", False),
        ("Find $A, B$, separated by commas.", False),
        ("List all solutions in increasing order.", False),
        ("How many cats and dogs are there, respectively?", False),
        ("The roots are $p$ and $q$. Compute $p+q$ and $pq$.", False),
        ("For all $n$, find the slope and the intercept.", False),
        ("Find the sum and product of the roots.", False),
        ("What are the smallest and largest possible values of $x$?", False),
        ("Find the prime factors of 6.", True),
    ],
)
def test_a_list_is_ordered_unless_the_question_asks_for_a_set(question, right):
    with build_reward(Reward()) as function:
        for prompt in (Prompt("a", "1,2", (), text=question), Prompt("a", "1,2", (), messages=chat(question))):
            assert function([prompt] * 2, boxed(["2,1", "1,2"])) == [Score(float(right)), Score(1.0)]


def chat(question: str) -> tuple[dict[str, str], ...]:
    return ({"role": "system", "content": "List all."}, {"role": "user", "content": question}) if question else ()


# --- units

symbols = st.sampled_from(
    ["m", "km", "g", "kg", "s", "ms", "N", "J", "eV", "W", "K", "A", "V", "T", "mol", "Hz", "cm", "L"]
)
factors = st.lists(
    st.tuples(symbols, st.sampled_from([-2, -1, 1, 2])), min_size=1, max_size=3, unique_by=lambda f: f[0]
)


def power(exponent: int) -> str:
    return "" if exponent == 1 else f"^{{{exponent}}}"


def with_slash(parts: list[tuple[str, int]]) -> str:
    above = [(symbol, exponent) for symbol, exponent in parts if exponent > 0]
    below = [(symbol, -exponent) for symbol, exponent in parts if exponent < 0]
    spelled = [
        r" \cdot ".join(rf"\mathrm{{~{symbol}}}{power(exponent)}" for symbol, exponent in side)
        for side in (above, below)
    ]
    return " / ".join(side for side in spelled if side) if above else spaced(parts)


def spaced(parts: list[tuple[str, int]]) -> str:
    return r"\text{ " + " ".join(symbol + power(exponent) for symbol, exponent in reversed(parts)) + "}"


@given(st.integers(1, 999), factors, factors)
def test_units_are_the_same_however_they_are_spelt_and_others_are_wrong(value, parts, others):
    one, two = (canonical(f"{value}{spelled}") for spelled in (with_slash(parts), spaced(parts)))
    assert compare(one, two) is compare(two, one) is True
    assert compare(one, str(value)) is compare(str(value), one) is True
    assert compare(one, canonical(f"{value + 1}{spaced(parts)}")) is False
    if quantity(one).unit != quantity(canonical(f"{value}{spaced(others)}")).unit:
        assert compare(canonical(f"{value}{spaced(others)}"), one) is False


@needs_files
def test_truths_with_and_without_a_unit_agree():
    truths = {bare_truth(truth) for name in ("AIME24", "AIME25", "AMC23", "MATH-500") for truth in truths_of(name)}
    numbers = [truth for truth in sorted(truths) if number(truth)]
    units = [
        r"\text{ J}",
        r" \mathrm{~m} / \mathrm{s}^{2}",
        r"\,\Omega",
        r" \mu\mathrm{m}",
        r" \mathrm{~cm} \mathrm{~s}^{-1}",
        " K",
    ]
    for truth, unit in itertools.product(numbers, units):
        assert compare(canonical(truth + unit), truth) is True, (truth, unit)
    assert len(numbers) > 200
