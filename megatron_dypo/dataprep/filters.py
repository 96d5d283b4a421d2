"""Decide what to drop: problems and traces by their text, their length, and the words shared with an evaluation suite.

A single n-gram tells little: "where m and n are relatively prime positive integers find m n" appears in a third of all
AIME problems. What counts is how much of a problem the shared n-grams cover (docs/data.md has the measurements).
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import defaultdict
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from megatron_dypo.data.traces import TWICE, UNANSWERED, UNENDED, thought_fault
from megatron_dypo.dataprep.formats import Trace
from megatron_dypo.dataprep.sources import RowSource
from megatron_dypo.errors import UserError
from megatron_dypo.records import Prompt

# What LaTeX and Markdown add to a formula without changing it: delimiters, spacing, sizes.
_TYPESETTING = re.compile(r"\\(?:[()\[\]!,;: ]|left(?![a-z])|right(?![a-z])|quad|qquad|displaystyle)|\\?\$|~")
_FRACTIONS = re.compile(r"\\[dt]frac(?![a-z])")
_WORD = re.compile(r"[^\W_]+")


def normalised(text: str) -> str:
    """Return ``text`` without typesetting: Unicode forms, case, white space, LaTeX delimiters, the last full stop.

    Operators and digits stay: "2 + 3" and "2 - 3" are two problems.
    """
    text = _TYPESETTING.sub(" ", unicodedata.normalize("NFC", text))  # not NFKC, which turns 2² into 22
    return "".join(_FRACTIONS.sub(r"\\frac", text).casefold().split()).rstrip(".:")


def problem_key(text: str) -> str:
    """Return 32 hexadecimal digits, equal for problems with the same normalised text."""
    return digest(normalised(text))


def is_text(*texts: str) -> bool:
    """Return whether files and tokenizers accept the texts: JSON can escape half a surrogate pair."""
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        return False
    return True


def digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def words(text: str) -> list[str]:
    """Return the runs of letters and digits, in lower case: what remains of a problem in any typesetting."""
    return _WORD.findall(_TYPESETTING.sub(" ", unicodedata.normalize("NFKC", text)).casefold())


def without_instruction(text: str, instruction: str) -> str:
    """Return the problem without the ``instruction`` at its end."""
    text = text.strip()
    return text.removesuffix(instruction.strip()).rstrip() if instruction.strip() else text


_MOST_TOKENS = 1 << 22  # no vocabulary is larger
_DAY = date(2026, 1, 1)  # the day that templates reading the clock see: lengths are the same every day


def fault(trace: Trace) -> str | None:
    """Return why a trace is not worth imitating, whatever its answer, by the name of its count, or None.

    It is truncated (by the data set's mark, or within its thought), lacks an answer after its thought, or thinks twice.
    """
    thought = thought_fault(trace.text)
    if not trace.complete or thought == UNENDED:
        return "incomplete"
    reasons: dict[str | None, str] = {UNANSWERED: "no answer after the thought", TWICE: "thought twice"}
    return reasons.get(thought)


class TokenCounter:
    """Count tokens as training will, with the tokenizer in ``folder``."""

    def __init__(self, folder: str):
        """Load the tokenizer. Raises UserError if that fails."""
        from megatron_dypo.data.chat_template import end_ids
        from megatron_dypo.data.tokenizer import Tokenizer
        from megatron_dypo.data.tokenizer_backends import load_backend

        try:
            backend = load_backend(Path(folder), _MOST_TOKENS)
        except Exception as error:  # whatever the tokenizer libraries raise for foreign files
            reason = " ".join(str(error).split())
            raise UserError(f"--tokenizer {folder}: cannot be loaded: {type(error).__name__}: {reason}") from None
        if backend.eos_token_id is None:
            raise UserError(f"--tokenizer {folder}: has no end-of-sequence token")
        ends = end_ids(backend, [Path(folder)], _MOST_TOKENS)
        self._tokenizer = Tokenizer(backend, *ends, plain_chat=True, day=_DAY)

    def prompt(self, prompt: Prompt) -> int:
        """Return the tokens of a prompt, chat template included."""
        return len(self._tokenizer.encode_prompt(prompt))

    def without_ends(self, text: str) -> str:
        """Return a trace without the end markers at its end."""
        return self._tokenizer.without_ends(text)

    def end_inside(self, text: str) -> bool:
        """Return whether a trace contains an end token before its end."""
        return self._tokenizer.end_inside(text) is not None

    def trace(self, text: str) -> int:
        """Return the tokens of a trace, end token included."""
        return len(self._tokenizer.encode_trace(text))


TEXT_COLUMNS = ("problem", "question", "prompt")  # in any case; the first one present counts


@dataclass(frozen=True)
class Hit:
    """An overlap with ``problem``, found in ``where`` (file and row); ``share`` of the shorter of the two."""

    problem: str
    where: str
    share: float


class EvaluationProblems:
    """Every problem of the evaluation sources, in memory (a few thousand).

    ``ngram``: consecutive words that must be equal. ``share``: the share of the shorter problem's words that shared
    n-grams must cover. Problems of fewer than ``ngram`` words are compared whole.
    """

    def __init__(self, sources: list[RowSource], ngram: int, share: float, instruction: str):
        self._ngram, self._share = ngram, share
        self._problems: list[tuple[str, str, int]] = []  # text, where, words
        self._whole: dict[str, int] = {}
        self._places: defaultdict[tuple[str, ...], list[int]] = defaultdict(list)
        for source in sources:
            for number, row in source.rows():
                where = f"{source.name}:{number}"
                text = without_instruction(evaluation_text(row, where), instruction)
                self._add(text, where)

    def __len__(self) -> int:
        """Return the number of distinct problems."""
        return len(self._problems)

    def _add(self, text: str, where: str) -> None:
        index = self._whole.setdefault(problem_key(text), len(self._problems))
        if index < len(self._problems):
            return
        sequence = words(text)
        self._problems.append((text, where, len(sequence)))
        for gram in set(self._ngrams(sequence)):
            self._places[gram].append(index)

    def _ngrams(self, sequence: list[str]) -> list[tuple[str, ...]]:
        return [tuple(sequence[i : i + self._ngram]) for i in range(len(sequence) - self._ngram + 1)]

    def hit(self, text: str) -> Hit | None:
        """Return the evaluation problem that overlaps most with ``text``, if that is enough; else None."""
        if (index := self._whole.get(problem_key(text))) is not None:
            return Hit(*self._problems[index][:2], 1.0)
        sequence = words(text)
        covered: defaultdict[int, set[int]] = defaultdict(set)
        for start, gram in enumerate(self._ngrams(sequence)):
            for index in self._places.get(gram, ()):
                covered[index].update(range(start, start + self._ngram))
        best = None
        for index, places in sorted(covered.items()):
            problem, where, length = self._problems[index]
            share = min(1.0, len(places) / min(length, len(sequence)))
            if share >= self._share and (best is None or share > best.share):
                best = Hit(problem, where, share)
        return best


def evaluation_text(row: Any, where: str) -> str:
    """Return the problem in a row of any suite: a string, or the user's messages of a chat.

    Raises UserError if no column holds one.
    """
    columns = {name.casefold(): value for name, value in row.items()} if isinstance(row, dict) else {}
    for name in TEXT_COLUMNS:
        value = columns.get(name)
        if isinstance(value, list):
            value = "\n".join(
                str(message.get("content"))
                for message in value
                if isinstance(message, dict) and message["role"] == "user"
            )
        if isinstance(value, str) and value.strip():
            return value
    raise UserError(f"{where}: no evaluation problem here: none of the columns {', '.join(TEXT_COLUMNS)} holds text")
