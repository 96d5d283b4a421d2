"""Sample a suite's problems several times each, grade, and summarise: in training and in ``evaluate`` alike.

Prompt --respond--> text --reward--> Answer --figures--> avg@n, pass@k and their intervals --> table

The ranks share each round of questions; afterwards all hold all answers. Legend: P problems, n responses of each.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from megatron_dypo.config.schema import Config
from megatron_dypo.errors import UserError
from megatron_dypo.evaluate.respond import Answer, AnswerFile, Question, Respond, Said
from megatron_dypo.evaluate.suites import Suite
from megatron_dypo.monitor.progress import print_table
from megatron_dypo.records import Prompt
from megatron_dypo.reward import RewardFunction, build_reward
from megatron_dypo.runtime.distributed import Layout, all_gather_objects

RESAMPLES = 2000
CONFIDENCE = 0.95


def pass_at_k(n: int, right: int, k: int) -> float:
    """Return the chance that at least one of ``k`` of the ``n`` responses, drawn without replacement, is right.

    The unbiased estimate 1 - C(n - right, k) / C(n, k) of Chen et al. 2021 (arXiv 2107.03374, eq. 1).
    """
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def interval(values_P: np.ndarray, seed: int) -> tuple[float, float]:
    """Return a bootstrap confidence interval (95%, percentiles) of the mean over problems.

    It says how the figure would vary with other problems of the same kind: 30 problems of AIME leave much open.
    """
    generator = np.random.default_rng(seed)
    count = len(values_P)
    means = [values_P[generator.integers(count, size=count)].mean() for _ in range(RESAMPLES)]
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(means, (tail, 100 - tail))
    return float(low), float(high)


def figures(right_P: list[int], n: int, seed: int) -> dict[str, dict[str, float]]:
    """Return ``pass@1``, ``avg@n`` and ``pass@k`` for k = 2, 4, 8, ... and n, each with its interval.

    ``right_P``: number of right responses of each problem, of n. Their share, avg@n, estimates pass@1.
    """
    ks = sorted({2**power for power in range(n.bit_length())} | {n})
    wanted = {f"avg@{n}": 1} | {f"pass@{k}": k for k in ks}
    found = {}
    for name, k in wanted.items():
        values_P = np.array([pass_at_k(n, right, k) for right in right_P])
        low, high = interval(values_P, seed)
        found[name] = {"value": float(values_P.mean()), "low": low, "high": high}
    return found


SECONDS = 10.0  # between two lines


class EvaluationProgress:
    """Called with (responses, of how many), print a line every few seconds, at the start and at the end."""

    def __init__(self, suite: str, active: bool):
        self._suite, self._active, self._last = suite, active, float("-inf")

    def __call__(self, done: int, total: int) -> None:
        if self._active and (done == total or time.monotonic() - self._last > SECONDS):
            self._last = time.monotonic()
            print(f"{self._suite}: {done}/{total} responses", flush=True)


def rows(results: dict[str, dict[str, Any]]) -> list[tuple[str, ...]]:
    """Return one row per suite, the header first; shares in percent with their 95% confidence intervals."""
    header = ("suite", "problems", "samples", "avg@n = pass@1", "pass@n", "tokens", "truncated", "not graded")
    found: list[tuple[str, ...]] = [header]
    for name, result in results.items():
        n = result["samples"]
        average, best = (_share(result["figures"][key]) for key in (f"avg@{n}", f"pass@{n}"))
        counts = str(result["problems"]), str(n)
        rest = f"{result['response_tokens']:.0f}", f"{result['truncated_frac']:.1%}", str(result["faults"])
        found.append((name, *counts, average, best if n > 1 else "-", *rest))
    return found


def _share(figure: dict[str, float]) -> str:
    return f"{figure['value']:.1%} [{figure['low']:.1%}, {figure['high']:.1%}]"


def show(results: dict[str, dict[str, Any]], title: str) -> None:
    """Print the table."""
    header, *lines = rows(results)
    print_table(header, lines, {"suite"}, title)


RIGHT = 0.5  # smallest score of a right answer


def run_suite(
    suite: Suite,
    prompts: list[Prompt],
    config: Config,
    respond: Respond,
    layout: Layout,
    *,
    file: AnswerFile | None = None,
    round_size: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Ask what is not yet in ``file``, ``round_size`` responses at a time; return ``summary``. Collective.

    ``file`` is rank 0's. ``progress`` is called with (responses, of how many). Raises UserError if a question got no
    answer, once the answers that came are in the file.
    """
    settings = config.evaluation
    samples = suite.samples_in(settings)
    grading = {"function": suite.reward, "extract": suite.extract_in(settings)}
    answers: list[Answer] = list(all_gather_objects(file.answers if file else [])[0])
    known = {(answer.problem, answer.sample) for answer in answers}
    questions = [Question(prompt, i) for prompt in prompts for i in range(samples) if (prompt.id, i) not in known]
    size, total = round_size or max(1, len(questions)), len(answers) + len(questions)
    with build_reward(config.reward.model_copy(update=grading)) as reward:
        for start in range(0, len(questions), size):
            progress(len(answers), total)
            mine = questions[start : start + size][layout.rank :: layout.world]
            shares = all_gather_objects(_answers(mine, respond, reward))
            fresh = [answer for theirs, _ in shares for answer in theirs]
            if file:
                file.add(fresh)
            if faults := [fault for _, fault in shares if fault]:
                raise UserError(f"{faults[0]} (what was answered is kept)")
            answers = answers + fresh
    progress(total, total)
    return summary(prompts, samples, answers, settings.seed)


def _answers(questions: list[Question], respond: Respond, reward: RewardFunction) -> tuple[list[Answer], str | None]:
    """Return the graded answers, and why the first unanswered question has none (or None)."""
    every = list(zip(questions, respond(questions), strict=True))
    fault = next((str(one) for _, one in every if not isinstance(one, Said)), None)
    questions = [asked for asked, one in every if isinstance(one, Said)]
    said = [one for _, one in every if isinstance(one, Said)]
    scores = reward([question.prompt for question in questions], [one.text for one in said])
    answers = [
        Answer(asked.prompt.id, asked.sample, **vars(one), right=score.value >= RIGHT, fault=score.fault)
        for asked, one, score in zip(questions, said, scores, strict=True)
    ]
    return answers, fault


def summary(prompts: list[Prompt], samples: int, answers: list[Answer], seed: int) -> dict[str, Any]:
    """Return counts (``problems``, ``samples`` of each, ``faults``), ``figures``, and means over responses."""
    right = dict.fromkeys((prompt.id for prompt in prompts), 0)
    for answer in answers:
        right[answer.problem] += answer.right
    return {
        "problems": len(prompts),
        "samples": samples,
        "figures": figures(list(right.values()), samples, seed),
        "response_tokens": sum(answer.tokens for answer in answers) / len(answers),
        "truncated_frac": sum(answer.finish_reason == "length" for answer in answers) / len(answers),
        "faults": sum(answer.fault is not None for answer in answers),
    }


def metrics(name: str, result: dict[str, Any]) -> dict[str, float]:
    """Return a summary as a training step's metrics: ``eval/<suite>/avg@32``, ``eval/<suite>/pass@32``, ..."""
    n = result["samples"]
    figures_of = ["pass@1"] if n == 1 else [f"avg@{n}", f"pass@{n}"]
    found = {key: result["figures"][key]["value"] for key in figures_of}
    found |= {key: result[key] for key in ("response_tokens", "truncated_frac")}
    return {f"eval/{name}/{key}": value for key, value in found.items()}
