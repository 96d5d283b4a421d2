"""The record that flows along the data path, one dataclass per stage.

    Prompt --rollout--> Group(responses) --reward--> rewards --grade--> regime, teacher draw --pack--> Sequence

Token ids are int32 and log-probs float32 numpy arrays: every rank holds the whole global batch in host memory
(8 bytes per response token), so each rank plans the same step and no step depends on the layout.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

import numpy as np


class Regime(enum.IntEnum):
    """A group's outcome (paper 3.1): all right, mixed, all wrong."""

    EASY = 0
    MID = 1
    HARD = 2

    @classmethod
    def of(cls, solved: int, responses: int, hard_max_solved: int = 0, easy_min_solved: int | None = None) -> Regime:
        """Return Easy if at least ``easy_min_solved`` are right, Hard if at most ``hard_max_solved``, else Mid.

        ``easy_min_solved`` defaults to all. Exclusive and exhaustive for any number of responses; Easy wins if both
        hold, and one response is never Mid.
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
    """One row of the data set. ``messages`` is a chat (list of role/content); a plain string is stored as ``text``.

    ``ground_truth`` is a list or an object only if a user's own reward function takes it. ``extra`` is the row's
    ``extra_info`` as JSON, for reward functions; empty without one.
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
    """One sampled response: ``ids`` includes the end token if one was sampled (``finish_reason == "stop"``).

    ``logprobs[t]`` is the engine's log-prob of ``ids[t]`` under the sampling distribution (nats), and
    ``weight_version`` the optimizer updates of the sampling weights. ``fault`` says why it could not be scored (its
    reward is then 0), else None. ``experts`` [tokens, layers, experts per token] is the engine's routing of the tokens
    of prompt and response, except the last, which it never read; one byte each if they fit.
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
        """Return whether it ended with an end token instead of at a limit."""
        return self.finish_reason == "stop"


@dataclass
class Group:
    """A prompt and its k responses; ``teacher_indices`` is this step's draw, if a term trains on traces.

    ``teacher_rewards`` are those of the drawn traces, if the recipe scores them. An ``expert`` group is a row of the
    expert data set: no responses, and one trace to imitate. ``holder`` is the rank that sampled the responses and
    keeps their ``experts``.
    """

    prompt: Prompt
    prompt_ids: np.ndarray
    responses: list[Response] = field(default_factory=list)
    regime: Regime | None = None
    teacher_indices: tuple[int, ...] | None = None
    teacher_rewards: tuple[float, ...] = ()
    expert: bool = False
    holder: int = 0

    @property
    def weight_version(self) -> int:
        """Return the weight version of the oldest response."""
        return min((response.weight_version for response in self.responses), default=0)

    @property
    def rewards(self) -> list[float]:
        return [response.reward for response in self.responses]

    @property
    def baseline(self) -> list[float]:
        """Return the rewards that advantages are relative to: the responses', then the scored traces'."""
        return [*self.rewards, *self.teacher_rewards]


@dataclass
class Batch:
    """A step's groups: those that train, those they replaced (dynamic sampling), and the experts' rows."""

    groups: list[Group]
    replaced: list[Group] = field(default_factory=list)
    experts: list[Group] = field(default_factory=list)

    @property
    def sampled(self) -> list[Group]:
        """Return the groups with responses, on which statistics of the policy are computed."""
        return self.groups + self.replaced


class Kind(enum.IntEnum):
    """The source of a training sequence: a response, a trace of the step's prompt, or the expert data set."""

    ROLLOUT = 0
    TEACHER = 1
    EXPERT = 2


@dataclass
class Sequence:
    """One training row: ``ids`` = prompt + response (or teacher trace); only the tail carries loss.

    ``group`` and ``sample`` index the global batch (``sample`` is the index of the response, or draw, in its group).
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
