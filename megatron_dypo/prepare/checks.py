"""What keeps a problem or a trace out, apart from what needs all of the data: pure functions, and token counts."""

from __future__ import annotations

from datetime import date
from pathlib import Path

from megatron_dypo.data.traces import TWICE, UNANSWERED, UNENDED, thought_fault
from megatron_dypo.errors import UserError
from megatron_dypo.prepare.layouts import Trace
from megatron_dypo.records import Prompt

_MOST_TOKENS = 1 << 22  # no vocabulary is larger
_DAY = date(2026, 1, 1)  # what templates that read the clock are given: lengths are the same on every day


def fault(trace: Trace) -> str | None:
    """Why a trace is not an example to learn from, whatever its answer, by the name of its count, or None.

    Cut off, by the data set's own mark or within its thought; without an answer after its thought; its thought twice.
    """
    thought = thought_fault(trace.text)
    if not trace.complete or thought == UNENDED:
        return "incomplete"
    return {UNANSWERED: "no answer after the thought", TWICE: "thought twice"}.get(thought)


class TokenCounter:
    """Lengths as training will count them. ``folder``: a tokenizer's."""

    def __init__(self, folder: str):
        """Raises UserError where nothing there can be loaded."""
        from megatron_dypo.data.backend import load_backend
        from megatron_dypo.data.ends import end_ids
        from megatron_dypo.data.tokenizer import Tokenizer

        try:
            backend = load_backend(Path(folder), _MOST_TOKENS)
        except Exception as error:  # whatever the tokenizer libraries raise on files that are not theirs
            reason = " ".join(str(error).split())
            raise UserError(f"--tokenizer {folder}: cannot be loaded: {type(error).__name__}: {reason}") from None
        if backend.eos_token_id is None:
            raise UserError(f"--tokenizer {folder}: has no end-of-sequence token")
        ends = end_ids(backend, [Path(folder)], _MOST_TOKENS)
        self._tokenizer = Tokenizer(backend, *ends, plain_chat=True, day=_DAY)

    def prompt(self, prompt: Prompt) -> int:
        """Tokens, those of the chat template included."""
        return len(self._tokenizer.encode_prompt(prompt))

    def without_ends(self, text: str) -> str:
        """A trace without the markers of ends that it ends with."""
        return self._tokenizer.without_ends(text)

    def end_inside(self, text: str) -> bool:
        """Whether a trace holds an end token before its end."""
        return self._tokenizer.end_inside(text) is not None

    def trace(self, text: str) -> int:
        """Tokens, the end token included."""
        return len(self._tokenizer.encode_trace(text))
