"""A suite's problems, asked several times each, graded, and summed up: in training and by the command alike.

    Prompt --respond--> text --reward--> Answer --statistics--> figures

The ranks share every round of questions; all hold all answers afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_dypo.config.schema import Config
from megatron_dypo.errors import UserError
from megatron_dypo.evaluate.answers import Answer, AnswerFile
from megatron_dypo.evaluate.respond import Question, Respond, Said
from megatron_dypo.evaluate.statistics import figures
from megatron_dypo.evaluate.suites import Suite
from megatron_dypo.records import Prompt
from megatron_dypo.reward import RewardFunction, build_reward
from megatron_dypo.runtime.distributed import Layout, all_gather_objects

RIGHT = 0.5  # a score from here on


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
    """Ask what is not in ``file`` yet, ``round_size`` responses at a time; returns ``summary``. Collective.

    ``file`` is rank 0's. ``progress`` is told how many responses there are, of how many. Raises UserError where a
    question got no answer, after those that came are in the file.
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
    """What was answered, graded; and why the first question that was not got none."""
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
    """Counts of ``problems``, ``samples`` of each and ``faults``; ``figures`` (statistics.py); means over responses."""
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
    """A summary as a training step's metrics: ``eval/<suite>/avg@32``, ``eval/<suite>/pass@32``, ..."""
    n = result["samples"]
    figures_of = ["pass@1"] if n == 1 else [f"avg@{n}", f"pass@{n}"]
    found = {key: result["figures"][key]["value"] for key in figures_of}
    found |= {key: result[key] for key in ("response_tokens", "truncated_frac")}
    return {f"eval/{name}/{key}": value for key, value in found.items()}
