"""Say when a key is read: the one table behind the loader's refusals, ``--help`` and docs/configuration.md.

A key that is not in ``READ_WITH`` is always read. A key in it is read where all its conditions hold; they include the
conditions of the keys that decide, so that one pass is enough.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_dypo.config.schema import Config, Mix, Side, walk
from megatron_dypo.config.sections_rollout import REWARD_FUNCTIONS

# methods by what their recipes have (objectives/recipes.py)
SAMPLING = ("chord", "dypo", "grpo", "luffy", "ppo", "prime", "relift", "srft", "switch")  # train on sampled responses
RATIO = ("chord", "dypo", "grpo", "luffy", "ppo", "prime", "relift", "switch")  # compare with the policy that sampled
PAIRS = ("dypo",)  # have GAL's term
TEACHERS = ("dypo", "luffy", "relift", "sft", "srft", "switch")  # train on teachers' traces
IMITATING = ("dypo", "relift", "sft", "srft", "switch")  # have SFT's term
EXPERTS = ("chord",)  # train on data.experts
SHAPED = ("chord", "luffy", "srft")  # have a shaped token function
LUFFYS = ("luffy",)  # whose default shape has a gamma
TILTED = ("srft",)  # weigh a token by its entropy
GROUPED = ("chord", "dypo", "grpo", "prime", "relift", "switch")  # compare only a prompt's responses with one another
QUEUEING = ("relift",)  # queue prompts for an update of their own
RELATIVE = ("chord", "dypo", "grpo", "luffy", "relift", "srft", "switch")  # have advantages of rewards within a group
PROCESS = ("prime",)  # learn a process reward model
CRITIC = ("ppo",)  # learn a critic
SIDED = ("ppo", "prime")  # learn a second model of either kind
MIDDLE = ("dypo", "prime")  # train Mid groups differently from Easy ones
ROUTED = ("dypo", "prime", "relift", "switch")  # train different terms in different regimes

KINDS = {  # recipes by what they have in common, in the docs' words
    "recipes that sample": SAMPLING,
    "recipes with a policy ratio": RATIO,
    "recipes with group advantages": RELATIVE,
    "recipes with regimes": ROUTED,
    "recipes that tell Mid from Easy": MIDDLE,
    "recipes with teachers": TEACHERS,
    "recipes that imitate teachers": IMITATING,
    "recipes with traces": tuple(sorted({*TEACHERS, *EXPERTS})),
    "recipes that imitate traces": tuple(sorted({*IMITATING, *EXPERTS})),
    "recipes with shaped traces": SHAPED,
    "recipes with a second model": SIDED,
}


@dataclass(frozen=True)
class Condition:
    """``text`` says it in an error; ``keys`` decide; ``holds`` tests a configuration; ``docs`` is shorter, if given."""

    text: str
    keys: tuple[str, ...]
    holds: Callable[[Config], bool]
    docs: str | None = None


def lookup(config: Config, dotted: str) -> Any:
    """Return the value of a key."""
    node: Any = config
    for part in dotted.split("."):
        node = getattr(node, part)
    return node


def shown(value: Any) -> str:
    """Format a value as in YAML."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def _one_of(dotted: str, *values: Any) -> Condition:
    text = f"`{dotted}: {'` or `'.join(map(shown, values))}`"
    return Condition(text, (dotted,), lambda config: lookup(config, dotted) in values)


def _recipe(kind: str) -> Condition:
    """Return the condition that ``objective.method`` is one of ``KINDS[kind]``."""
    return dataclasses.replace(_one_of("objective.method", *KINDS[kind]), docs=kind)


def _not(dotted: str, value: Any) -> Condition:
    return Condition(f"`{dotted}` other than {shown(value)}", (dotted,), lambda config: lookup(config, dotted) != value)


def _above(dotted: str, value: float) -> Condition:
    return Condition(f"`{dotted}` above {value}", (dotted,), lambda config: lookup(config, dotted) > value)


def uses_reference(config: Config) -> bool:
    """Return whether any term reads reference log-probs (``objectives.coefficients.needs_reference``)."""
    objective = config.objective
    gal = objective.method in PAIRS and objective.alpha < 1
    ratio = objective.method in RATIO and (objective.kl_coef > 0 or objective.ratio_base == "reference")
    critic = objective.method in CRITIC and objective.kl_in_reward > 0
    return gal or ratio or critic or objective.method in PROCESS


def uses_sums(config: Config) -> bool:
    """Return whether any coefficient reads the current policy's sequence sums (``coefficients.needs_sums``)."""
    objective = config.objective
    gal = objective.method in PAIRS and objective.alpha < 1
    by_ratio = objective.method in RATIO and objective.ratio_level == "sequence"
    return gal or by_ratio or (objective.method in TILTED and objective.tilt_level == "sequence")


