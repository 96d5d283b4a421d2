"""Which problems are also in an evaluation suite, by the words they share.

A single n-gram tells little: "where m and n are relatively prime positive integers find m n" stands in a third of all
AIME problems. So what counts is how much of a problem the shared n-grams cover (docs/data.md has the measurements).
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from megatron_dypo.errors import UserError
from megatron_dypo.prepare.sources import Source
from megatron_dypo.prepare.texts import problem_key, without_instruction, words

TEXT_COLUMNS = ("problem", "question", "prompt")  # in any case of letters; the first that a row has


@dataclass(frozen=True)
class Hit:
    """``problem``: of the evaluation suite, in ``where`` (file and row); ``share`` of the shorter of the two."""

    problem: str
    where: str
    share: float


class Evaluation:
    """Every problem of the evaluation sources, in memory (a few thousand).

    ``ngram``: words in a row that must be the same. ``share``: of the shorter problem's words, so much must be covered
    by shared n-grams. Problems of fewer words than ``ngram`` are compared whole.
    """

    def __init__(self, sources: list[Source], ngram: int, share: float, instruction: str):
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
