"""Compare answers of several parts: ``1, -2``, ``(1,2)``, ``\\{1,2\\}``, ``1\\pm\\sqrt{5}``.

    (a, b), [a, b]    in order
    \\{a, b\\}          as sets
    a, b              in order if ``ordered`` is True, or if an element occurs twice and ``ordered`` is not
                      False; else in any order, with each element equally often
    x=1, y=2          by name; against values without names, in order
    12 R 3, 3 ft 5 in by position: math-verify reads a phrase as a product, so 12 R 3 would equal 3 R 12

``ordered`` comes from the question (``order_matters``): None without one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

from megatron_dypo.reward.numbers import may_be_several
from megatron_dypo.reward.units import parse

_WORDS = re.compile(
    r"\\(?:text|textrm|mbox|mathrm)\s*\{([^{}]*)\}|(?<![A-Za-z\\_^])([A-Za-z]{2,}(?: [A-Za-z]{2,})*|R)(?![A-Za-z({])"
)
_SIMPLE = re.compile(r"[-+]?(?:\\?\$)?(?:[0-9][0-9,.]*(?:/[0-9]+)?|\\frac\{[0-9]+\}\{[0-9]+\}|[A-Za-z])")
_LEFT_OUT = re.compile(r"[\s~,]+|\band\b")


class Phrase(NamedTuple):
    """Values and the words after them: ``values[i]`` precedes ``words[i]``; the first and last value may be empty."""

    values: list[str]
    words: list[str]

    def says_as(self, other: Phrase) -> bool:
        """Return whether the words equal the other's, as words or as units."""
        pairs = zip(self.words, other.words, strict=False)
        return len(self.words) == len(other.words) and all(one == two or _same_unit(one, two) for one, two in pairs)


def phrase(text: str) -> Phrase | None:
    """Parse all of ``text``; None without words between two values, or if the values are not simple."""
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


Decide = Callable[[str, str], "bool | None"]
"""Whether an element of the answer equals one of the truth; None if that cannot be decided here."""

OR_WORD, AND_WORD = (
    rf"\\(?:text|mathrm|mbox|textrm|textbf)\s*\{{[\s,;]*{word}[\s,;]*\}}|(?<![A-Za-z\\]){word}(?![A-Za-z])"
    for word in ("or", "and")
)
_TOKEN = re.compile(
    r"((?<![0-9,.])[1-9][0-9]{0,2}(?:,[0-9]{3})+(?!,?[0-9]))"  # one number
    rf"|({OR_WORD}|{AND_WORD}|\\(?:lor|vee)(?![A-Za-z])|[,;])|(\\begin\s*\{{|\\?[({{\[])|(\\end\s*\{{|\\?[)}}\]])|\\."
)
_NAMED = re.compile(r"((?:[A-Za-z]|\\[a-z]+)(?:_(?:[A-Za-z0-9]|\{[A-Za-z0-9]+\}))?)\s*=\s*([^=<>]+)")
_PLUS_MINUS = re.compile(r"\\pm(?![A-Za-z])\s*")
_BRACKETS = {"(": ")", "[": "]", r"\{": r"\}", "{": "}"}
_SEVERAL = re.compile(rf"[,;]|\\\{{|\\pm|\\lor|\\vee|{OR_WORD}|{AND_WORD}")
_LONGEST = 64  # elements matched in any order, at most; the cost is quadratic


class Listing(NamedTuple):
    """A list: the brackets around it (``()``, ``[]``, ``{}`` or none), its elements, no names or one per element."""

    kind: str
    elements: list[str]
    names: list[str]


def listing(text: str) -> Listing | None:
    """Return the list that all of ``text`` is; None if it is a single thing."""
    for opening, closing in _BRACKETS.items():
        if text.startswith(opening) and text.endswith(closing):
            parts = _parts(text)
            if len(parts) > 1:
                break
            inner = text[len(opening) : -len(closing)]
            if not _is_one_group(text, opening):
                return None
            elements = inner.split(",") if opening != "{" and may_be_several(inner) else _parts(inner)
            kind = (opening + closing).replace("\\", "")
            is_list = len(elements) > 1 or (opening == r"\{" and bool(elements))
            return Listing(kind, _without_plus_minus(elements), []) if is_list else None
    parts = _parts(text)
    elements = _without_plus_minus(parts)
    return _named(elements) if len(elements) > 1 else None