_SAMPLES = _recipe("recipes that sample")
_RATIO = _recipe("recipes with a policy ratio")
_TILTED = _one_of("objective.method", *TILTED)
_TEACHES = _recipe("recipes with teachers")
_IMITATES = _recipe("recipes that imitate teachers")
_AVERAGES = _recipe("recipes that imitate traces")
_EXPERTS = _one_of("objective.method", *EXPERTS)
_SHAPED = _recipe("recipes with shaped traces")
_LUFFYS = Condition(
    "`objective.shape: luffy` (or null, if that is the default of the recipe)",
    ("objective.shape", "objective.method"),
    lambda config: (
        config.objective.shape == "luffy" or (config.objective.shape is None and config.objective.method in LUFFYS)
    ),
)
_FUSED = _one_of("objective.loss_function", None)
_BOUNDED = Condition(
    "`objective.surrogate: clip` or `cispo` (or by `objective.loss_function`)",
    ("objective.surrogate", "objective.loss_function"),
    lambda config: config.objective.surrogate in ("clip", "cispo") or config.objective.loss_function is not None,
)
_RELATIVE = _recipe("recipes with group advantages")
_ROUTED = _recipe("recipes with regimes")
_PROCESS = _one_of("objective.method", *PROCESS)
_CRITIC = _one_of("objective.method", *CRITIC)
_SIDED = _recipe("recipes with a second model")
_GAL = (
    _one_of("objective.method", *PAIRS),
    Condition("`objective.alpha` below 1", ("objective.alpha",), lambda config: config.objective.alpha < 1),
)
_REFERENCE = Condition(
    "GAL's term, a process reward model, `objective.kl_coef` or `objective.kl_in_reward` above 0, or "
    "`objective.ratio_base: reference`",
    ("objective.method", "objective.alpha", "objective.kl_coef", "objective.kl_in_reward", "objective.ratio_base"),
    uses_reference,
)
_SUMS = Condition(
    "GAL's term, `objective.ratio_level: sequence` or `objective.tilt_level: sequence`",
    ("objective.method", "objective.alpha", "objective.loss_function", "objective.ratio_level", "objective.tilt_level"),
    uses_sums,
)
_ENGINE = _not("rollout.engine", "replay")
_SERVERS = _one_of("rollout.engine", "server")
_VLLM = _one_of("rollout.engine", "auto", "vllm", "server")

