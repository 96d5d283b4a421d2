"""The reward function that training and evaluation call on responses."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING, Self

from megatron_dypo.config.checks import is_custom
from megatron_dypo.errors import TrainingError, UserError
from megatron_dypo.reward.scorers import SCORERS, score_custom, unusable
from megatron_dypo.reward.worker_pool import Score, WorkerPool

if TYPE_CHECKING:
    from megatron_dypo.config.schema import Reward
    from megatron_dypo.records import Prompt

logger = logging.getLogger("megatron_dypo.reward")
_NAMED_AT_MOST = 20


def build_reward(settings: Reward) -> RewardFunction:
    """Return the function that ``reward.function`` names; raise UserError if it cannot be found, imported or called."""
    if settings.function not in SCORERS and not is_custom(settings.function):
        raise UserError(f"reward.function: {settings.function!r} is not a reward function")
    reward = RewardFunction(settings)
    if settings.function not in SCORERS:
        reward.start()
    return reward


class RewardFunction:
    """Scores responses, usually 1.0 (right) or 0.0; penalties are not included.

    ``reward.workers`` processes start at the first response that needs one. A response that takes more than
    ``reward.cpu_seconds`` in one, waits for ten times that, or makes it raise or crash scores 0 with a fault, and is
    logged with its prompt's id. May be called from any thread; concurrent calls take turns.
    """

    def __init__(self, settings: Reward) -> None:
        self._settings = settings
        self._judge = SCORERS.get(settings.function, score_custom)
        self._pool = WorkerPool(settings.function, settings.workers, settings.cpu_seconds)
        self._turn = threading.Lock()

    def __call__(self, prompts: list[Prompt], texts: list[str]) -> list[Score]:
        """Return one score per response; the lists run in parallel. Raises TrainingError if workers cannot start."""
        scores = self.scores(prompts, texts)
        _log_faults(prompts, texts, scores)
        return scores

    def scores(self, prompts: list[Prompt], texts: list[str]) -> list[Score]:
        """Score without logging the responses that cannot be scored."""
        scores = [Score(0.0)] * len(texts)
        jobs: dict[str, list[int]] = {}
        for index, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
            verdict = self._judge(prompt, text, self._settings.extract)
            if isinstance(verdict, str):
                jobs.setdefault(verdict, []).append(index)
            else:
                scores[index] = Score(verdict)
        with self._turn:
            graded = self._pool.grade(list(jobs))
        for indices, score in zip(jobs.values(), graded, strict=True):
            for index in indices:
                scores[index] = score
        return scores

    def check(self, prompts: Iterable[Prompt]) -> None:
        """Raise UserError naming the first prompt whose responses could never be scored."""
        for prompt in prompts:
            if why := unusable(self._settings.function, prompt):
                raise UserError(f"reward.function: {self._settings.function}: prompt {prompt.id}: {why}")

    def start(self) -> None:
        """Start one worker. Raises UserError if it cannot start."""
        try:
            with self._turn:
                self._pool.start()
        except TrainingError as error:
            raise UserError(f"reward.function: {self._settings.function}: {error}") from None

    def close(self) -> None:
        """End the worker processes; a later call starts new ones.

        Workers busy with another thread's call are left alone, since a job may take long: they end with this process.
        """
        if self._turn.acquire(blocking=False):
            try:
                self._pool.close()
            finally:
                self._turn.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _log_faults(prompts: list[Prompt], texts: list[str], scores: list[Score]) -> None:
    """Log one line per reason: how many responses, for which prompts, and how the first of them ends."""
    reasons: dict[str, list[int]] = {}
    for index, score in enumerate(scores):
        if score.fault is not None:
            reasons.setdefault(score.fault, []).append(index)
    for fault, indices in reasons.items():
        ids = list(dict.fromkeys(prompts[index].id for index in indices))
        more = f" and {len(ids) - _NAMED_AT_MOST} more" if len(ids) > _NAMED_AT_MOST else ""
        logger.warning(
            "%d responses score 0: %s; prompts %s; the first ends in %r",
            len(indices),
            fault,
            ", ".join(ids[:_NAMED_AT_MOST]) + more,
            texts[indices[0]][-200:],
        )
