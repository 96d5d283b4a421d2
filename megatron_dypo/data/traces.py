"""Clean a teacher's trace as text: what to strip at its two ends, and what is wrong with its thoughts."""

from __future__ import annotations

import re
from collections.abc import Iterable

# Ends that models' own tokens spell and that servers leave in texts. No trace ends with them as plain text.
END_MARKERS = (
    "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|end|>", "<|return|>",
    "</s>", "<end_of_turn>", "<|END_OF_TURN_TOKEN|>", "<｜end▁of▁sentence｜>", "<|endofprompt|>",
)  # fmt: skip
_TAG = re.compile(r"<[^<>\n]{1,40}>|\[[A-Z_]{2,30}\]")
THOUGHTS = (  # how models delimit their thoughts before they answer
    ("<think>", "</think>"), ("<thinking>", "</thinking>"), ("<thought>", "</thought>"),
    ("<seed:think>", "</seed:think>"), ("<|START_THINKING|>", "<|END_THINKING|>"), ("[THINK]", "[/THINK]"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
)  # fmt: skip
_REPEATED = 40  # characters; a shorter thought may match the start of an answer by chance
UNENDED, TWICE, UNANSWERED = "does not end its thought", "has its thought twice", "has no answer after its thought"


def without_ends(text: str, markers: Iterable[str] = END_MARKERS) -> str:
    """Return ``text`` without the end markers at its end, and the white space after them."""
    markers = tuple(markers)
    while (bare := text.rstrip()).endswith(markers):
        text = bare[: -max(len(marker) for marker in markers if bare.endswith(marker))]
    return text


def without_opening(text: str, opening: str, markers: Iterable[str] = ()) -> str:
    """Return ``text`` without what ``opening``, the text before it, ends with: a thought's tag, a role's header.

    The overlap starts at a tag: ``<...>``, ``[...]`` or one of the ``markers``. White space after the tag may differ;
    the opening's is kept.
    """
    begun = text.lstrip()
    starts = {match.start() for match in _TAG.finditer(opening)}
    for marker in filter(None, markers):
        starts.update(match.start() for match in re.finditer(re.escape(marker), opening))
    for start in sorted(starts):
        tail = opening[start:]
        bare = tail.rstrip()
        if begun.startswith(tail):
            return begun[len(tail) :]
        if begun.startswith(bare):
            rest = begun[len(bare) :]
            return rest if tail == bare else rest.lstrip()
    return text


def thought_fault(text: str) -> str | None:
    """Return what is wrong with a trace's thought: UNENDED, TWICE or UNANSWERED; None if nothing, or if it has none.

    The opening tag may be missing: the chat template may write it.
    """
    for opens, closes in THOUGHTS:
        opened, closed = text.count(opens), text.count(closes)
        if text.rfind(opens) > text.rfind(closes):
            return UNENDED
        if closed > 1 or opened > 1:
            return TWICE
        if closed and not without_ends(text.rpartition(closes)[2]).strip():
            return UNANSWERED
    return None


def opening_fault(opening: str, trace: str) -> str | None:
    """Return what is wrong with a trace after ``opening``, the text before it, or None."""
    for opens, closes in THOUGHTS:
        if opening.rstrip().endswith(opens) and closes not in trace:
            return "does not end the thought that the prompt begins"
        if opening.rstrip().endswith(closes) and opens in trace:
            return "begins a thought after the one that the prompt ends"
    return None


def thinking(reasoning: str, text: str) -> str:
    """Join an answer and the reasoning that a server returned separately: within tags, before the answer.

    A copy of the reasoning at the start of the answer, as some servers send, is removed.
    """
    reasoning, text = reasoning.strip(), text.strip()
    for opens, closes in THOUGHTS:
        if text.startswith(opens) and closes in text:
            text = text.partition(closes)[2].lstrip()
    if len(reasoning) > _REPEATED and text.startswith(reasoning):
        text = text.removeprefix(reasoning).lstrip()
    for _, closes in THOUGHTS:
        text = text.removeprefix(closes).lstrip()
    return f"<think>\n{reasoning}\n</think>\n\n{text}"