def is_several(text: str) -> bool:
    """Return quickly whether ``text`` may be a list."""
    return _SEVERAL.search(text) is not None


def agree(answer: str, truth: str, ordered: bool | None, decide: Decide) -> bool | None:
    """Return whether two texts, one of them a list, agree; None if neither is one, or it cannot be decided here."""
    given, asked = listing(answer), listing(truth)
    if given is None and asked is None:
        return None
    if given is None or asked is None:
        listed, alone = (given or asked), (answer if given is None else truth)
        if listed.kind == "{}" and len(listed.elements) == 1:
            return decide(*((alone, listed.elements[0]) if given is None else (listed.elements[0], alone)))
        return False if not listed.kind and _is_single(alone) else None
    kinds = {given.kind, asked.kind}
    if "{}" in kinds:
        return False if kinds & {"()", "[]"} else _as_sets(given, asked, decide)
    if "[]" in kinds and len(kinds) > 1:
        return None
    if given.names and asked.names:
        return _by_name(given, asked, ordered, decide)
    if len(given.elements) != len(asked.elements):
        return False
    given, asked = (_by_axis(side) if bool(given.names) != bool(asked.names) else side for side in (given, asked))
    if ordered is None:
        ordered = len(set(asked.elements)) < len(asked.elements)
    if "()" in kinds or "[]" in kinds or len({*given.names}) > 1 or len({*asked.names}) > 1 or ordered:
        return _all([decide(one, other) for one, other in zip(given.elements, asked.elements, strict=True)])
    return _in_any_order(given.elements, asked.elements, decide)


def _is_single(text: str) -> bool:
    """Return whether nothing in ``text`` could stand for several values, or a region."""
    return not re.search(r"\\(?:pm|mp|cup|cap|in|le|ge|ne|mid|begin|text|mathbb)(?![A-Za-z])|[<>,|:=]", text)


def _by_name(given: Listing, asked: Listing, ordered: bool | None, decide: Decide) -> bool | None:
    if set(given.names) != set(asked.names) or len(given.names) != len(asked.names):
        return False
    if len(set(asked.names)) == len(asked.names):
        values = dict(zip(given.names, given.elements, strict=True))
        return _all([decide(values[name], value) for name, value in zip(asked.names, asked.elements, strict=True)])
    if len(set(asked.names)) > 1:
        return None
    return agree(", ".join(given.elements), ", ".join(asked.elements), ordered, decide)


def _by_axis(side: Listing) -> Listing:
    """Reorder ``y=2, x=1`` as ``x=1, y=2``: coordinates have an order of their own."""
    if not side.names or len(set(side.names)) < len(side.names) or not set(side.names) <= {"x", "y", "z"}:
        return side
    names, elements = zip(*sorted(zip(side.names, side.elements, strict=True)), strict=True)
    return Listing(side.kind, list(elements), list(names))


def _as_sets(given: Listing, asked: Listing, decide: Decide) -> bool | None:
    some, others = list(dict.fromkeys(given.elements)), list(dict.fromkeys(asked.elements))
    if max(len(some), len(others)) > _LONGEST:
        return None
    table = [[decide(one, other) for other in others] for one in some]
    return _all([_any(row) for row in table] + [_any(column) for column in zip(*table, strict=True)])


def _in_any_order(given: list[str], asked: list[str], decide: Decide) -> bool | None:
    if given == asked:
        return True
    if len(asked) > _LONGEST:
        return None
    left, unknown = list(given), False
    for value in asked:
        verdicts = [decide(one, value) for one in left]
        found = _any(verdicts)
        if found is False:
            return False
        unknown |= found is None
        del left[verdicts.index(found)]
    return None if unknown else True


def _all(verdicts: Sequence[bool | None]) -> bool | None:
    return False if False in verdicts else None if None in verdicts else True


def _any(verdicts: Sequence[bool | None]) -> bool | None:
    return True if True in verdicts else None if None in verdicts else False


