"""Rewards: what counts as the answer, what counts as right, and that no answer can hold up or harm the trainer."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_dypo.errors import TrainingError
from megatron_dypo.reward import MathReward, last_boxed
from megatron_dypo.reward.math import MAX_CHARACTERS

REPOSITORY = Path(__file__).resolve().parents[1]
HANGS_IN_C = "9^{9^{9^{9}}}"  # one integer power that holds the interpreter lock
HANGS_IN_PYTHON = "(" * 3_000  # the LaTeX parser backtracks

balanced = st.recursive(
    st.text(st.characters(exclude_characters="\\{}"), max_size=8) | st.sampled_from([r"\{", r"\}", r"\\", r"\frac"]),
    lambda inner: st.lists(inner, max_size=4).map("".join) | inner.map("{{{}}}".format),
    max_leaves=12,
)


@pytest.fixture(scope="module")
def reward() -> Iterator[MathReward]:
    with MathReward(workers=1, cpu_seconds=5.0) as function:
        yield function
        assert function.timeouts == 0


def score(reward: MathReward, *cases: tuple[str, str]) -> list[float]:
    """Rewards of (ground truth, boxed answer) cases."""
    truths, answers = [truth for truth, _ in cases], [f"So \\boxed{{{answer}}}." for _, answer in cases]
    return reward(answers, truths, [f"prompt-{index}" for index in range(len(cases))])


@pytest.fixture
def new_children() -> Callable[[], list[int]]:
    """Gives the process ids of children (zombies included) that were not there when the test began."""
    before = set(psutil.Process().children())
    return lambda: [child.pid for child in psutil.Process().children() if child not in before]


def workers_of(function: MathReward) -> list[int]:
    """Process ids of one function's workers."""
    return [worker.process.pid for worker in function._pool._workers]


# --- the last box


@given(balanced, balanced, balanced)
def test_the_content_of_the_last_box_comes_back_unchanged(before: str, first: str, last: str) -> None:
    assert last_boxed(f"{before}\\boxed{{{first}}}{before}\\boxed{{{last}}}{before}") == last


@given(balanced, balanced, st.integers(min_value=0))
def test_a_truncated_last_box_leaves_the_one_before(first: str, last: str, cut: int) -> None:
    truncated = f"\\boxed{{{last}"
    assert last_boxed(f"\\boxed{{{first}}} so {truncated[: cut % len(truncated)]}") == first


@given(st.lists(st.sampled_from(["\\", "{", "}", "\\boxed{", "x", " "])).map("".join))
def test_in_any_text_what_is_found_is_a_balanced_part_of_it_or_nothing(text: str) -> None:
    content = last_boxed(text)
    assert content is None or (f"{content}}}" in text and last_boxed(f"\\boxed{{{content}}}") == content)


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("", None),
        ("no box, {braces}", None),
        (r"\boxed{5", None),
        (r"\boxed 5", None),
        (r"\fbox{5}", None),
        (r"\boxed{5}", "5"),
        (r"\boxed {5}", "5"),
        (r"\boxed{}", ""),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"\boxed{a \\} b}", r"a \\"),
        (r"\boxed{4}. Wait, \boxed{\frac{1}{2", "4"),
        (r"\boxed{4 and on \boxed{5}", "5"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"} { \boxed{5} } {", "5"),
    ],
)
def test_what_is_a_box(text: str, content: str | None) -> None:
    assert last_boxed(text) == content


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{7} " * 10_000,
        r"\boxed{" * 10_000,
        r"\boxed{" * 10_000 + "}" * 10_000,
        "{" * 1_000_000 + r"\boxed{7}",
        "}" * 1_000_000,
        "\\" * 1_000_000,
        r"\boxed{7}" + r"\boxed" + " " * 1_000_000,
    ],
    ids=["boxes", "open boxes", "nested boxes", "opening", "closing", "backslashes", "spaces"],
)
def test_time_to_find_the_box_is_linear(text: str) -> None:
    start = time.process_time()
    last_boxed(text)
    assert time.process_time() - start < 3.0  # a quadratic scan of any of these takes minutes


# --- right and wrong


@pytest.mark.parametrize(
    ("truth", "answer"),
    [
        ("42", "42"),
        ("42", "+042"),
        ("-7", "-7"),
        ("42", " 42 "),
        ("x + 1", "x  +\n1"),
        (r"\boxed{42}", "42"),
        ("$42$", "42"),
        (r"$$\boxed{42}$$", "$42$"),
        ("Monday", r"\text{monday}"),
        ("x" * 5_000, "x" * 5_000),
    ],
)
def test_text_that_agrees_earns_the_reward_without_any_process(
    truth: str, answer: str, new_children: Callable[[], list[int]]
) -> None:
    with MathReward() as function:
        assert score(function, (truth, answer)) == [1.0]
        assert not new_children()


