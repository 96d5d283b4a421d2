"""Health rules over a run's metrics: a table of thresholds, each with advice.

A rule compares one metric with its own recent past, so it does not need to know a run's scale. The thresholds are set
so that a healthy run, including one from random weights, stays silent. Warnings are a function of the metrics alone:
replaying the lines of ``metrics.jsonl`` restores the state for a resumed run.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_dypo.runtime.recent import RECENT, recent_level

CALM = 50  # steps without trouble after which a rule may warn again

NORM_SPIKE = 10.0  # times the median
LOSS_SPIKE = 10.0  # standard deviations above the median, ...
LOSS_TIMES = 3.0  # ... and N times that median, ...
LOSS_FLOOR = 0.1  # ... and by at least this much: a policy-gradient loss is noise around 0
ENTROPY_FALL = 0.2  # times its median, ...
LEARNING = 1.5  # ... unless the mean reward is this many times its own median: short answers are learnt that fast
ENTROPY_RISE = 5.0  # times its median, ...
ENTROPY_NOISE = 1.0  # ... and above this, in nats per token: a policy that was sure of everything may hesitate
REWARD_FALL = 1 / 3  # of its median, ...
REWARD_LEVEL = 0.2  # ... if that is at least this: lower rewards come and go with the draw of the prompts, ...
REWARD_STEPS = 5  # ... in N steps in a row
ENTROPY_LEVEL = 0.01  # nats per token: responses to one prompt are nearly always the same, ...
ENTROPY_REWARD = 0.9  # ... which is fine if they are right
LENGTH_FALL = 1 / 3  # of the median
SATURATED = 0.5  # share of GAL's pairs
TRUNCATED = 0.5  # share of responses, ...
TRUNCATED_STEPS = 25  # ... in N steps in a row: a model that starts from noise needs a dozen to learn to stop
MISMATCH = 0.05  # nats per token; bf16 engines differ from the trainer by about 0.01
OUTLIER = 30.0  # times the median of the steps' largest mismatch, ...
OUTLIER_FLOOR = 0.01  # ... and more nats than fp32 rounding causes
EMPTY_STEPS = 20  # in a row
REWARD = "reward/mean"
COUNTS = {"train/empty_steps"}  # totals of the run, which a new stage continues

Judge = Callable[[float, "Past", Mapping[str, float]], str | None]


@dataclass(frozen=True)
class Past:
    """The recent values of one metric, oldest first, and the recent level of the mean reward (None: not known)."""

    values: tuple[float, ...]
    reward: float | None = None

    @property
    def level(self) -> float | None:
        """Return the median; None if there are too few values."""
        return recent_level(self.values)

    @property
    def deviation(self) -> float:
        """Return the standard deviation, estimated from the median distance to the median: robust to outliers."""
        level = statistics.median(self.values)
        return 1.4826 * statistics.median(abs(value - level) for value in self.values)


@dataclass(frozen=True)
class HealthRule:
    """A rule: ``judge(now, past, all metrics)`` returns what is wrong with the metric ``key``, or None.

    It warns once the judgement is bad in ``patience`` consecutive steps that have the metric.
    """

    name: str
    key: str
    judge: Judge
    advice: str
    patience: int = 1


def norm_spike(now: float, past: Past, metrics: Mapping[str, float]) -> str | None:
    if past.level and now > NORM_SPIKE * past.level:
        return f"the gradient norm is {now:.3g}, {now / past.level:.0f} times its recent median"
    return None


def loss_spike(now: float, past: Past, metrics: Mapping[str, float]) -> str | None:
    level = past.level
    if level is None or level <= 0:  # nothing to compare with: on-policy GRPO, or an SFT term that is mostly absent
        return None
    if now > LOSS_TIMES * level and now - level > max(LOSS_FLOOR, LOSS_SPIKE * past.deviation):
        return f"the loss is {now:.3g}, recently {level:.3g}"
    return None


def entropy_collapse(now: float, past: Past, metrics: Mapping[str, float]) -> str | None:
    reward = metrics.get(REWARD, math.nan)
    if reward >= ENTROPY_REWARD:
        return None
    learning = past.reward is not None and reward > LEARNING * past.reward
    if past.level is not None and now < ENTROPY_FALL * past.level and not learning:
        return f"the entropy fell to {now:.3g} nats per token, recently {past.level:.3g}"
    if now < ENTROPY_LEVEL and REWARD in metrics:
        return f"the entropy is {now:.2g} nats per token at a mean reward of {reward:.2f}"
    return None


def entropy_explosion(now: float, past: Past, metrics: Mapping[str, float]) -> str | None:
    if past.level is not None and now > max(ENTROPY_RISE * past.level, ENTROPY_NOISE):
        return f"the entropy rose to {now:.3g} nats per token, recently {past.level:.3g}"
    return None


def reward_collapse(now: float, past: Past, metrics: Mapping[str, float]) -> str | None:
    if past.level is not None and past.level >= REWARD_LEVEL and now < REWARD_FALL * past.level:
        return f"the mean reward fell to {now:.3g}, recently {past.level:.3g}"
    return None


def length_collapse(now: float, past: Past, metrics: Mapping[str, float]) -> str | None:
    if past.level is not None and now < LENGTH_FALL * past.level:
        return f"the responses fell to {now:.1f} tokens, recently {past.level:.1f}"
    return None


def saturated_pairs(now: float, past: Past, metrics: Mapping[str, float]) -> str | None:
    if now > SATURATED:
        spread = metrics.get("gal/spread", math.nan)
        return f"{now:.0%} of GAL's pairs are saturated (spread of d {spread:.1f} nats)"
    return None


def truncation(now: float, past: Past, metrics: Mapping[str, float]) -> str | None:
    return f"{now:.0%} of the responses are cut off at the limit" if now > TRUNCATED else None


def mismatch(now: float, past: Past, metrics: Mapping[str, float]) -> str | None:
    stale = metrics.get("rollout/staleness_max") or 0
    if now <= MISMATCH * (1 + stale):
        return None
    return f"trainer and engine differ by {now:.2g} nats per token" + (f", {stale:g} updates apart" if stale else "")


def mismatch_outlier(now: float, past: Past, metrics: Mapping[str, float]) -> str | None:
    if past.level is None or now <= max(OUTLIER * past.level, OUTLIER_FLOOR):
        return None
    return f"trainer and engine differ by {now:.2g} nats in one token, recently by at most {past.level:.2g}"


def empty_steps(now: float, past: Past, metrics: Mapping[str, float]) -> str | None:
    """Judge the run's count of empty steps: this step is empty if the count has grown."""
    return "step after step has nothing to train on" if now > (past.values[-1] if past.values else 0) else None


