"""Simple values with words between them: ``12 R 3``, ``5 \text{ ft } 3 \text{ in}``, ``3 \text{ out of } 5``.

Math-verify takes such a text for a product, so that 12 R 3 and 3 R 12 are one: values go by their place here.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from megatron_dypo.reward.units import parse

_WORDS = re.compile(
    r"\\(?:text|textrm|mbox|mathrm)\s*\{([^{}]*)\}|(?<![A-Za-z\\_^])([A-Za-z]{2,}(?: [A-Za-z]{2,})*|R)(?![A-Za-z({])"
)
_SIMPLE = re.compile(r"[-+]?(?:\\?\$)?(?:[0-9][0-9,.]*(?:/[0-9]+)?|\\frac\{[0-9]+\}\{[0-9]+\}|[A-Za-z])")
_LEFT_OUT = re.compile(r"[\s~,]+|\band\b")


class Phrase(NamedTuple):
    """``values[i]`` stands before ``words[i]``; the first and the last may be empty."""

    values: list[str]
    words: list[str]

    def says_as(self, other: Phrase) -> bool:
        """Whether the words are the other's, as words or as units."""
        pairs = zip(self.words, other.words, strict=False)
        return len(self.words) == len(other.words) and all(one == two or _same_unit(one, two) for one, two in pairs)


def phrase(text: str) -> Phrase | None:
    """What all of ``text`` says; None where there are no words between two values, or more than simple values."""
    values, words, at = [], [], 0
    for match in _WORDS.finditer(text):
        values.append(text[at : match.start()].strip(" ~,"))
        said = " ".join(_LEFT_OUT.sub(" ", (match[1] or match[2] or "").lower()).split())
        words.append("remainder" if said == "r" else said)
        at = match.end()
    values.append(text[at:].strip(" ~,"))
    full = [value for value in values if value]
    inner = all(values[1:-1])
    return Phrase(values, words) if len(full) > 1 and inner and all(map(_SIMPLE.fullmatch, full)) else None


def _same_unit(one: str, other: str) -> bool:
    found = [parse(words) if words else None for words in (one, other)]
    return all(unit is not None and unit[2] for unit in found) and found[0][1] == found[1][1]
