"""The record that flows down the data path, one dataclass per stage of its life.

    Prompt --rollout--> Group(responses) --reward--> rewards --grade--> regime, teacher draw --pack--> Sequence

Token ids are int32 and log-probs float32 numpy arrays: every rank holds the whole global batch in host memory
(8 bytes a response token), so each plans the same step by itself and no step depends on the layout.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

import numpy as np


class Regime(enum.IntEnum):
    """How a group did (paper 3.1): all right, mixed, all wrong."""

    EASY = 0
    MID = 1
    HARD = 2

    @classmethod
    def of(cls, solved: int, responses: int, hard_max_solved: int = 0, easy_min_solved: int | None = None) -> Regime:
        """Easy if at least ``easy_min_solved`` are right (default: all), Hard if at most ``hard_max_solved``, else Mid.

        Exclusive and exhaustive from one response on; Easy wins where both would hold, and one response has no Mid.
        """
        easy = responses if easy_min_solved is None else easy_min_solved
        return cls.EASY if solved >= easy else cls.HARD if solved <= hard_max_solved else cls.MID


@dataclass(frozen=True)
class Teacher:
    """One teacher's reasoning trace for one prompt, as text."""

    name: str
    trace: str


@dataclass(frozen=True)
class Prompt:
    """One row of the data set. ``messages`` is a chat (list of role/content); a plain string is kept as ``text``.

    ``ground_truth`` is a list or an object only where a reward function of the user's own takes it. ``extra`` is the
    row's ``extra_info`` as JSON, for reward functions; empty where it has none.
    """

    id: str
    ground_truth: str | list | dict
    teachers: tuple[Teacher, ...]
    source: str = ""
    messages: tuple[dict[str, str], ...] = ()
    text: str = ""
    extra: str = ""


@dataclass
class Response:
    """One sampled response: ``ids`` includes the end token when one was sampled (``finish_reason == "stop"``).

    ``logprobs[t]`` is the engine's log-prob of ``ids[t]`` under the distribution it sampled from (nats), and
    ``weight_version`` the optimizer updates behind the weights it sampled from. ``fault`` says why nobody could score
    it (its reward is then 0); None where it was scored. ``experts`` [tokens, layers, experts per token] is where the
    engine's routers sent the tokens of prompt and response, but for the last, which it never read.
    """

    ids: np.ndarray
    logprobs: np.ndarray
    finish_reason: str
    reward: float = float("nan")
    weight_version: int = 0
    fault: str | None = None
    experts: np.ndarray | None = None

    @property
    def finished(self) -> bool:
        """Whether it ended by itself, with an end token, and was not cut at a limit."""
        return self.finish_reason == "stop"


@dataclass
class Group:
    """A prompt and its k responses; ``teacher_indices`` is the draw for this step, where a term trains on traces.

    ``teacher_rewards`` are those of the drawn traces, where the recipe scores them. An ``expert`` group is a row of the
    expert data set: no responses, and one trace to imitate.
    """

    prompt: Prompt
    prompt_ids: np.ndarray
    responses: list[Response] = field(default_factory=list)
    regime: Regime | None = None
    teacher_indices: tuple[int, ...] | None = None
    teacher_rewards: tuple[float, ...] = ()
    expert: bool = False

    @property
    def weight_version(self) -> int:
        """Of the oldest response."""
        return min((response.weight_version for response in self.responses), default=0)

    @property
    def rewards(self) -> list[float]:
        return [response.reward for response in self.responses]

    @property
    def baseline(self) -> list[float]:
        """The rewards that advantages are relative to: of the responses, then of the traces that were scored."""
        return [*self.rewards, *self.teacher_rewards]


@dataclass
class Batch:
    """A step's groups: those that hold its places and train, those that they took the place of (refill), and the
    experts' rows."""

    groups: list[Group]
    replaced: list[Group] = field(default_factory=list)
    experts: list[Group] = field(default_factory=list)

    @property
    def sampled(self) -> list[Group]:
        """Those with responses: what statistics of the policy are about."""
        return self.groups + self.replaced


class Kind(enum.IntEnum):
    """Where a training sequence is from: a response, a trace of the step's prompt, or one of the expert data set."""

    ROLLOUT = 0
    TEACHER = 1
    EXPERT = 2


@dataclass
class Sequence:
    """One row to train on: ``ids`` = prompt + response (or teacher trace); only the tail carries loss.

    ``group`` and ``sample`` index the global batch (``sample`` is the response's, or the draw's, place in its group).
    """

    ids: np.ndarray
    prompt_length: int
    kind: Kind
    group: int
    sample: int

    @property
    def length(self) -> int:
        return len(self.ids)

    @property
    def loss_tokens(self) -> int:
        return len(self.ids) - self.prompt_length
