"""Whether traces lead to the answer, as training would reward them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from megatron_dypo.config.schema import Reward
from megatron_dypo.records import Prompt


class Grader(Protocol):
    def __call__(self, answers: list[str], texts: list[str]) -> list[bool | None]:
        """For each text whether its answer is right; None where nobody could tell (over its time, say)."""


@contextmanager
def grader(workers: int, extract: str) -> Iterator[Grader]:
    """``extract``: as ``reward.extract`` of the configuration."""
    from megatron_dypo.reward import build_reward

    with build_reward(Reward(workers=workers, extract=extract)) as reward:

        def grade(answers: list[str], texts: list[str]) -> list[bool | None]:
            prompts = [Prompt(f"trace {i + 1} of a batch", answer, ()) for i, answer in enumerate(answers)]
            return [None if score.fault else score.value > 0.5 for score in reward(prompts, texts)]

        yield grade