@pytest.mark.parametrize(
    ("truth", "answer"),
    [
        ("42", "43"),
        ("42", "-42"),
        ("42", ""),
        ("", ""),
        ("Monday", "Sunday"),
        ("listen", "silent"),
        ("9" * (MAX_CHARACTERS + 1), "+" + "9" * (MAX_CHARACTERS + 1)),
    ],
)
def test_text_that_cannot_agree_earns_nothing_without_any_process(
    truth: str, answer: str, new_children: Callable[[], list[int]]
) -> None:
    with MathReward() as function:
        assert score(function, (truth, answer)) == [0.0]
        assert not new_children()


def test_a_response_without_a_box_earns_nothing() -> None:
    with MathReward() as function:
        assert function(["The answer is 5", r"\boxed{5", ""], ["5"] * 3, ["a", "b", "c"]) == [0.0] * 3


def test_equivalent_answers_earn_the_reward(reward: MathReward) -> None:
    cases = [
        (r"\frac{1}{2}", "0.5"),
        (r"\frac{1}{2}", "1/2"),
        (r"$\frac{1}{2}$", r"\dfrac{2}{4}"),
        ("42", "42.0"),
        ("1234", "1,234"),
        (r"\{1, 2, 3\}", r"\{3, 1, 2\}"),
        ("(x+1)^2", "x^2 + 2x + 1"),
        (r"2\sqrt{2}", r"\sqrt{8}"),
        (r"\text{(C)}", "C"),
        ("5", "x = 5"),
        (r"90^\circ", "90"),
    ]
    assert score(reward, *cases) == [1.0] * len(cases)


def test_wrong_answers_earn_nothing(reward: MathReward) -> None:
    cases = [
        (r"\frac{1}{2}", "0.51"),
        ("42", "42.5"),
        (r"\{1, 2, 3\}", r"\{1, 2\}"),
        ("(1, 2)", "(2, 1)"),
        ("(x+1)^2", "x^2 + 1"),
        ("5", r"\text{no idea}"),
        ("5", "4 or 5"),
        ("7", r"\frac{"),
        ("0", "1/0"),
    ]
    assert score(reward, *cases) == [0.0] * len(cases)


def test_order_is_kept_when_answers_of_every_kind_are_mixed(reward: MathReward) -> None:
    cases = [("5", "5"), ("5", "5.0"), ("5", "6"), ("5", "5.5"), ("a", ""), ("5", "5.0"), ("1/2", "0.5")]
    assert score(reward, *cases) == [1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 1.0]


def test_lists_of_unequal_length_are_refused(reward: MathReward) -> None:
    with pytest.raises(ValueError, match="zip"):
        reward([r"\boxed{5}"], ["5", "6"], ["a"])


def test_grading_works_from_another_thread_and_outlives_it(reward: MathReward) -> None:
    rewards: list[float] = []
    with MathReward() as function:
        thread = threading.Thread(target=lambda: rewards.extend(score(function, ("5", "5.0"), ("5", "5.1"))))
        thread.start()
        thread.join()
        assert rewards == [1.0, 0.0]
        [worker] = workers_of(function)
        assert score(function, ("1/2", "0.5")) == [1.0]
        assert workers_of(function) == [worker]


# --- answers that hang, workers that die


def test_a_hanging_answer_costs_its_deadline_only_and_is_counted(
    caplog: pytest.LogCaptureFixture, new_children: Callable[[], list[int]]
) -> None:
    cases = [("5", "5.0"), ("5", HANGS_IN_C), ("1/2", "0.5"), ("5", HANGS_IN_PYTHON), ("5", HANGS_IN_C), ("4", "4.0")]
    with MathReward(workers=2, cpu_seconds=0.5) as function, caplog.at_level(logging.WARNING, "megatron_dypo.reward"):
        start = time.monotonic()
        assert score(function, *cases) == [1.0, 0.0, 1.0, 0.0, 0.0, 1.0]
        assert time.monotonic() - start < 20.0  # two starts of a few seconds each
        assert function.timeouts == 2  # the same answer to the same truth is graded once
        assert len(new_children()) >= 1
    assert not new_children()
    [in_c] = [record.getMessage() for record in caplog.records if HANGS_IN_C in record.getMessage()]
    assert "prompt-1, prompt-4" in in_c
    assert "0.5 s of CPU time" in in_c
    assert {record.name for record in caplog.records} == {"megatron_dypo.reward"}


