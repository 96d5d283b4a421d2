"""What keeps a problem or a trace out: its text, its length, and the words it shares with an evaluation suite.

A single n-gram tells little: "where m and n are relatively prime positive integers find m n" stands in a third of all
AIME problems. So what counts is how much of a problem the shared n-grams cover (docs/data.md has the measurements).
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
    """``text`` without what typesetting varies: Unicode forms, case, white space, LaTeX delimiters, the last full stop.

    Operators and digits stay: "2 + 3" and "2 - 3" are two problems.
    """
    text = _TYPESETTING.sub(" ", unicodedata.normalize("NFC", text))  # not NFKC, to which 2² is 22
    return "".join(_FRACTIONS.sub(r"\\frac", text).casefold().split()).rstrip(".:")


def problem_key(text: str) -> str:
    """Equal for problems with the same normalised text: 32 hexadecimal digits."""
    return digest(normalised(text))


def is_text(*texts: str) -> bool:
    """Whether files and tokenizers take them: JSON can escape halves of surrogate pairs one by one."""
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        return False
    return True


def digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def words(text: str) -> list[str]:
    """Runs of letters and digits, in lower case: what is left of a problem, however it is typeset."""
    return _WORD.findall(_TYPESETTING.sub(" ", unicodedata.normalize("NFKC", text)).casefold())


def without_instruction(text: str, instruction: str) -> str:
    """The problem alone, where ``instruction`` stands at its end."""
    text = text.strip()
    return text.removesuffix(instruction.strip()).rstrip() if instruction.strip() else text


_MOST_TOKENS = 1 << 22  # no vocabulary is larger
_DAY = date(2026, 1, 1)  # what templates that read the clock are given: lengths are the same on every day


def fault(trace: Trace) -> str | None:
    """Why a trace is not an example to learn from, whatever its answer, by the name of its count, or None.

    Cut off, by the data set's own mark or within its thought; without an answer after its thought; its thought twice.
    """
    thought = thought_fault(trace.text)
    if not trace.complete or thought == UNENDED:
        return "incomplete"
    reasons: dict[str | None, str] = {UNANSWERED: "no answer after the thought", TWICE: "thought twice"}
    return reasons.get(thought)


class TokenCounter:
    """Lengths as training will count them. ``folder``: a tokenizer's."""

    def __init__(self, folder: str):
        """Raises UserError where nothing there can be loaded."""
        from megatron_dypo.data.chat_template import end_ids
        from megatron_dypo.data.tokenizer import Tokenizer
        from megatron_dypo.data.tokenizer_backends import load_backend

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


TEXT_COLUMNS = ("problem", "question", "prompt")  # in any case of letters; the first that a row has


@dataclass(frozen=True)
class Hit:
    """``problem``: of the evaluation suite, in ``where`` (file and row); ``share`` of the shorter of the two."""

    problem: str
    where: str
    share: float


class EvaluationProblems:
    """Every problem of the evaluation sources, in memory (a few thousand).

    ``ngram``: words in a row that must be the same. ``share``: of the shorter problem's words, so much must be covered
    by shared n-grams. Problems of fewer words than ``ngram`` are compared whole.
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
        """Different problems."""
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
        """The evaluation problem that ``text`` has most in common with, if that is enough."""
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
    """A problem as it stands in a row of any suite: a string, or the user's messages of a chat.

    Raises UserError where no column holds one.
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