DEFAULTS = {name: info.get_default(call_default_factory=True) for name, info in walk()}
READ_WITH: dict[str, tuple[Condition, ...]] = {
    "model.probe": (_not("model.hf", None),),
    "model.reference_on": (_REFERENCE, _not("objective.reference", "previous")),
    "policy.routing_replay": (_SAMPLES,),
    "parallel.virtual_pipeline": (_above("parallel.pipeline", 1),),
    "parallel.sequence_parallel": (_above("parallel.tensor", 1),),
    "data.max_teacher_tokens": (_recipe("recipes with traces"),),
    "data.experts": (_EXPERTS,),
    "data.experts_per_step": (_EXPERTS,),
    "reward.extract": (_one_of("reward.function", *REWARD_FUNCTIONS), _ENGINE),
    "reward.format": (_SAMPLES, _ENGINE, _above("reward.format_penalty", 0)),
    "reward.format_penalty": (_SAMPLES, _ENGINE, _not("reward.format", "none")),
    "reward.overlong_tokens": (_SAMPLES, _ENGINE, _above("reward.overlong_penalty", 0)),
    "reward.overlong_penalty": (_SAMPLES, _ENGINE, _above("reward.overlong_tokens", 0)),
    "reward.cpu_seconds": (_ENGINE,),
    "reward.workers": (_ENGINE,),
    "rollout.servers": (_SERVERS,),
    "rollout.server_timeout": (_SERVERS,),
    "rollout.sync_backend": (_SERVERS,),
    "rollout.replay": (_one_of("rollout.engine", "replay"),),
    "rollout.samples_per_prompt": (_SAMPLES,),
    "rollout.temperature": (_SAMPLES,),
    "rollout.top_p": (_SAMPLES, _ENGINE),
    "rollout.reward_unfinished": (_SAMPLES, _ENGINE),
    "rollout.correction": (_RATIO,),
    "rollout.correction_cap": (_RATIO, _not("rollout.correction", "none")),
    "rollout.correction_floor": (_RATIO, _one_of("rollout.correction", "mask", "icepop")),
    "rollout.async_rollout": (_SAMPLES, _ENGINE),
    "rollout.max_staleness": (_SAMPLES,),
    "rollout.dynamic_sampling": (_SAMPLES, _ENGINE),
    "rollout.refill_rounds": (_SAMPLES, _ENGINE, _one_of("rollout.dynamic_sampling", True)),
    "rollout.sync_timeout": (_ENGINE,),
    "rollout.verify_sync": (_VLLM,),
    "rollout.verify_syncs": (_VLLM, _one_of("rollout.verify_sync", "sent", "stored")),
    "rollout.engine_eager": (_VLLM,),
    "rollout.engine_memory": (_VLLM,),
    "rollout.head_dtype": (_VLLM,),
    "objective.alpha": _GAL[:1],
    "objective.beta_gal": _GAL,
    "objective.gal_length_normalize": _GAL,
    "objective.gamma": (_IMITATES,),
    "objective.sft_length_normalize": (_AVERAGES, _one_of("objective.demo_aggregation", "scale")),
    "objective.demo_aggregation": (_AVERAGES,),
    **{f"objective.mix.{name}": (_EXPERTS,) for name in Mix.model_fields},
    "objective.shape": (_SHAPED,),
    "objective.shape_gamma": (_SHAPED, _LUFFYS),
    "objective.queue_size": (_one_of("objective.method", *QUEUEING),),
    "objective.queue_order": (_one_of("objective.method", *QUEUEING),),
    "objective.gate": (_ROUTED,),
    "objective.teachers_per_prompt": (_TEACHES,),
    "objective.loss_function": (_RELATIVE, _RATIO),
    "objective.surrogate": (_RATIO, _FUSED),
    "objective.clip_low": (_RATIO, _BOUNDED),
    "objective.clip_high": (_RATIO, _BOUNDED),
    "objective.sapo_tau_pos": (_RATIO, _FUSED, _one_of("objective.surrogate", "sapo")),
    "objective.sapo_tau_neg": (_RATIO, _FUSED, _one_of("objective.surrogate", "sapo")),
    "objective.kl_coef": (_RATIO,),
    "objective.hard_max_solved": (_ROUTED, _one_of("objective.gate", "reward")),
    "objective.easy_min_solved": (_recipe("recipes that tell Mid from Easy"), _one_of("objective.gate", "reward")),
    "objective.aggregation": (_SAMPLES,),
    "objective.aggregation_constant": (_SAMPLES, _one_of("objective.aggregation", "constant")),
    "objective.ratio_base": (_RATIO,),
    "objective.ratio_level": (_RELATIVE, _RATIO, _FUSED),
    "objective.reference": (_REFERENCE,),
    "objective.advantage_std": (_RELATIVE,),
    "objective.mask_truncated": (_SAMPLES,),
    "objective.process_beta": (_PROCESS,),
    "objective.process_baseline": (_PROCESS,),
    **{f"objective.{name}": (_CRITIC,) for name in ("gae_gamma", "gae_lambda", "kl_in_reward", "value_clip")},
    **{f"side.{name}": (_SIDED,) for name in Side.model_fields},
    "side.updates": (_CRITIC,),
    **{f"side.{name}": (_SIDED, _not("side.schedule", "constant")) for name in ("min_lr", "schedule_steps")},
    "objective.tilt_demo": (_TILTED,),
    "objective.tilt_right": (_TILTED,),
    "objective.weight_right": (_TILTED,),
    "objective.tilt_level": (_TILTED,),
    "objective.refresh_pair_weights": (_SUMS, _above("objective.updates_per_rollout", 1)),
    "optimizer.min_lr": (_not("optimizer.schedule", "constant"),),
    "optimizer.schedule_steps": (_not("optimizer.schedule", "constant"),),
    "logging.wandb_project": (_not("logging.wandb", "off"),),
}


@dataclass(frozen=True)
class Idle:
    """A key that is set but not read: its value, and the conditions that do not hold."""

    key: str
    value: Any
    failing: list[Condition]


def unread(config: Config) -> dict[str, list[Condition]]:
    """Return the keys that ``config`` does not read, with the conditions that do not hold."""
    failing = {name: [each for each in all_ if not each.holds(config)] for name, all_ in READ_WITH.items()}
    return {name: conditions for name, conditions in failing.items() if conditions}


def idle_keys(config: Config) -> list[Idle]:
    """Return the keys that ``config`` does not read although they are not at their defaults."""
    values = {name: lookup(config, name) for name in READ_WITH}
    return [Idle(name, values[name], each) for name, each in unread(config).items() if values[name] != DEFAULTS[name]]


def refusal(config: Config, idle: Idle, given: set[str]) -> str | None:
    """Return one line that refuses an idle key and names the key that decides; None if an override made it idle.

    ``given``: the keys of the overrides. An idle key is refused if it is one of them, or if the file itself decides.
    """
    own = [condition for condition in idle.failing if not given & set(condition.keys)]
    if idle.key not in given and not own:
        return None
    (condition, *_) = own or idle.failing
    return (
        f"{idle.key}: {shown(idle.value)} is not read with {deciding(config, condition)}, "
        f"only with {condition.text.replace('`', '')}"
    )


def put_aside(config: Config, idle: Idle) -> None:
    """Replace a key's value by its default; keep the value in ``config.written``."""
    section, _, leaf = idle.key.rpartition(".")
    setattr(lookup(config, section), leaf, DEFAULTS[idle.key])
    config.written[idle.key] = idle.value


def deciding(config: Config, condition: Condition) -> str:
    """Return the keys that decide, with their values."""
    return ", ".join(f"{name}: {shown(lookup(config, name))}" for name in condition.keys)


def read_with(dotted: str) -> str:
    """Say in words when a key is read; empty if always."""
    return " and ".join(condition.docs or condition.text for condition in READ_WITH.get(dotted, ()))
