r"""Compare an answer with a ground truth by text and exact fractions; math-verify decides the rest.

Most answers of a training run are numbers or copies of the ground truth, so these rules avoid nearly all trips to a
worker process (microseconds instead of milliseconds). They also reject what math-verify wrongly accepts: anagrams of a
word, two numbers side by side (it adds them), a pair for a set, another unit, another base.
"""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache

from megatron_dypo.reward.answer import last_boxed
from megatron_dypo.reward.exact import Ratio, exact, fraction, same
from megatron_dypo.reward.lists import agree, is_several, listing, phrase
from megatron_dypo.reward.normalize import canonical
from megatron_dypo.reward.numbers import Number, in_base, number
from megatron_dypo.reward.regions import is_condition, region
from megatron_dypo.reward.units import PERCENT, Quantity, quantity, same_unit

Verdict = bool | tuple
"""Whether they agree; or the question for math-verify: (answer, truth) or (answer, truth, ordered)."""

MAX_CHARACTERS = 4_000
"""Longer answers (or ground truths) never reach math-verify: only identical text earns a reward."""

_LOOSE = re.compile(r"(?<![0-9A-Za-z]) | (?![0-9A-Za-z])|(?<=[0-9]) (?=[A-Za-z])")
_SIDE_BY_SIDE = re.compile(r"(?<![_^0-9])[0-9]+ [0-9]")
_MEMBER = re.compile(r"\\in(?![a-zA-Z])")
_TO = re.compile(r"\s*:\s*|\s*(?:\\text\s*\{\s*to\s*\}|(?<![A-Za-z\\])to(?![A-Za-z]))\s*")
_NAME = r"[A-Za-z](?:_\{?[A-Za-z0-9]\}?|\([a-z0-9]{1,3}\))?"  # x, x_1, f(2)
_NAMED = re.compile(rf"(?:{_NAME}|\([a-z](?:, ?[a-z])+\))\s*(?:=|\\in(?![a-zA-Z]))\s*([^=]+)")
_CHAIN = re.compile(rf"{_NAME}\s*=[^<>]*")  # A = 3 \cdot 4 = 12
_COMPUTED = re.compile(r"([^A-Za-z=<>]*)=([^=<>]+)")  # 2 + 2 = 4
_WORDS = re.compile(r"(?:(?:an?|the) )?((?:[A-Za-z]{3,}|[Nn]o)(?:[ '-][A-Za-z]+)*)")
_VARIABLE = re.compile(r"\\[a-z]+\{[A-Za-z ]{2,}\}|\\[A-Za-z]+|([A-Za-z])")
_LETTERS = re.compile(r"[A-Za-z][A-Za-z '-]+")
_LETTER = re.compile(r"\(?([A-Za-z])\)?")
_COMMAND = re.compile(r"\\[A-Za-z]+")
_MARK = re.compile(
    r"((?<![A-Za-z][A-Za-z])[A-Za-z]'+|(?<=[A-Za-z])[A-Za-z]'+(?![A-Za-z])|[^A-Za-z\s']'+)"
    r"|\^\s*(?:T|\{\s*T\s*\}|\{?\s*\\(?:top|intercal|dagger)(?![A-Za-z]))"
)
_CLOSE, _UNLIKE = 1e-6, 1e-4  # math-verify rounds to six decimals, whatever the size of the numbers


@lru_cache(maxsize=65_536)
def bare_truth(ground_truth: str) -> str:
    r"""Return the canonical ground truth without its ``\boxed{...}`` or ``$...$``."""
    boxed = last_boxed(ground_truth)
    return canonical(ground_truth if boxed is None else boxed)


