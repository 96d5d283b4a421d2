"""Rewards: what counts as the answer, what counts as right, and that no answer can block or harm the trainer."""

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

from benchmarks.reward import hangs, simple
from megatron_dypo.config.schema import Reward
from megatron_dypo.errors import TrainingError
from megatron_dypo.records import Prompt
from megatron_dypo.reward import RewardFunction, Score, build_reward, last_boxed
from megatron_dypo.reward.math import MAX_CHARACTERS

REPOSITORY = Path(__file__).resolve().parents[1]
HANGS_IN_C = "9^{9^{9^{9}}}"  # one integer power that holds the interpreter lock
HANGS_IN_PYTHON = "(" * 3_000  # the LaTeX parser backtracks


def hard(number: int, wrong: int = 0) -> tuple[str, str]:
    """Return (ground truth, answer) that only math-verify can judge; the answer is off by ``wrong``."""
    return f"\\sqrt{{{2 * number**2}}}", f"{number + wrong}\\sqrt{{2}}"


balanced = st.recursive(
    st.text(st.characters(exclude_characters="\\{}"), max_size=8) | st.sampled_from([r"\{", r"\}", r"\\", r"\frac"]),
    lambda inner: st.lists(inner, max_size=4).map("".join) | inner.map("{{{}}}".format),
    max_leaves=12,
)


def math_reward(workers: int = 1, cpu_seconds: float = 5.0) -> RewardFunction:
    return build_reward(Reward(workers=workers, cpu_seconds=cpu_seconds))


@pytest.fixture(scope="module")
def reward() -> Iterator[RewardFunction]:
    with math_reward() as function:
        yield function


def scores_of(reward: RewardFunction, *cases: tuple[str, str]) -> list[Score]:
    """Return the scores of (ground truth, boxed answer) cases."""
    prompts = [Prompt(f"prompt-{index}", truth, ()) for index, (truth, _) in enumerate(cases)]
    return reward(prompts, [f"So \\boxed{{{answer}}}." for _, answer in cases])


def score(reward: RewardFunction, *cases: tuple[str, str]) -> list[float]:
    """Return their values, checking that none has a fault."""
    scores = scores_of(reward, *cases)
    assert [score.fault for score in scores] == [None] * len(cases)
    return [score.value for score in scores]


@pytest.fixture
def new_children() -> Callable[[], list[int]]:
    """Return a function that lists child processes (zombies included) started since the test began."""
    before = set(psutil.Process().children())
    return lambda: [child.pid for child in psutil.Process().children() if child not in before]


def workers_of(function: RewardFunction) -> list[int]:
    """Return the process ids of one function's workers."""
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
        (r"\fbox{5}", "5"),
        (r"\boxed{5}", "5"),
        (r"\boxed {5}", "5"),
        (r"\boxed{}", ""),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{1} \boxed{2}", "2"),
        (r"\boxed{1}, \boxed{2}", "1, 2"),
        (r"\boxed{1}$; $\boxed{2}$, and $\boxed{3}", "1, 2, 3"),
        (r"\boxed{1}\text{ or }\boxed{2}", "1, 2"),
        (r"x_1=\boxed{1}$, $x_2=\boxed{2}", "x_1=1, x_2=2"),
        (r"$x=\boxed{1}$ or $x=\boxed{-2}$", "1, -2"),
        (r"\boxed{1}, so \boxed{2}", "2"),
        (r"\boxed{0}: \boxed{1}, \boxed{2}", "1, 2"),
        (r"\boxed{1}, \boxed{2", "1"),
        (r"\boxed{\boxed{1}}, \boxed{2}", "1, 2"),
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
    with math_reward() as function:
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
    with math_reward() as function:
        assert score(function, (truth, answer)) == [0.0]
        assert not new_children()


def test_a_response_without_a_box_earns_nothing() -> None:
    with math_reward() as function:
        assert function([Prompt("a", "5", ())] * 3, ["The answer is 5", r"\boxed{5", ""]) == [Score(0.0)] * 3


def test_equivalent_answers_earn_the_reward(reward: RewardFunction) -> None:
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


def test_wrong_answers_earn_nothing(reward: RewardFunction) -> None:
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


def test_order_is_kept_when_answers_of_every_kind_are_mixed(reward: RewardFunction) -> None:
    cases = [("5", "5"), hard(5), ("5", "6"), hard(5, wrong=1), ("a", ""), hard(5), ("1/2", "0.5")]
    assert score(reward, *cases) == [1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 1.0]


