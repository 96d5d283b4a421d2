"""A teacher's trace as text: what is taken off its two ends, and what is wrong with its thoughts."""

from __future__ import annotations

import re
from collections.abc import Iterable

# Ends that models' own tokens spell and that servers leave in texts. No trace means them as text at its very end.
END_MARKERS = (
    *("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|end|>", "<|return|>"),
    *("</s>", "<end_of_turn>", "<|END_OF_TURN_TOKEN|>", "<｜end▁of▁sentence｜>", "<|endofprompt|>"),
)
_TAG = re.compile(r"<[^<>\n]{1,40}>|\[[A-Z_]{2,30}\]")
_OPENED, _CLOSED = re.compile(r"<think>"), re.compile(r"</think>")


def without_ends(text: str, markers: Iterable[str] = END_MARKERS) -> str:
    """``text`` without the end tokens' markers that it ends with, and the white space after them."""
    markers = tuple(markers)
    while (bare := text.rstrip()).endswith(markers):
        text = bare[: -max(len(marker) for marker in markers if bare.endswith(marker))]
    return text


def without_opening(text: str, opening: str, markers: Iterable[str] = ()) -> str:
    """``text`` without what ``opening``, the text before it, ends with already: a thought's tag, a role's header.

    Both have it from one of their tags on; a tag is ``<...>``, ``[...]`` or one of the ``markers``. White space after
    the tag may differ, and is then the opening's.
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
    """What is wrong with a trace's ``<think>`` tags; None where nothing is, or it has none."""
    opened, closed = len(_OPENED.findall(text)), len(_CLOSED.findall(text))
    if closed > 1:
        return "has its thought twice"
    if opened > closed:
        return "does not end its thought"
    if closed and not without_ends(text.rpartition("</think>")[2]).strip():
        return "has no answer after its thought"
    return None
