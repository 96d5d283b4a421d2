"""Prompts, answers and teacher traces: from files or generated tasks to ``Prompt`` records, and their order."""

from __future__ import annotations

import logging

from megatron_dypo.config.schema import Data
from megatron_dypo.data import reasoning_gym_task, rows
from megatron_dypo.errors import UserError
from megatron_dypo.records import Prompt

log = logging.getLogger(__name__)


def load_prompts(source: str, skip_bad_rows: bool) -> list[Prompt]:
    """All prompts of a file or a ``reasoning_gym:`` task, duplicates (same prompt text) dropped."""
    prompts = (
        reasoning_gym_task.generate(source)
        if source.startswith(reasoning_gym_task.PREFIX)
        else rows.read(source, skip_bad_rows)
    )
    first: dict[tuple, Prompt] = {}
    for prompt in prompts:
        first.setdefault(prompt_key(prompt), prompt)
    unique = list(first.values())
    if len(unique) < len(prompts):
        log.info("%s: %d duplicate prompts dropped, %d left", source, len(prompts) - len(unique), len(unique))
    if not unique:
        raise UserError(f"{source}: holds no prompt")
    return unique


def load_data(data: Data) -> tuple[list[Prompt], list[Prompt]]:
    """(training prompts, held-out prompts); whatever is held out is removed from training.

    Raises UserError where a file is missing, a row malformed, or nothing is left to train on.
    """
    valid = load_prompts(data.valid, data.skip_bad_rows) if data.valid else []
    held_out = {prompt_key(prompt) for prompt in valid}
    everything = load_prompts(data.train, data.skip_bad_rows)
    train = [prompt for prompt in everything if prompt_key(prompt) not in held_out]
    if len(train) < len(everything):
        log.info(
            "data.train: %d prompts also held out in data.valid: removed from training", len(everything) - len(train)
        )
    if len(train) < data.prompts_per_step:
        raise UserError(
            f"data.train: {data.train} has {len(train)} prompts, "
            f"fewer than data.prompts_per_step: {data.prompts_per_step}"
        )
    return train, valid


def prompt_key(prompt: Prompt) -> tuple[tuple[str, str], ...]:
    """What duplicates and overlaps are found by: (role, text) of every message; a plain string is the user's one."""
    if prompt.text:
        return (("user", prompt.text),)
    return tuple((message["role"], message["content"]) for message in prompt.messages)