def test_lists_of_unequal_length_are_refused(reward: RewardFunction) -> None:
    with pytest.raises(ValueError, match="zip"):
        reward([Prompt("a", "5", ())] * 2, [r"\boxed{5}"])


def test_grading_works_from_another_thread_and_outlives_it(reward: RewardFunction) -> None:
    rewards: list[float] = []
    with math_reward() as function:
        thread = threading.Thread(target=lambda: rewards.extend(score(function, hard(5), hard(5, wrong=1))))
        thread.start()
        thread.join()
        assert rewards == [1.0, 0.0]
        [worker] = workers_of(function)
        assert score(function, hard(7)) == [1.0]
        assert workers_of(function) == [worker]


# --- answers that hang, workers that die


@pytest.mark.slow
def test_a_hanging_answer_costs_its_deadline_only_and_is_counted(
    caplog: pytest.LogCaptureFixture, new_children: Callable[[], list[int]]
) -> None:
    cases = [hard(5), ("5", HANGS_IN_C), hard(2), ("5", HANGS_IN_PYTHON), ("5", HANGS_IN_C), hard(4)]
    with math_reward(workers=2, cpu_seconds=0.5) as function, caplog.at_level(logging.WARNING, "megatron_dypo.reward"):
        start = time.monotonic()
        scores = scores_of(function, *cases)
        assert time.monotonic() - start < 20.0  # two starts of a few seconds each
        fault = "over 0.5 s of CPU time"
        assert scores == [Score(1), Score(0, fault), Score(1), Score(0, fault), Score(0, fault), Score(1)]
        pids = workers_of(function)
        assert set(pids) == set(new_children())
        assert scores_of(function, ("5", HANGS_IN_C), hard(8)) == [Score(0, fault), Score(1)]
        assert workers_of(function) == pids  # the killed processes are their children
    assert not new_children()
    first, _ = [record.getMessage() for record in caplog.records]
    assert first.startswith(f"3 responses score 0: {fault}; prompts prompt-1, prompt-3, prompt-4; ")
    assert HANGS_IN_C in first
    assert {record.name for record in caplog.records} == {"megatron_dypo.reward"}


@pytest.mark.slow
def test_a_worker_that_dies_or_sleeps_is_replaced(new_children: Callable[[], list[int]]) -> None:
    with math_reward(cpu_seconds=0.2) as function:
        assert score(function, hard(5)) == [1.0]
        [worker] = workers_of(function)
        children = psutil.Process(worker).children()
        os.kill(worker, signal.SIGKILL)
        assert len(children) == 1
        assert psutil.wait_procs(children, timeout=5)[1] == []
        assert score(function, hard(6)) == [1.0]  # it died between two answers
        [asleep] = workers_of(function)
        os.kill(asleep, signal.SIGSTOP)
        late, good = scores_of(function, hard(7), hard(8))
        assert (late, good) == (Score(0, "worker over its wall-clock ceiling"), Score(1))
        [at_work] = workers_of(function)
        os.kill(at_work, signal.SIGSTOP)
        threading.Timer(0.3, os.kill, (at_work, signal.SIGKILL)).start()
        assert scores_of(function, hard(9), ("5", "5")) == [Score(0, "worker ended, -9"), Score(1)]
        assert {asleep, at_work}.isdisjoint(new_children())
    assert not new_children()


