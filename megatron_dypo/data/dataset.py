"""Load prompts, answers and teacher traces as ``Prompt`` records, check the traces, and order the prompts.

The order is a pure function of (seed, step), so there is nothing to restore on resume. Checks of traces that need the
tokenizer (end tokens inside, thoughts that do not fit the template) also run here, before training.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from typing import Any

import torch

from megatron_dypo.config.schema import Data
from megatron_dypo.data import rows, tasks
from megatron_dypo.data.tokenizer import Tokenizer
from megatron_dypo.data.traces import opening_fault, thought_fault
from megatron_dypo.errors import UserError
from megatron_dypo.records import Prompt, Teacher
from megatron_dypo.runtime.determinism import generator

log = logging.getLogger(__name__)


def read_prompts(source: str, skip_bad_rows: bool, **reading: Any) -> list[Prompt]:
    """Read all prompts of a file or a ``reasoning_gym:`` task; ``reading`` are options of ``rows.read``."""
    if source.startswith(tasks.PREFIX):
        return tasks.generate(source)
    return rows.read(source, skip_bad_rows, **reading)


def load_prompts(
    source: str, skip_bad_rows: bool, *, escapes: rows.Escapes = "refuse", any_truth: bool = False
) -> list[Prompt]:
    """Read all prompts of a file or a ``reasoning_gym:`` task and drop later duplicates (same prompt text).

    Log a warning for duplicates with another ground truth, and for traces with malformed thoughts. ``escapes`` and
    ``any_truth`` as in ``rows.read``.
    """
    prompts = read_prompts(source, skip_bad_rows, escapes=escapes, any_truth=any_truth)
    first: dict[tuple, Prompt] = {}
    differing: list[tuple[Prompt, Prompt]] = []
    for prompt in prompts:
        known = first.setdefault(prompt_key(prompt), prompt)
        if known.ground_truth != prompt.ground_truth:
            differing.append((known, prompt))
    unique = list(first.values())
    if len(unique) < len(prompts):
        log.info("%s: %d duplicate prompts dropped, %d left", source, len(prompts) - len(unique), len(unique))
    if differing:
        known, other = differing[0]
        log.warning(
            "%s: %d prompts recur with another ground truth, and the first is kept: %s has %.60r, %s %.60r",
            source,
            len(differing),
            known.id,
            known.ground_truth,
            other.id,
            other.ground_truth,
        )
    warn_of_thoughts(source, unique)
    if not unique:
        raise UserError(f"{source}: holds no prompt")
    return unique


def warn_of_thoughts(source: str, prompts: list[Prompt]) -> None:
    """Log one warning per kind of fault with its number of traces (``traces.thought_fault``)."""
    found: dict[str, list[str]] = {}
    for prompt in prompts:
        for teacher in prompt.teachers:
            if fault := thought_fault(teacher.trace):
                found.setdefault(fault, []).append(f"{prompt.id}, teacher {teacher.name}")
    for fault, places in found.items():
        log.warning("%s: %d traces: each %s; the first: prompt %s", source, len(places), fault, places[0])


def load_data(data: Data, any_truth: bool = False) -> tuple[list[Prompt], list[Prompt]]:
    """Return (training prompts, held-out prompts); held-out prompts are removed from training.

    ``any_truth``: ground truths may be lists and objects, for a user's reward function. Raises UserError if a file is
    missing, a row is malformed, or no prompt is left to train on.
    """

    def load(source: str) -> list[Prompt]:
        escapes: rows.Escapes = "repair" if data.repair_escapes else "refuse"
        return load_prompts(source, data.skip_bad_rows, escapes=escapes, any_truth=any_truth)

    valid = load(data.valid) if data.valid else []
    held_out = {prompt_key(prompt) for prompt in valid}
    everything = load(data.train)
    train = [prompt for prompt in everything if prompt_key(prompt) not in held_out]
    if len(train) < len(everything):
        log.info(
            "data.train: %d prompts also held out in data.valid: removed from training", len(everything) - len(train)
        )
    require_batch(train, data)
    return train, valid


def require_batch(train: list[Prompt], data: Data) -> None:
    """Raise UserError if there are fewer prompts than one step takes."""
    if len(train) < data.prompts_per_step:
        raise UserError(
            f"data.train: {data.train} has {len(train)} prompts, "
            f"fewer than data.prompts_per_step: {data.prompts_per_step}"
        )


def prompt_key(prompt: Prompt) -> tuple[tuple[str, str], ...]:
    """Return what identifies duplicates: (role, text) of every message; a plain string counts as the user's."""
    if prompt.text:
        return (("user", prompt.text),)
    return tuple((message["role"], message["content"]) for message in prompt.messages)


@functools.lru_cache(maxsize=4)
def _permutation(count: int, seed: int, order: str, epoch: int) -> list[int]:
    return torch.randperm(count, generator=generator(seed, order, epoch)).tolist()


def batch_indices(step: int, per_step: int, count: int, seed: int, order: str = "epoch") -> list[int]:
    """Return distinct row indices for step ``step`` (from 1) among ``count`` rows; ``order`` salts the shuffle.

    An epoch has as many whole batches as the rows allow; the remaining rows wait for the next epoch's shuffle, so that
    no batch holds a prompt twice.
    """
    batches = count // per_step
    epoch, batch = divmod(step - 1, batches)
    return _permutation(count, seed, order, epoch)[batch * per_step : (batch + 1) * per_step]


@functools.lru_cache(maxsize=2)
def spare_indices(step: int, per_step: int, count: int, seed: int) -> tuple[int, ...]:
    """Return the rows that are not in the batch of step ``step``, in an order specific to that step."""
    batch = set(batch_indices(step, per_step, count, seed))
    order = torch.randperm(count, generator=generator(seed, "refill", step)).tolist()
    return tuple(row for row in order if row not in batch)


def with_usable_traces(prompts: list[Prompt], tokenizer: Tokenizer, skip: bool) -> list[Prompt]:
    """Return the prompts; with ``skip``, drop (and count) traces with an end token before their end.

    Without ``skip``, raise UserError naming the first such trace. Log a warning for thoughts that do not fit what the
    chat template writes before an answer.
    """
    checked, dropped = [], 0
    misfits: dict[str, list[str]] = {}
    for prompt in prompts:
        kept: list[Teacher] = []
        opening = tokenizer.opening(prompt) if prompt.teachers else ""
        for teacher in prompt.teachers:
            if fault := opening_fault(opening, teacher.trace):
                misfits.setdefault(fault, []).append(f"{prompt.id}, teacher {teacher.name}")
            if (end := tokenizer.end_inside(teacher.trace)) is None:
                kept.append(teacher)
            elif not skip:
                raise UserError(
                    f"data: prompt {prompt.id}: the trace of teacher {teacher.name} holds the end token {end} before "
                    "its end (data.skip_bad_rows: true leaves such traces out)"
                )
        dropped += len(prompt.teachers) - len(kept)
        same = len(kept) == len(prompt.teachers)
        checked.append(prompt if same else dataclasses.replace(prompt, teachers=tuple(kept)))
    if dropped:
        log.warning("data: %d traces left out that hold an end token before their end", dropped)
    for fault, places in misfits.items():
        log.warning("data: %d traces: each %s; the first: prompt %s", len(places), fault, places[0])
    return checked
