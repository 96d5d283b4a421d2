r"""The unit that an answer ends in (or the currency it begins with), apart from what is measured.

A unit is ``\text{...}`` (or a relative) at the end, a degree or percent sign, a name from a short table, or any nouns
after a number (``5 apples``). Words that change a number's value (million, dozen) or are mathematics are none.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from megatron_dypo.reward.numbers import number

PERCENT = "percent"

_SYNONYMS = {
    "in": "inch", "inches": "inch", "ft": "foot", "feet": "foot", "yd": "yard", "mi": "mile",
    "m": "meter", "metre": "meter", "cm": "centimeter", "centimetre": "centimeter", "mm": "millimeter",
    "km": "kilometer", "kilometre": "kilometer", "sec": "second", "s": "second", "min": "minute", "hr": "hour",
    "h": "hour", "g": "gram", "kg": "kilogram", "mg": "milligram", "lb": "pound", "lbs": "pound", "oz": "ounce",
    "l": "liter", "litre": "liter", "ml": "milliliter", "sq": "square", "cu": "cubic", "deg": "degree",
    "mph": "mile per hour", "kmh": "kilometer per hour", "usd": "dollar", "pct": PERCENT, "percentage": PERCENT,
}  # fmt: skip
_NAMES = {*_SYNONYMS.values()} | {
    *("day", "week", "month", "year", "cent", "euro", "radian", "unit", "gallon", "acre", "newton", "joule", "watt")
}
_NO_UNIT = {
    *("hundred", "thousand", "million", "billion", "trillion", "dozen", "dozens", "half", "third", "quarter", "times"),
    *("squared", "cubed", "or", "and", "not", "no", "to", "base", "mod", "modulo", "factorial", "more", "less", "than"),
    *("pi", "sqrt", "root", "over", "plus", "minus", "if", "for", "where", "when", "hundredth", "tenth", "thousandth"),
    *(
        "sin",
        "cos",
        "tan",
        "log",
        "infinity",
        "is",
        "wrong",
        "hundreds",
        "thousands",
        "millions",
        "billions",
        "score",
        "gross",
    ),
}
_SHORT = {"m", "g", "s", "h", "l"}  # letters that are units within \text{}; elsewhere they are variables

_WRAPPER = r"\\(?:text|textrm|textbf|textit|textnormal|mbox|mathrm|rm)\s*"
_POWER = r"\s*(?:\^\s*\{?\s*([23])\s*\}?)?"
_WRAPPED = re.compile(rf"(?<![_^\\{{])\s*{_WRAPPER}\{{([^{{}}]*)\}}{_POWER}$")
_PLAIN_WORDS = re.compile(rf"(?<=[0-9}})\s])\s*(?<![A-Za-z\\])([A-Za-z]+(?:[ /][A-Za-z]+)*){_POWER}$")
_DEGREES = re.compile(rf"\s*(?:\^\s*\{{?\s*\\circ\s*\}}?|\\degree|\\deg)\s*(?:{_WRAPPER}\{{\s*([CF])\s*\}}|([CF]))?$")
_PERCENT = re.compile(r"\s*\\?%$")
_CURRENCY = re.compile(rf"([-+]?)\s*(?:\\?(\$)|(€)|(£)|{_WRAPPER}\{{\s*Rs\s*\.?\s*\}})\s*(?=[-+0-9.\\])")
_CURRENCIES = {"$": "dollar", "€": "euro", "£": "pound sterling"}
_LONGEST = 100  # characters of a unit; what follows is quadratic in them at worst
_POWERS = {"2": "square ", "3": "cubic "}


class Quantity(NamedTuple):
    """``bare`` is the text without its unit; ``unit`` in one spelling (``square centimeter``), empty without one."""

    bare: str
    unit: str = ""


def quantity(text: str) -> Quantity:
    """What is measured, and in what; of a text that is a unit alone, all is ``bare``."""
    if (match := _CURRENCY.match(text)) and text[match.end() :]:
        sign = next((sign for sign in match.groups()[1:] if sign), "")
        inner = quantity(match[1] + text[match.end() :])
        return Quantity(inner.bare, inner.unit or _CURRENCIES.get(sign, "rupee"))
    tail = max(0, len(text) - _LONGEST)
    if match := _PERCENT.search(text, tail):
        return _cut(text, match, PERCENT)
    if match := _DEGREES.search(text, tail):
        scale = match[1] or match[2]
        return _cut(text, match, f"degree {scale}" if scale else "degree")
    if match := _WRAPPED.search(text, tail):
        words = _words(match[1])
        if words and _NO_UNIT.isdisjoint(words) and (len(match[1].strip()) > 1 or words[0] in _SHORT):
            return _cut(text, match, _unit(words, match[2]))
    elif match := _PLAIN_WORDS.search(text, tail):
        words, bare = _words(match[1]), text[: match.start()].strip()
        clear = "per" in words or all(len(word) > 1 for word in words)  # a letter alone is a variable
        known = clear and all(word == "per" or _singular(word) in _NAMES for word in words)
        nouns = all(len(word) > 3 for word in words[:1]) and number(bare) and _NO_UNIT.isdisjoint(words)
        if words and (known or nouns):
            return _cut(text, match, _unit(words, match[2]))
    return Quantity(text)


def same_unit(one: str, other: str) -> bool:
    """Whether two units do not contradict each other: one is missing, or they begin alike (cent, cent per pound)."""
    return not one or not other or one == other or one.startswith(other + " ") or other.startswith(one + " ")


def _cut(text: str, match: re.Match, unit: str) -> Quantity:
    bare = text[: match.start()].strip()
    return Quantity(bare, unit) if bare else Quantity(text)


def _words(text: str) -> list[str]:
    words = text.replace(".", " ").replace("/", " per ").replace("-", " ").lower().split()
    return words if all(word.isascii() and word.isalpha() for word in words) else []


def _unit(words: list[str], power: str | None) -> str:
    return _POWERS.get(power or "", "") + " ".join(map(_singular, words))


def _singular(word: str) -> str:
    for form in (word, word.removesuffix("s"), word.removesuffix("es")):
        if form in _SYNONYMS:
            return _SYNONYMS[form]
        if form in _NAMES:
            return form
    return word.removesuffix("s") if len(word) > 3 else word