@pytest.mark.slow
def test_a_grading_process_that_dies_or_sleeps_is_replaced(new_children: Callable[[], list[int]]) -> None:
    with math_reward(cpu_seconds=0.2) as function:
        assert score(function, hard(5)) == [1.0]
        [worker] = workers_of(function)
        [child] = psutil.Process(worker).children()
        child.suspend()
        late, good = scores_of(function, hard(6), hard(7))
        assert (late, good) == (Score(0, "over the wall-clock ceiling of 2 s"), Score(1))
        assert not child.is_running()
        [child] = psutil.Process(worker).children()
        child.kill()
        psutil.wait_procs([child], 5)
        dead, good = scores_of(function, hard(8), hard(9))
        assert (dead, good) == (Score(0, "the grading process was ended by SIGKILL"), Score(1))
        assert workers_of(function) == [worker]
        family = psutil.Process(worker).children()
        assert len(family) == 1
    assert not new_children()
    assert not family[0].is_running()


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A shell starts background processes without this handler."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupted_call_leaves_no_reply_for_the_next(reward: RewardFunction, interruptible: None) -> None:
    assert score(reward, hard(5)) == [1.0]
    [worker] = workers_of(reward)
    [child] = psutil.Process(worker).children()
    child.suspend()
    threading.Timer(0.3, signal.pthread_kill, (threading.get_ident(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        score(reward, hard(5, wrong=1))
    assert not psutil.pid_exists(worker)
    assert not child.is_running()
    assert score(reward, hard(6), hard(6, wrong=1)) == [1.0, 0.0]


def test_close_leaves_no_process_even_in_the_middle_of_a_start(new_children: Callable[[], list[int]]) -> None:
    function = math_reward(workers=2)
    function._pool._staff(2)
    assert len(new_children()) == 2
    function.close()
    function.close()
    assert not new_children()


def test_close_leaves_the_call_of_another_thread_to_itself(reward: RewardFunction) -> None:
    assert score(reward, hard(5)) == [1.0]
    [worker] = workers_of(reward)
    os.kill(worker, signal.SIGSTOP)
    scores: list[float] = []
    caller = threading.Thread(target=lambda: scores.extend(score(reward, hard(6))))
    caller.start()
    while not reward._turn.locked():
        time.sleep(0.01)
    reward.close()
    assert caller.is_alive()
    os.kill(worker, signal.SIGCONT)
    caller.join(60)
    assert scores == [1.0]


@pytest.mark.slow
def test_many_hangs_cost_their_deadlines_and_leave_no_process(new_children: Callable[[], list[int]]) -> None:
    cases = [("5", f"{HANGS_IN_C}+{number}") if number % 100 == 50 else hard(number + 1) for number in range(500)]
    with math_reward(workers=2, cpu_seconds=0.5) as function:
        scores = scores_of(function, *cases)
        assert [case for case, score in zip(cases, scores, strict=True) if score.fault] == cases[50::100]
        assert sum(score.value for score in scores) == 495
        assert len(new_children()) == 2
        for worker in new_children():
            assert all(child.status() != psutil.STATUS_ZOMBIE for child in psutil.Process(worker).children(True))
    assert not new_children()


def test_workers_that_cannot_start_stop_the_run(
    monkeypatch: pytest.MonkeyPatch, new_children: Callable[[], list[int]]
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with math_reward() as function, pytest.raises(TrainingError, match="did not start"):
        score(function, hard(5))
    assert not new_children()


def test_workers_end_with_a_killed_trainer() -> None:
    trainer = subprocess.Popen(
        [sys.executable, "-c", _TRAINER, HANGS_IN_PYTHON], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )
    assert trainer.stdout.readline() == "Score(value=1.0, fault=None)\n"
    _, child = family = psutil.Process(trainer.pid).children(recursive=True)
    spent = sum(child.cpu_times()[:2])
    while sum(child.cpu_times()[:2]) < spent + 0.2:  # until it works on the answer that hangs
        time.sleep(0.02)
    trainer.kill()
    trainer.communicate()
    assert psutil.wait_procs(family, timeout=5)[1] == []


_TRAINER = r"""
import sys
from benchmarks.reward import hangs, simple
from megatron_dypo.config.schema import Reward
from megatron_dypo.records import Prompt
from megatron_dypo.reward import build_reward
reward = build_reward(Reward(cpu_seconds=60))
print(*reward([Prompt("a", r"\sqrt{8}", ())], [r"\boxed{2\sqrt{2}}"]), sep="", flush=True)
reward([Prompt("b", "5", ())], [r"\boxed{%s}" % sys.argv[1]])
"""


def test_neither_trainer_nor_worker_imports_what_it_must_not() -> None:
    listing = "import sys, megatron_dypo.reward{}; print(*sorted(sys.modules))"
    trainer, worker = (
        subprocess.check_output([sys.executable, "-c", listing.format(part)], cwd=REPOSITORY, text=True).split()
        for part in ("", ".worker_main, megatron_dypo.reward.equivalence")
    )
    heavy = {"torch", "megatron", "vllm", "numpy"}
    assert "megatron_dypo.reward.function" in trainer
    assert "math_verify" in worker
    assert not (heavy | {"math_verify", "sympy"}) & set(trainer)
    assert not heavy & set(worker)


@pytest.mark.faults
def test_the_benchmark_counts_what_it_measures() -> None:
    mix, slow = simple(300), hangs(100, 0.5)
    assert (mix["responses"], mix["faults"]) == (300, 0)
    assert 0.3 < mix["right"] < 0.7
    assert 0 < mix["to_math_verify"] < 0.1
    assert mix["per_second_text_rules"] > mix["per_second_math_verify"] > 0
    assert (slow["hangs"], slow["faults"], slow["right"]) == (1, 1, 99)
    assert (slow["zombies"], slow["processes_after_close"]) == (0, 0)
