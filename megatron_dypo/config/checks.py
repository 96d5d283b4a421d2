"""Check rules that span several keys, before any file is opened or process group built."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from megatron_dypo.config.reads import GROUPED, QUEUEING
from megatron_dypo.config.schema import Config, Objective, Reward
from megatron_dypo.config.sections_rollout import REWARD_FUNCTIONS
from megatron_dypo.config.sections_training import Adam

SPARSE_LR = 3e-5  # up to it `sparse_nccl` pays: docs/rollout.md has what was measured
SPARSE_SYNCS = 4  # a value sent with its place takes 6 bytes, not 2: with fewer, those compared alone take all of that
_CUSTOM = re.compile(r"(?:[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*|[^:]*\.py):[A-Za-z_]\w*", re.ASCII)


def is_custom(function: str) -> bool:
    """Return whether ``reward.function`` is of the form ``package.module:function`` or ``path/file.py:function``."""
    return _CUSTOM.fullmatch(function) is not None


def fault(config: Config) -> str | None:
    """Return the first combination of values that cannot work, in one line that names the keys; None if all can."""
    return next((message for broken, message in _rules(config) if broken), None)


def _address_fault(addresses: list[str]) -> str | None:
    """Return what is wrong with ``rollout.servers``, or None."""
    for address in addresses:
        try:
            parts = urlsplit(address)
            good = parts.scheme in ("http", "https") and parts.hostname and parts.port
        except ValueError:  # a port that is not a number
            good = False
        if not good or parts.path not in ("", "/") or parts.query:
            return f"rollout.servers: {address!r} is not of the form http://host:port"
    if len(set(addresses)) < len(addresses):
        return "rollout.servers: an address is given twice"
    return None


def _rules(config: Config):
    model, rollout, objective = config.model, config.rollout, config.objective
    yield (model.hf is None) == (model.preset is None), "model.hf, model.preset: give exactly one of the two"
    yield (
        rollout.engine == "replay" and rollout.replay is None,
        "rollout.replay: engine `replay` needs the folder of recorded rollouts",
    )
    yield (
        rollout.engine == "server" and not rollout.servers,
        "rollout.servers: rollout.engine: server needs the addresses of the servers",
    )
    fault = _address_fault(rollout.servers)
    yield fault is not None, fault or ""
    yield (
        rollout.replay is not None and rollout.replay == rollout.record,
        "rollout.record, rollout.replay: recording into the folder being replayed would overwrite it",
    )
    yield (
        objective.hard_max_solved >= rollout.samples_per_prompt,
        f"objective.hard_max_solved: {objective.hard_max_solved} leaves no Mid group with "
        f"rollout.samples_per_prompt: {rollout.samples_per_prompt}",
    )
    easy = objective.easy_min_solved
    yield (
        easy is not None and not objective.hard_max_solved + 1 < easy <= rollout.samples_per_prompt + 1,
        f"objective.easy_min_solved: {easy} leaves no Mid group with objective.hard_max_solved: "
        f"{objective.hard_max_solved} and rollout.samples_per_prompt: {rollout.samples_per_prompt}",
    )
    yield (
        objective.updates_per_rollout > config.data.prompts_per_step,
        f"objective.updates_per_rollout: {objective.updates_per_rollout} mini-batches cannot be cut from "
        f"data.prompts_per_step: {config.data.prompts_per_step}",
    )
    yield (
        config.data.experts is not None and objective.updates_per_rollout > config.data.experts_per_step,
        f"data.experts_per_step: {config.data.experts_per_step} cannot be split over "
        f"objective.updates_per_rollout: {objective.updates_per_rollout}",
    )
    yield (
        objective.method in GROUPED and rollout.samples_per_prompt == 1,
        f"rollout.samples_per_prompt: objective.method: {objective.method} compares the responses of one prompt and "
        "needs at least 2",
    )
    yield (
        config.side.updates > config.data.prompts_per_step,
        f"side.updates: {config.side.updates} mini-batches cannot be cut from "
        f"data.prompts_per_step: {config.data.prompts_per_step}",
    )
    yield from _adam_rules("optimizer", config.optimizer)
    yield from _adam_rules("side", config.side)
    yield (
        0 < config.trainer.spike_factor <= 1,
        f"trainer.spike_factor: {config.trainer.spike_factor} would skip ordinary updates; give more than 1, or 0",
    )
    in_process = rollout.engine not in ("server", "replay")
    queues = objective.method in QUEUEING
    yield (
        rollout.async_rollout > 0
        and rollout.max_staleness is not None
        and rollout.max_staleness < objective.updates_per_rollout + queues,
        f"rollout.max_staleness: {rollout.max_staleness} would refuse "
        f"{'the batch after an update on the queue' if queues else 'every batch'}: with rollout.async_rollout they are "
        f"objective.updates_per_rollout: {objective.updates_per_rollout} updates old{', and that one' * queues}",
    )
    yield (
        rollout.async_rollout > 0 and config.trainer.offload,
        "rollout.async_rollout, trainer.offload: engine and policy cannot work at the same time and take turns",
    )
    yield (
        rollout.async_rollout > 0 and config.trainer.deterministic and in_process,
        "rollout.async_rollout, trainer.deterministic: an engine in this process turns the mode off while it "
        "samples, for concurrent training too; use rollout.engine: server",
    )
    yield (
        config.trainer.eval_every > 0 and config.data.valid is None and not config.evaluation.suites,
        "trainer.eval_every: needs data.valid or evaluation.suites",
    )
    yield from _sparse_rules(config)
    yield from _loss_rules(objective)
    yield from _reward_rules(config.reward, rollout.max_response_tokens)
    local = {"sdpa", "flash"}
    yield (
        (model.layer_spec, model.attention_backend) in {("local", "te"), *(("te", backend) for backend in local)},
        f"model.attention_backend: {model.attention_backend} does not work with model.layer_spec: {model.layer_spec}",
    )


def _sparse_rules(config: Config):
    rollout, optimizer, updates = config.rollout, config.optimizer, config.objective.updates_per_rollout
    sparse = rollout.engine == "server" and rollout.sync_backend == "sparse_nccl"
    name = "rollout.sync_backend: sparse_nccl"
    yield sparse and config.model.dtype == "fp32", f"{name}: every fp32 value changes with each update; take nccl"
    yield (
        sparse and optimizer.lr * updates > SPARSE_LR,
        f"{name}: sends values that changed, with their places: with optimizer.lr: {optimizer.lr:g} and "
        f"objective.updates_per_rollout: {updates} that may be more bytes than all of them (up to {SPARSE_LR:g} in "
        "product it pays); take nccl",
    )
    yield (
        sparse and rollout.verify_sync != "off" and rollout.verify_syncs < SPARSE_SYNCS,
        f"{name}: sends whole what rollout.verify_sync compares: with rollout.verify_syncs: {rollout.verify_syncs} "
        f"that takes more bytes than nccl does; give {SPARSE_SYNCS} or more",
    )


def _adam_rules(section: str, adam: Adam):
    decays = adam.schedule != "constant"
    yield (
        decays and adam.schedule_steps is None,
        f"{section}.schedule_steps: needed by {section}.schedule: {adam.schedule}",
    )
    yield (
        decays and adam.schedule_steps is not None and adam.schedule_steps <= adam.warmup_steps,
        f"{section}.schedule_steps: {adam.schedule_steps} must exceed {section}.warmup_steps: {adam.warmup_steps}",
    )
    yield adam.min_lr > adam.lr, f"{section}.min_lr: {adam.min_lr} exceeds {section}.lr: {adam.lr}"
    yield not all(0 <= beta < 1 for beta in adam.betas), f"{section}.betas: {adam.betas} must lie in [0, 1)"


def _loss_rules(objective: Objective):
    named = objective.loss_function
    yield (
        named is not None and not is_custom(named),
        f"objective.loss_function: {named!r} is neither package.module:function nor path/file.py:function",
    )


def _reward_rules(reward: Reward, longest: int):
    yield (
        reward.function not in REWARD_FUNCTIONS and not is_custom(reward.function),
        f"reward.function: {reward.function!r} is not one of {', '.join(REWARD_FUNCTIONS)}, package.module:function, "
        "path/file.py:function",
    )
    yield (
        reward.overlong_tokens > longest,
        f"reward.overlong_tokens: {reward.overlong_tokens} exceeds rollout.max_response_tokens: {longest}",
    )


def warnings(config: Config) -> list[str]:
    """Return what works but may surprise; logged once at the start of a run."""
    objective, found = config.objective, []
    token = objective.scale == "token"
    units = {
        "GRPO": token if objective.aggregation == "scale" else True,
        "GAL": token if objective.gal_length_normalize is None else objective.gal_length_normalize,
        "SFT": token if objective.sft_length_normalize is None else objective.sft_length_normalize,
    }
    if len(set(units.values())) > 1:
        listed = ", ".join(f"{term} per {'token' if per_token else 'trajectory'}" for term, per_token in units.items())
        found.append(f"the terms have different units ({listed}): alpha and gamma then depend on the response length")
    if config.rollout.async_rollout and config.rollout.correction == "none":
        found.append(
            "rollout.async_rollout without rollout.correction: nothing corrects for responses from weights one step "
            "older"
        )
    if config.rollout.async_rollout and config.rollout.engine != "server":
        found.append(
            "rollout.async_rollout with an engine in this process: the two share one device, so little or nothing is "
            "gained"
        )
    if objective.method in QUEUEING and config.rollout.dynamic_sampling and config.rollout.record:
        found.append(
            "rollout.record with rollout.dynamic_sampling: replaced prompts are queued but not "
            "recorded, so a replay queues fewer"
        )
    reward = config.reward
    penalties = {"reward.format_penalty": reward.format_penalty} if reward.format != "none" else {}
    penalties |= {"reward.overlong_penalty": reward.overlong_penalty} if reward.overlong_tokens else {}
    if 1 - sum(penalties.values()) < objective.reward_threshold <= 1:
        found.append(
            f"{', '.join(penalties)}: can push a right response (reward 1) below objective.reward_threshold: "
            f"{objective.reward_threshold:g}, which grades it as wrong"
        )
    unfinished = config.rollout.reward_unfinished
    if unfinished is not None and unfinished >= objective.reward_threshold:
        found.append(
            f"rollout.reward_unfinished: {unfinished:g} is at least objective.reward_threshold: "
            f"{objective.reward_threshold:g}, so every truncated response is graded as right"
        )
    if config.rollout.top_p < 1:
        found.append(
            "rollout.top_p < 1: the behaviour policy is truncated; the training log-probs are of the full softmax"
        )
    return found