def _named(elements: list[str]) -> Listing:
    """Strip a name before each element, or one before the first that applies to all."""
    found = [_NAMED.fullmatch(element) for element in elements]
    if found[0] and not any("=" in element for element in elements[1:]):
        return Listing("", [found[0][2].strip(), *elements[1:]], [found[0][1]] * len(elements))
    if all(found):
        return Listing("", [match[2].strip() for match in found], [match[1] for match in found])
    return Listing("", elements, [])


def _without_plus_minus(elements: list[str]) -> list[str]:
    signed: list[str] = []
    for element in elements:
        if len(_PLUS_MINUS.findall(element)) == 1 and r"\mp" not in element:
            before, after = _PLUS_MINUS.split(element)
            plus = "+" if before.strip() and not before.rstrip().endswith(("=", "(", "{")) else ""
            signed += [f"{before}{plus}{after}", f"{before}-{after}"]
        else:
            signed.append(element)
    return signed


@lru_cache(maxsize=4_096)
def _cuts(text: str) -> tuple[tuple[int, int], ...]:
    """Return the spans of the separators outside all brackets."""
    depth, cuts = 0, []
    for token in _TOKEN.finditer(text):
        if token[3]:
            depth += 1
        elif token[4]:
            depth -= 1
        elif token[2] and depth == 0:
            cuts.append(token.span())
    return tuple(cuts)


def _parts(text: str) -> list[str]:
    parts, at = [], 0
    for start, end in (*_cuts(text), (len(text), len(text))):
        parts.append(text[at:start].strip())
        at = end
    return [part for part in parts if part]


def _is_one_group(text: str, opening: str) -> bool:
    """Return whether the bracket that opens ``text`` closes at its end."""
    depth = 0
    for token in _TOKEN.finditer(text):
        depth += bool(token[3]) - bool(token[4])
        if depth == 0:
            return token.end() == len(text)
    return False


# --- the question

_NAME = r"\\?\$?\\?[A-Za-z](?:_\{?[A-Za-z0-9]\}?)?\$?"
_ONE_OF_TWO = (
    "maximum|minimum|largest|smallest|greatest|least|highest|lowest|sum|mean|median|quotient|slope|length|area"
    "|perimeter|cent(?:er|re)|amplitude|numerator|denominator|degree"
)
_ANY_ORDER = re.compile(r"\b(?:in any order|order (?:does|do) not matter|regardless of order)", re.IGNORECASE)
_IN_ORDER = re.compile(
    r"\brespectively\b|\bin (?:the )?(?:\w+ )?order\b(?! to)|\bin (?:the )?order of\b|\balphabetical"
    r"|\b(?:from|in) (?:the )?(?:least|smallest|largest|greatest|lowest|highest|shortest|longest) to\b"
    rf"|\b(?:find|compute|determine|solve for|values? of|what (?:is|are)) {_NAME}(?:\s*,\s*{_NAME})*"
    rf"\s*,?\s*(?:,|and)\s*{_NAME}(?![A-Za-z])"
    r"|\b(?:find|compute|determine|evaluate|calculate|values? of|what (?:is|are)) \$[^$]+\$"
    r"(?:,\s*\$[^$]+\$)*,?\s*and\s*\$"
    r"|\b(?:find|compute|determine|calculate|give|state|what (?:is|are)) (?:the|its) [A-Za-z -]{2,40} and the (?!other)"
    rf"|\b(?:{_ONE_OF_TWO}) and (?:the )?(?:{_ONE_OF_TWO}|product|remainder|variance|median|width|volume|period)\b",
    re.IGNORECASE,
)
_A_SET = re.compile(
    r"(?<!for )\ball\b|\b(?:possible|solutions?|solve|roots?|zeroe?s|sets?|which of|factors?|divisors?|eigenvalues?"
    r"|intercepts?|elements|critical points|asymptotes)\b",
    re.IGNORECASE,
)


@lru_cache(maxsize=4_096)
def order_matters(question: str) -> bool | None:
    """Return whether a list answering ``question`` is ordered: unless it asks for a set (all roots); None for ""."""
    if not question.strip():
        return None
    if _ANY_ORDER.search(question):
        return False
    return _IN_ORDER.search(question) is not None or _A_SET.search(question) is None