def compare(answer: str, truth: str, ordered: bool | None = None) -> Verdict:
    """Compare two canonical texts. ``ordered``: whether a bare list is ordered, None if unknown.

    In order: identical text agrees, empty or overlong text only with itself; numbers by value; a name before an equals
    sign on one side is ignored; regions as intervals, lists element by element; units must not contradict each other;
    then arithmetic by value, numbers with a base, words and phrases up to case, letters of options; a set is not a
    tuple, and two numbers side by side are not a number.
    """
    if answer == truth:
        return answer != ""
    if not answer or not truth or max(len(answer), len(truth)) > MAX_CHARACTERS:
        return False
    x, y = number(answer), _number_of_truth(truth)
    if x and y and (verdict := _equal(x, y)) is not None:
        return verdict
    if _LOOSE.sub("", answer) == _LOOSE.sub("", truth):
        return True
    answer, truth = _without_name(answer, truth), _without_name(truth, answer)
    if is_condition(answer) or is_condition(truth):
        one, other = region(answer), region(truth)
        if one and other:
            return one.may_equal(other) and (one.intervals == other.intervals or (one.intervals, other.intervals))
    if is_several(answer) or is_several(truth):
        verdict = agree(answer, truth, ordered, _decided)
        if verdict is not None:
            return verdict
        if listing(answer) and listing(truth):
            return (answer, truth) if ordered is None else (answer, truth, ordered)
    if (verdict := _ratios(answer, truth)) is not None:
        return verdict
    if (said := phrase(answer)) and (asked := phrase(truth)):
        values = zip(said.values, asked.values, strict=False)
        return said.says_as(asked) and all(one == other or compare(one, other) is True for one, other in values)
    return _quantities(answer, truth)


def _ratios(answer: str, truth: str) -> Verdict | None:
    """Compare ratios: ``2:4:6`` equals ``1:2:3`` and ``1 to 2 to 3``; None if either is not a ratio of numbers."""
    if not (_TO.search(answer) and _TO.search(truth)):
        return None
    some, others = ([_ratio(part, number(part)) for part in _TO.split(text)] for text in (answer, truth))
    if None in some or None in others:
        return None
    values, asked = ([Fraction(part.top, part.bottom) for part in side] for side in (some, others))
    if len(values) != len(asked) or 0 in asked:
        return values == asked
    return all(value * asked[0] == other * values[0] != 0 for value, other in zip(values, asked, strict=True))


def _decided(answer: str, truth: str) -> bool | None:
    verdict = compare(answer, truth)
    return verdict if isinstance(verdict, bool) else None


def _quantities(answer: str, truth: str) -> Verdict:
    given, asked = quantity(answer), _quantity_of_truth(truth)
    given, asked = _settled(given, asked, answer, not _variables(truth)), _settled(asked, given, truth, False)
    if PERCENT in (given.unit, asked.unit) and given.unit != asked.unit:
        return _one_percentage(given, asked)
    if not same_unit(given, asked):
        return False
    if given.bare == asked.bare:
        return True
    return _without_unit(given.bare, asked.bare)


def _settled(side: Quantity, other: Quantity, whole: str, beside_a_value: bool) -> Quantity:
    """Return ``side``, or all of ``whole`` as ``bare`` if its letters are not a unit given ``other``.

    See ``Quantity.kind``.
    """
    if side.kind in ("", "firm") or other.kind == "firm" or (other.kind and "loose" in (side.kind, other.kind)):
        return side
    return side if side.kind == "loose" and not other.kind and beside_a_value else Quantity(whole)


def _without_unit(answer: str, truth: str) -> Verdict:
    x, y = number(answer), _number_of_truth(truth)
    if x and y:
        verdict = _equal(x, y)
        return (answer, truth) if verdict is None else verdict
    if (one := _ratio(answer, x)) and (other := _ratio_of_truth(truth)):
        verdict = _equal_ratios(one, other)
        return (answer, truth) if verdict is None else verdict
    if in_base(truth) or in_base(answer):
        return _equal_in_base(answer, truth)
    words, true_words = _WORDS.fullmatch(answer), _WORDS.fullmatch(truth)
    if (words or true_words) and _LETTERS.fullmatch(answer) and _LETTERS.fullmatch(truth):
        return words is not None and true_words is not None and words[1].casefold() == true_words[1].casefold()
    if (words and y) or (true_words and x):
        return False
    letter, true_letter = _LETTER.fullmatch(answer), _LETTER.fullmatch(truth)
    if letter and true_letter:
        return letter[1] == true_letter[1]
    if ("=" in answer) != ("=" in truth):
        return _equation_and_value(answer, truth)
    if {_brackets(answer), _brackets(truth)} == {"{}", "()"} or _SIDE_BY_SIDE.search(answer):
        return False
    if r"\ldots" in answer + truth or _differ_in_case(answer, truth) or _marks(answer) != _marks(truth):
        return False
    return answer, truth


_quantity_of_truth = lru_cache(maxsize=65_536)(quantity)
_number_of_truth = lru_cache(maxsize=65_536)(number)


