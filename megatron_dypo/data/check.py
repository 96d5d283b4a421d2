"""What only the tokenizer can tell of traces, found before training: ends inside them, thoughts after a template's."""

from __future__ import annotations

import dataclasses
import logging

from megatron_dypo.data.tokenizer import Tokenizer
from megatron_dypo.data.traces import opening_fault
from megatron_dypo.errors import UserError
from megatron_dypo.records import Prompt, Teacher

log = logging.getLogger(__name__)


def with_usable_traces(prompts: list[Prompt], tokenizer: Tokenizer, skip: bool) -> list[Prompt]:
    """The prompts; with ``skip`` without their traces that hold an end token before their end, which are counted.

    Raises UserError naming the first such trace otherwise. Thoughts that do not fit what the chat template writes
    before an answer are warned of.
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
