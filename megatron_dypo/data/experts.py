"""Load the experts' data set: every (prompt, trace) pair of ``data.experts``, as a prompt with one trace to imitate.

Its pairs are not sampled, scored or graded. Their order is ``dataset.batch_indices`` with its own ``order``.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable

from megatron_dypo.config.schema import Data
from megatron_dypo.data import rows
from megatron_dypo.data.dataset import prompt_key, read_prompts, warn_of_thoughts, with_usable_traces
from megatron_dypo.data.tokenizer import Tokenizer
from megatron_dypo.errors import UserError
from megatron_dypo.records import Prompt

log = logging.getLogger(__name__)


def load_experts(data: Data, held_out: list[Prompt]) -> list[Prompt]:
    """Return the distinct pairs of ``data.experts`` whose prompt is not ``held_out``, in file order.

    The id of a pair is ``experts:ID``, or ``experts:ID:NUMBER`` (from 0) if its row has several traces. Raises
    UserError if the file is missing, or a row is malformed or without a trace (``data.skip_bad_rows`` skips and counts
    such rows).
    """
    source = data.experts
    assert source, "asked for by a recipe that has them"
    escapes: rows.Escapes = "repair" if data.repair_escapes else "refuse"
    prompts = read_prompts(source, data.skip_bad_rows, escapes=escapes, graded=False)
    if untaught := [prompt for prompt in prompts if not prompt.teachers]:
        if not data.skip_bad_rows:
            raise UserError(
                f"data.experts: {source}: {untaught[0].id} has no trace to imitate (in `teachers`, `target` or "
                "`target_lst`); data.skip_bad_rows: true leaves such rows out"
            )
        log.warning("%s: %d rows without a trace left out, of %d", source, len(untaught), len(prompts))
    warn_of_thoughts(source, prompts)
    pairs = _pairs(prompts)
    unique: dict[tuple, Prompt] = {}
    for pair in pairs:
        unique.setdefault((prompt_key(pair), pair.teachers[0].trace), pair)
    if len(unique) < len(pairs):
        log.info("%s: %d duplicate traces (same prompt) dropped", source, len(pairs) - len(unique))
    known = {prompt_key(prompt) for prompt in held_out}
    kept = [pair for (key, _), pair in unique.items() if key not in known]
    if len(kept) < len(unique):
        log.info("data.experts: %d traces of prompts in data.valid left out", len(unique) - len(kept))
    return kept


def _pairs(prompts: list[Prompt]) -> list[Prompt]:
    found = []
    for prompt in prompts:
        several = len(prompt.teachers) > 1
        for i, teacher in enumerate(prompt.teachers):
            name = f"experts:{prompt.id}:{i}" if several else f"experts:{prompt.id}"
            found.append(dataclasses.replace(prompt, id=name, teachers=(teacher,)))
    return found


def usable(experts: list[Prompt], tokenizer: Tokenizer, data: Data, room: Callable[[int], int]) -> list[Prompt]:
    """Return the pairs whose trace, end token included, has at most ``room(prompt tokens)`` tokens.

    Longer ones are dropped and counted. Raises UserError for an end token inside a trace, as for teachers, and if fewer
    than ``data.experts_per_step`` remain.
    """
    checked = [expert for expert in with_usable_traces(experts, tokenizer, data.skip_bad_rows) if expert.teachers]
    kept = [
        expert
        for expert in checked
        if len(tokenizer.encode_trace(expert.teachers[0].trace, expert)) <= room(len(tokenizer.encode_prompt(expert)))
    ]
    if len(kept) < len(checked):
        log.warning(
            "data.experts: %d of %d traces left out: too long (data.max_teacher_tokens)",
            len(checked) - len(kept),
            len(checked),
        )
    if len(kept) < data.experts_per_step:
        raise UserError(
            f"data.experts: {data.experts} has {len(kept)} traces to train on, fewer than data.experts_per_step: "
            f"{data.experts_per_step}"
        )
    return kept