def _without_name(text: str, other: str) -> str:
    r"""Strip a name that the other text lacks: ``5`` for ``x = 5``, ``[1,2]`` for ``x \in [1,2]``."""
    named = None if "=" in other or _MEMBER.search(other) else _NAMED.fullmatch(text)
    return named[1].strip() if named else text


def _ratio(text: str, value: Number | None) -> Ratio | None:
    return Ratio(*value.value.as_integer_ratio(), value.rounded) if value else exact(text)


@lru_cache(maxsize=65_536)
def _ratio_of_truth(text: str) -> Ratio | None:
    return _ratio(text, number(text))


def _equal_ratios(answer: Ratio, truth: Ratio) -> bool | None:
    if same(answer, truth) or not (answer.rounded or truth.rounded):
        return same(answer, truth)
    x, y = fraction(answer), fraction(truth)
    return None if x is None or y is None else _equal(Number(x, answer.rounded), Number(y, truth.rounded))


def _equal(answer: Number, truth: Number) -> bool | None:
    """Compare by value; None if a rounded number is close, also relative to its size: math-verify decides."""
    if answer.value == truth.value:
        return True
    apart = abs(answer.value - truth.value)
    if (answer.rounded or truth.rounded) and apart <= _CLOSE and apart <= _UNLIKE * abs(truth.value):
        return None
    return False


def _one_percentage(answer: Quantity, truth: Quantity) -> Verdict:
    """Compare a percentage with a value that is not marked as one.

    50% is 0.5. It is also 50 if a percentage was asked for; assumed above 1, where it cannot be a share.
    """
    if answer.unit and truth.unit:
        return False
    x, y = number(answer.bare), number(truth.bare)
    verdict = None
    if x and y:
        if x.value == y.value > 1:
            return True
        sides = ((x, answer.unit), (y, truth.unit))
        verdict = _equal(*(Number(side.value / 100, True) if unit else side for side, unit in sides))
    if verdict is not None:
        return verdict
    return answer.bare + bool(answer.unit) * r"\%", truth.bare + bool(truth.unit) * r"\%"


def _equation_and_value(answer: str, truth: str) -> Verdict:
    """Compare an equation with a value; math-verify would take any equation for its right-hand side.

    That is allowed only for a list of named values, a chain of names, and a computation in the answer.
    """
    if "=" in truth:
        return (answer, truth) if "," in truth else False
    computed = _COMPUTED.fullmatch(answer)
    if computed and not number(computed[1].strip()):
        left, right = (_ratio(side.strip(), number(side.strip())) for side in computed.groups())
        if left and right and not right.rounded and not same(left, right):  # 4 + 2 = 5
            return False
        return compare(computed[2].strip(), truth)
    return (answer, truth) if "," in answer or _CHAIN.fullmatch(answer) else False


def _equal_in_base(answer: str, truth: str) -> bool:
    """Compare numbers with a base by value; bare digits match a truth with a base, because the problem asked for it."""
    given, asked, plain_truth = in_base(answer), in_base(truth), number(truth)
    if given and asked:
        return given[1] == asked[1]
    if given:
        return plain_truth is not None and given[1] == plain_truth.value
    return answer.isdigit() and asked is not None and (answer.lstrip("0") or "0") == asked[0]


def _variables(text: str) -> set[str]:
    return {letter for letter in _VARIABLE.findall(text) if letter}


def _marks(text: str) -> set[str]:
    """Return marks that math-verify drops: derivatives (``f'``), minutes (``15'``) and transposes."""
    return {prime or "T" for prime in _MARK.findall(text)}


def _differ_in_case(answer: str, truth: str) -> bool:
    r"""Return whether one has ``\gamma`` and the other ``\Gamma``, which math-verify does not distinguish."""
    some, others = set(_COMMAND.findall(answer)), set(_COMMAND.findall(truth))
    return some != others and {name.lower() for name in some} == {name.lower() for name in others}


def _brackets(text: str) -> str:
    """Return ``{}`` or ``()`` if such brackets enclose a whole list, else ""."""
    bare = text.replace(r"\{", "{").replace(r"\}", "}") if text.startswith(r"\{") else text
    if bare[0] not in "{([" or "," not in bare:
        return ""
    depth = 0
    for index, character in enumerate(bare):
        depth += (character in "{([") - (character in "})]")
        if depth == 0:
            return "" if index < len(bare) - 1 else "{}" if bare[0] == "{" else "()"
    return ""
