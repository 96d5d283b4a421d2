"""Translate a case's ``system`` and ``settings`` into configuration keys; no other module knows a system by name.

For a setting that is a sentence, the words before the first comma or bracket count.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

from megatron_dypo.errors import UserError

Keys = dict[str, Any]
BARELY_POSITIVE = 1e-30  # a reward threshold: every reward above 0 is right
SYSTEMS: dict[str, Keys] = {
    "SFT": {"objective.method": "sft"},
    "RL (GRPO)": {"objective.method": "grpo"},
    "SimpleRL-Zoo": {"objective.method": "grpo"},
    "SuperRL": {"objective.method": "switch", "objective.reward_threshold": BARELY_POSITIVE},
    "HPT": {"objective.method": "switch"},
    "LUFFY": {"objective.method": "luffy"},
    "CHORD": {"objective.method": "chord"},
    "ReLIFT": {
        "objective.method": "relift",
        "objective.reward_threshold": BARELY_POSITIVE,
        "objective.demo_aggregation": "token_mean",
    },
    "PRIME-Zero": {"objective.method": "prime"},
    "OpenReasoner-Zero": {"objective.method": "ppo"},
    "SimpleRL-Zero": {"objective.method": "ppo"},
    "SFT->RL": {},
    "SRFT": {"objective.method": "srft"},
    "Oat-Zero": {"objective.method": "grpo", "rollout.reward_unfinished": 0.0},
}


def _clip(value: float | None) -> Keys:
    return {"objective.clip_low": 1.0 if value is None else value, "objective.clip_high": value or 1e9}


def _shape(value: float | None) -> Keys:
    return {"objective.shape": "p"} if value is None else {"objective.shape": "luffy", "objective.shape_gamma": value}


def _aggregation(value: str) -> Keys:
    return {"objective.aggregation": _one_of(value, {"token_mean": "token_mean", "mean": "scale"})}


def _each_aggregation(value: str) -> Keys:
    return _aggregation(value) | _demo_aggregation(value)


def _chord_shape(value: str | None) -> Keys:
    return {"objective.shape": _one_of(value or "none", {"none": "nll", "phi": "phi", "p": "sg_p"})}


def _constant(value: int) -> Keys:
    return {"objective.aggregation": "constant", "objective.aggregation_constant": value}


def _demo_aggregation(value: str) -> Keys:
    return {"objective.demo_aggregation": _one_of(value, {"token_mean": "token_mean", "mean": "scale"})}


def _one_of(text: str, known: dict[str, Any]) -> Any:
    """Return the meaning of a sentence by its first words."""
    word = re.split(r"[,(]", text)[0].split()[0]
    if word not in known:
        raise ValueError(f"{text!r} begins with none of {', '.join(known)}")
    return known[word]


def _no_clip(value: float | None) -> Keys:
    if value is not None:
        raise ValueError("only null is supported: no term has a ratio")
    return {}


def _eps(value: float) -> Keys:
    if value != 1e-6:
        raise ValueError("only 1e-6 is supported")
    return {}


STAGE = {"recipe", "steps", "lr"}


def _stages(value: list[dict[str, Any]]) -> Keys:
    if not isinstance(value, list) or not all(isinstance(each, dict) and {*each} == STAGE for each in value):
        raise ValueError("expected a list of objects with recipe, steps and lr")
    return {
        "stages": [
            {
                "objective": {"method": each["recipe"]},
                "optimizer": {"lr": each["lr"]},
                "trainer": {"steps": each["steps"]},
            }
            for each in value
        ]
    }


def _as(dotted: str) -> Callable[[Any], Keys]:
    return lambda value: {dotted: value}


SETTINGS: dict[str, Callable[[Any], Keys]] = {
    "advantage_std": _as("objective.advantage_std"),
    "advantage_eps": _eps,
    "clip": _clip,
    "constant": _constant,
    "aggregation": _aggregation,
    "rl_aggregation": _aggregation,
    "kl_coef": _as("objective.kl_coef"),
    "entropy_coef": _as("objective.entropy_coef"),
    "gate": _as("objective.gate"),
    "gate_max_solved": _as("objective.hard_max_solved"),
    "k": _as("rollout.samples_per_prompt"),
    "nll": lambda value: {"objective.sft_length_normalize": _one_of(value, {"token_mean": True, "sum": False})},
    "sft_loss_coef": _as("objective.gamma"),
    "gamma": _shape,
    "w_sft": _as("objective.gamma"),
    "w_rl": _as("objective.weight_right"),
    "sft_entropy_sign": _as("objective.tilt_demo"),
    "entropy_level": lambda value: {"objective.tilt_level": _one_of(value, {"token": "token", "sequence": "sequence"})},
    "sft_aggregation": _demo_aggregation,
    "p": lambda value: {},
    "size": _as("objective.queue_size"),
    "unsolved_of_step": lambda value: {},
    "step": lambda value: {},
    "steps": lambda value: {},
    **{name: _as(f"objective.mix.{name}") for name in ("warmup", "decay", "peak", "valley")},
}
PPO = {
    "gamma": _as("objective.gae_gamma"),
    "lambda": _as("objective.gae_lambda"),
    "kl_in_reward": _as("objective.kl_in_reward"),
    "value_clip": _as("objective.value_clip"),
    "aggregation": lambda value: {
        "objective.aggregation": _one_of(value, {"token_mean": "token_mean", "sequence_mean": "scale"})
    },
    "advantage_whitening": lambda value: _one_of(value, {"mean": {}}),
    "rewards_seen": lambda value: {},
}
OWN_SETTINGS: dict[str, dict[str, Callable[[Any], Keys]]] = {  # settings whose meaning depends on the system
    "SFT": {"aggregation": _demo_aggregation},
    "CHORD": {"aggregation": _each_aggregation, "shape": _chord_shape},
    "ReLIFT": {"aggregation": _each_aggregation},  # of any update
    "SFT->RL": {"stages": _stages},
    "PRIME-Zero": {
        "beta": _as("objective.process_beta"),
        "rule": lambda value: {"objective.process_baseline": _one_of(value, {"code": "code", "paper": "paper"})},
        "process_reward": lambda value: _one_of(value, {"prm_logp": {}}),
        "whitening": lambda value: _one_of(value, {"mean": {}}),
        **dict.fromkeys(("solved", "low", "high"), lambda value: {}),
    },
    "SRFT": {"clip": _no_clip},
    **dict.fromkeys(("OpenReasoner-Zero", "SimpleRL-Zero"), PPO),
}


def _accuracies(low: float, high: float, k: int) -> Keys:
    """Convert inclusive bounds of a group's share of right responses into numbers of its k."""
    return {
        "objective.hard_max_solved": math.ceil(low * k - 1e-9) - 1,
        "objective.easy_min_solved": math.floor(high * k + 1e-9) + 1,
    }


