"""What only the tokenizer can tell of the data, found before training: traces that hold an end token inside."""

from __future__ import annotations

import dataclasses
import logging

from megatron_dypo.data.tokenizer import Tokenizer
from megatron_dypo.errors import UserError
from megatron_dypo.records import Prompt, Teacher

log = logging.getLogger(__name__)


def with_usable_traces(prompts: list[Prompt], tokenizer: Tokenizer, skip: bool) -> list[Prompt]:
    """The prompts; with ``skip`` without their traces that hold an end token before their end, which are counted.

    Raises UserError naming the first such trace otherwise.
    """
    checked, dropped = [], 0
    for prompt in prompts:
        kept: list[Teacher] = []
        for teacher in prompt.teachers:
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
    return checked