def test_a_worker_that_dies_or_sleeps_is_replaced(new_children: Callable[[], list[int]]) -> None:
    with MathReward(workers=1, cpu_seconds=0.2) as function:
        assert score(function, ("5", "5.0")) == [1.0]
        os.kill(*workers_of(function), signal.SIGKILL)
        time.sleep(0.2)
        assert score(function, ("6", "6.0")) == [1.0]
        assert function.timeouts == 0  # it died between two answers
        [asleep] = workers_of(function)
        os.kill(asleep, signal.SIGSTOP)
        assert score(function, ("7", "7.0"), ("8", "8.0")) == [0.0, 1.0]
        assert function.timeouts == 1
        [at_work] = workers_of(function)
        os.kill(at_work, signal.SIGSTOP)
        threading.Timer(0.3, os.kill, (at_work, signal.SIGKILL)).start()
        assert score(function, ("9", "9.0"), ("5", "5")) == [0.0, 1.0]
        assert function.timeouts == 2
        assert {asleep, at_work}.isdisjoint(new_children())
    assert not new_children()


def test_an_interrupted_call_leaves_no_reply_for_the_next(reward: MathReward) -> None:
    assert score(reward, ("5", "5.0")) == [1.0]
    [worker] = workers_of(reward)
    os.kill(worker, signal.SIGSTOP)
    threading.Timer(0.3, signal.pthread_kill, (threading.get_ident(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        score(reward, ("5", "5.5"))
    assert not psutil.pid_exists(worker)
    assert score(reward, ("6", "6.0"), ("6", "6.5")) == [1.0, 0.0]


def test_close_leaves_no_process_even_in_the_middle_of_a_start(new_children: Callable[[], list[int]]) -> None:
    function = MathReward(workers=2)
    function._pool._staff(2)
    assert len(new_children()) == 2
    function.close()
    function.close()
    assert not new_children()


def test_close_leaves_the_call_of_another_thread_to_itself(reward: MathReward) -> None:
    assert score(reward, ("5", "5.0")) == [1.0]
    [worker] = workers_of(reward)
    os.kill(worker, signal.SIGSTOP)
    scores: list[float] = []
    caller = threading.Thread(target=lambda: scores.extend(score(reward, ("6", "6.0"))))
    caller.start()
    while not reward._turn.locked():
        time.sleep(0.01)
    reward.close()
    assert caller.is_alive()
    os.kill(worker, signal.SIGCONT)
    caller.join(60)
    assert scores == [1.0]


def test_workers_that_cannot_start_stop_the_run(
    monkeypatch: pytest.MonkeyPatch, new_children: Callable[[], list[int]]
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with MathReward() as function, pytest.raises(TrainingError, match="did not start"):
        score(function, ("5", "5.0"))
    assert not new_children()


def test_workers_end_with_a_killed_trainer() -> None:
    trainer = subprocess.Popen(
        [sys.executable, "-c", _TRAINER, HANGS_IN_PYTHON], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )
    assert trainer.stdout.readline() == "[1.0]\n"
    [worker] = psutil.Process(trainer.pid).children()
    spent = sum(worker.cpu_times()[:2])
    while sum(worker.cpu_times()[:2]) < spent + 0.2:  # until it is at work on the answer that hangs
        time.sleep(0.02)
    trainer.kill()
    trainer.communicate()
    assert psutil.wait_procs([worker], timeout=5)[1] == []


_TRAINER = r"""
import sys
from megatron_dypo.reward import MathReward
reward = MathReward(cpu_seconds=60)
print(reward([r"\boxed{5.0}"], ["5"], ["a"]), flush=True)
reward([r"\boxed{%s}" % sys.argv[1]], ["5"], ["b"])
"""


def test_neither_trainer_nor_worker_imports_what_it_must_not() -> None:
    listing = "import sys, megatron_dypo.reward{}; print(*sorted(sys.modules))"
    trainer, worker = (
        subprocess.check_output([sys.executable, "-c", listing.format(part)], cwd=REPOSITORY, text=True).split()
        for part in ("", ".worker")
    )
    heavy = {"torch", "megatron", "vllm", "numpy"}
    assert "megatron_dypo.reward.function" in trainer
    assert "math_verify" in worker
    assert not (heavy | {"math_verify", "sympy"}) & set(trainer)
    assert not heavy & set(worker)