GO_BACK = "start from an earlier checkpoint (convert export) with a lower optimizer.lr"  # a resume keeps the old one
RULES = (
    HealthRule(
        "gradient norm",
        "train/grad_norm",
        norm_spike,
        "lower optimizer.lr or optimizer.clip_grad, or set trainer.spike_factor, which skips such updates",
    ),
    HealthRule("SFT loss", "loss/sft", loss_spike, "check the teacher traces of these prompts, and lower optimizer.lr"),
    HealthRule("total loss", "loss/total", loss_spike, "lower optimizer.lr, and check which of the loss/ terms jumped"),
    HealthRule(
        "entropy",
        "rollout/entropy",
        entropy_collapse,
        f"the policy no longer explores: {GO_BACK}, objective.clip_high above clip_low, or a higher "
        "rollout.temperature",
    ),
    HealthRule(
        "entropy rise",
        "rollout/entropy",
        entropy_explosion,
        f"updates undo what the policy knew: {GO_BACK} or objective.entropy_coef",
    ),
    HealthRule(
        "reward",
        REWARD,
        reward_collapse,
        f"{GO_BACK}, and read some responses (rollout.record)",
        patience=REWARD_STEPS,
    ),
    HealthRule(
        "response length",
        "rollout/response_tokens",
        length_collapse,
        "read some responses (rollout.record): a reward that short answers also get is a common cause",
    ),
    HealthRule(
        "saturated pairs",
        "gal/saturated_frac",
        saturated_pairs,
        "lower objective.beta_gal, or use objective.reference: previous",
    ),
    HealthRule(
        "truncation",
        "rollout/truncated_frac",
        truncation,
        "raise rollout.max_response_tokens, or check whether the policy has unlearned to end its responses",
        patience=TRUNCATED_STEPS,
    ),
    HealthRule(
        "mismatch",
        "rollout/mismatch_mean",
        mismatch,
        "the engine does not sample from the trained policy: use the same dtype on both sides, rollout.correction, "
        "or a lower optimizer.lr if they are updates apart",
    ),
    HealthRule(
        "largest mismatch",
        "rollout/mismatch_max",
        mismatch_outlier,
        "a weight that arrived corrupted looks like this: set rollout.verify_sync, and restart the servers",
    ),
    HealthRule(
        "empty steps",
        "train/empty_steps",
        empty_steps,
        "every prompt is solved, or none is and no teacher's trace can be used: use other data, more samples, or a "
        "recipe that learns from traces",
        patience=EMPTY_STEPS,
    ),
)


@dataclass
class _State:
    """A rule's state: bad steps in a row, good steps in a row, and whether it may warn."""

    bad: int = 0
    good: int = 0
    armed: bool = True


@dataclass
class Health:
    """Applies the rules to a stream of metrics. ``said`` counts the warnings by rule name."""

    rules: tuple[HealthRule, ...] = RULES
    said: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._states = {rule.name: _State() for rule in self.rules}
        self._past: dict[str, deque[float]] = {rule.key: deque(maxlen=RECENT) for rule in self.rules}
        self._stage = 0.0

    def check(self, step: int, metrics: Mapping[str, Any]) -> list[str]:
        """Return the warnings for this step; call in order of steps. Missing and non-finite values are not judged."""
        known = {name: float(value) for name, value in metrics.items() if value is not None and math.isfinite(value)}
        if (stage := known.get("stage", self._stage)) != self._stage:  # levels of the previous objective do not apply
            self._stage = stage
            for key in self._past.keys() - COUNTS:
                self._past[key].clear()
        found = []
        reward = recent_level(tuple(self._past.get(REWARD, ())))
        for rule in self.rules:
            if rule.key in known:
                past = Past(tuple(self._past[rule.key]), reward)
                trouble = rule.judge(known[rule.key], past, known)
                if self._is_due(rule, trouble is not None):
                    self.said[rule.name] += 1
                    found.append(f"step {step}: {trouble}: {rule.advice}")
        for key, recent in self._past.items():
            if key in known:
                recent.append(known[key])
        return found

    def _is_due(self, rule: HealthRule, is_bad: bool) -> bool:
        state = self._states[rule.name]
        state.bad, state.good = (state.bad + 1, 0) if is_bad else (0, state.good + 1)
        if state.good >= CALM:
            state.armed = True
        if not state.armed or state.bad < rule.patience:
            return False
        state.armed = False
        return True


def warnings_of(lines: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return all warnings of a run, from its metrics as read back."""
    health = Health()
    return [warning for line in lines for warning in health.check(line["step"], line)]
