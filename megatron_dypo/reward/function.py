"""The reward function that the training loop calls on a batch of responses."""

from __future__ import annotations

import logging
import threading
from typing import Self

from megatron_dypo.reward.boxed import last_boxed
from megatron_dypo.reward.math import bare_truth, canonical, compare
from megatron_dypo.reward.workers import WorkerPool

logger = logging.getLogger("megatron_dypo.reward")


class MathReward:
    """Scores responses 1.0 (right) or 0.0 by the last boxed answer of each.

    ``workers`` processes start at the first answer that needs math-verify; an answer may take ``cpu_seconds`` of CPU
    time in one. An answer over that, or whose worker crashed, scores 0, is logged with its prompt ids and adds one to
    ``timeouts``. May be called from any thread; calls from several take turns.
    """

    def __init__(self, workers: int = 1, cpu_seconds: float = 5.0) -> None:
        self.timeouts = 0
        self._pool = WorkerPool(workers, cpu_seconds)
        self._turn = threading.Lock()

    def __call__(self, texts: list[str], ground_truths: list[str], prompt_ids: list[str]) -> list[float]:
        """One reward a response, in order; the three lists run in parallel. Raises TrainingError without workers."""
        rewards = [0.0] * len(texts)
        undecided: dict[tuple[str, str], list[int]] = {}
        for index, (text, ground_truth, _) in enumerate(zip(texts, ground_truths, prompt_ids, strict=True)):
            boxed = last_boxed(text)
            if boxed is None:
                continue
            pair = canonical(boxed), bare_truth(ground_truth)
            agrees = compare(*pair)
            if agrees is None:
                undecided.setdefault(pair, []).append(index)
            else:
                rewards[index] = float(agrees)
        with self._turn:
            verdicts = self._pool.grade(list(undecided))
            for (pair, indices), verdict in zip(undecided.items(), verdicts, strict=True):
                if isinstance(verdict, str):
                    self.timeouts += 1
                    ids = ", ".join(sorted({prompt_ids[index] for index in indices}))
                    logger.warning("prompt %s: answer %.200r scores 0: %s", ids, pair[0], verdict)
                    continue
                for index in indices:
                    rewards[index] = float(verdict)
        return rewards

    def close(self) -> None:
        """Ends the worker processes; a later call starts new ones.

        Those at work for another thread's call are left, since an answer may take its time: they end with this process.
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