TOGETHER: dict[tuple[str, ...], Callable[..., Keys]] = {("low", "high", "k"): _accuracies}


def configuration(case: dict[str, Any]) -> Keys:
    """Return the configuration keys of a case. Raises UserError naming an unknown system or setting."""
    system, settings = case.get("system"), case.get("settings")
    if not isinstance(system, str) or system not in SYSTEMS:
        raise UserError(f"system {system!r} is unknown; supported: {', '.join(SYSTEMS)}")
    if not isinstance(settings, dict):
        raise UserError(f"settings: expected an object, got {settings!r:.80}")
    keys = dict(SYSTEMS[system])
    known = SETTINGS | OWN_SETTINGS.get(system, {})
    for name in settings:
        if name not in known:
            raise UserError(f"settings.{name}: unknown; known: {', '.join(known)}")
    meanings: list[tuple[tuple[str, ...], Callable[..., Keys]]] = [((name,), known[name]) for name in settings]
    meanings += [(names, function) for names, function in TOGETHER.items() if settings.keys() >= {*names}]
    for names, meaning in meanings:
        values = [settings[name] for name in names]
        try:
            keys |= meaning(*values)
        except (ValueError, AttributeError, IndexError, TypeError) as error:
            shown = ", ".join(f"{value!r:.80}" for value in values)
            raise UserError(f"settings.{', '.join(names)}: {shown}: {error}") from None
    return keys
