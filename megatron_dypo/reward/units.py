r"""Split an answer into its value and the unit that it ends with (or the currency that it begins with).

    suffix   \text{ cm}, \mathrm{~kg} \cdot \mathrm{m} / \mathrm{s}^{2}, \frac{\mathrm{m}}{\mathrm{s}}, \Omega, ^\circ
    unit     factor ([\cdot * or a space] factor)* [/ or per unit]     everything after a slash is the denominator
    factor   [square | cubic] name [^ power | squared | cubed], or ( unit )

Words that are not in the table of units are counted things (``5 apples``); words that change a number's value
(million, dozen) or are mathematics are not units. Letters in italics may be variables: see ``Quantity.kind``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

from megatron_dypo.reward.numbers import number
from megatron_dypo.reward.unit_names import ONE, Unit, counted, lookup, singular

_NO_UNIT = {
    "hundred", "thousand", "million", "billion", "trillion", "hundreds", "thousands", "millions",
    "billions", "dozen", "dozens", "half", "third", "quarter", "times", "squared", "cubed", "or", "and",
    "not", "no", "to", "base", "mod", "modulo", "factorial", "more", "less", "than", "pi", "sqrt", "root",
    "over", "plus", "minus", "if", "for", "where", "when", "hundredth", "tenth", "thousandth", "sin",
    "cos", "tan", "log", "ln", "exp", "infinity", "is", "wrong", "score", "gross", "with", "which",
    "that", "are", "approximately", "about", "nearly", "roughly", "e", "i", "x", "y", "z", "halve", "halves",
    "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "twelfth", "sixteenth", "millionth", "billionth",
    "trillionth", "lakh", "crore", "grand", "double", "triple", "inverse", "reciprocal", "negative", "false",
    "incorrect", "never", "except", "excluded",
}  # fmt: skip
_FIRM_PLAIN = {
    "in", "inch", "inches", "ft", "feet", "yd", "mi", "cm", "mm", "km", "sec", "min", "hr", "kg",
    "lb", "lbs", "oz", "ml", "mL", "deg", "mph", "kmh", "usd", "pct", "sq", "cu", "hrs", "mins", "secs",
    "kmph", "kHz", "MHz", "GHz", "Hz", "kPa", "kJ", "kW", "kV", "kN", "eV", "keV", "MeV", "GeV", "mol",
    "kWh",
}  # fmt: skip
"""Symbols that are units even in italics and without a space before them."""

_UPRIGHT = r"\\(?:text|textrm|textbf|textit|textnormal|mbox|mathrm|rm|operatorname|unit|si)\s*"
_GROUP = r"\{((?:[^{}]|\{[^{}]*\})*)\}"
_TOKEN = re.compile(
    rf"(?P<fraction>\\frac\s*\{{\s*({_UPRIGHT}{_GROUP}(?:\s*\^\s*\{{?-?[0-9]\}}?)?)\s*\}}"
    rf"\s*\{{\s*((?:{_UPRIGHT}\{{(?:[^{{}}]|\{{[^{{}}]*\}})*\}}|[\s^0-9{{}}]|\\cdot)*)\}})"
    rf"|(?P<upright>{_UPRIGHT}{_GROUP})"
    r"|(?P<sign>\\(?:Omega|ohm|AA|mu|micro)(?![A-Za-z]))"
    r"|(?P<plain>(?<![A-Za-z\\])[A-Za-z]+(?![A-Za-z]))"
    r"|(?P<power>\s*\^\s*(?:\{\s*[-+]?[0-9]+(?:/[0-9]+)?\s*\}|-?[0-9]))"
    r"|(?P<operator>\s*(?:/|\\cdot(?![A-Za-z])|\\times(?![A-Za-z])|\*)\s*|\s+)"
)
_OTHER = re.compile(r"\\[A-Za-z]+|\\.|.", re.DOTALL)
_VALUE = re.compile(r"(?:[-+0-9.,\s/*^{}]|\\frac\s*\{[-+0-9.,\s]+\}\s*\{[0-9.,\s]+\}|\\(?:times|cdot)(?![A-Za-z]))+")
_MICRO = re.compile(r"µ\s+")
_DEGREES = re.compile(
    rf"\s*(?:\^\s*\{{?\s*\\circ\s*\}}?|\\degree|\\deg)\s*(?:{_UPRIGHT}\{{\s*([CF])\s*\}}|\{{\s*([CF])\s*\}}|([CF]))?$"
)
_OF_AN_ANGLE = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])(?!\s*\^\s*\{\s*-)")
_PERCENT = re.compile(r"\s*\\?%$")
_CURRENCY = re.compile(rf"([-+]?)\s*(?:\\?(\$)|(€)|(£)|{_UPRIGHT}\{{\s*Rs\s*\.?\s*\}})\s*(?=[-+0-9.\\])")
_CURRENCIES = {"$": "dollar", "€": "euro", "£": "pound sterling"}
_LONGEST = 160  # characters of a unit
_OPERATORS = (*"+-=*/^_([{,;<>|", r"\cdot", r"\times", r"\le", r"\ge", r"\pm")

PERCENT = counted("percent")


class Quantity(NamedTuple):
    """A value and its unit; ``text``: the unit in one spelling, empty without one.

    ``kind``: ``firm`` for a unit that cannot be anything else; ``loose`` for letters after a number and a space (``5
    m``), a unit if the other side has one or is a bare number; ``tight`` without the space (``5m``), a unit only if the
    other side has one.
    """

    bare: str
    text: str = ""
    unit: Unit | None = None
    kind: str = ""


def quantity(text: str) -> Quantity:
    """Split ``text`` into value and unit; a bare unit counts as the value."""
    if (match := _CURRENCY.match(text)) and text[match.end() :]:
        sign = next((sign for sign in match.groups()[1:] if sign), "")
        inner = quantity(match[1] + text[match.end() :])
        name = _CURRENCIES.get(sign, "rupee")
        if inner.kind == "firm" and inner.text.startswith("per "):
            return Quantity(inner.bare, f"{name} {inner.text}", counted(name).times(inner.unit), "firm")
        return inner if inner.kind == "firm" else Quantity(match[1] + text[match.end() :], name, counted(name), "firm")
    tail = max(0, len(text) - _LONGEST)
    if match := _PERCENT.search(text, tail):
        return _cut(text, match.start(), "percent", PERCENT, "firm")
    if (match := _DEGREES.search(text, tail)) and not of_an_angle(text):
        scale = match[1] or match[2] or match[3]
        name = f"degree {scale}" if scale else "degree"
        return _cut(text, match.start(), name, counted(name), "firm")
    last = text[-1:]
    if last.isalpha() or last in "})0123456789.":
        return _with_suffix(text)
    return Quantity(text)


def of_an_angle(text: str) -> bool:
    r"""Return whether ``text`` has ``\sin`` or another function of an angle; its degrees are numbers."""
    return _OF_AN_ANGLE.search(text) is not None


def same_unit(one: Quantity, other: Quantity) -> bool:
    """Return whether two units are compatible: one is missing, both measure alike, or one is less specific.

    Less specific means a shorter name of the same counted thing (cent, cent per pound).
    """
    if one.unit is None or other.unit is None or one.unit == other.unit:
        return True
    shorter, longer = sorted((one, other), key=lambda side: len(side.text))
    counts = all(len(base) > 3 and base != "radian" for base, _ in shorter.unit.powers)
    return counts and longer.text.startswith(shorter.text + " ")


def _cut(text: str, at: int, name: str, unit: Unit, kind: str) -> Quantity:
    bare = text[:at].strip()
    return Quantity(bare, name, unit, kind) if bare else Quantity(text)


def _with_suffix(text: str) -> Quantity:
    """Strip the longest suffix that is a unit."""
    run: list[re.Match] = []  # consecutive unit tokens up to the current position
    at = max(0, len(text) - _LONGEST)
    while at < len(text):
        token = _TOKEN.match(text, at)
        if not token:
            run, token = [], _OTHER.match(text, at)
        elif run or token.lastgroup not in ("power", "operator"):
            run.append(token)
        at = token.end()
    names = [token for token in run if token.lastgroup in ("fraction", "upright", "sign", "plain")]
    upright = [token for token in names if token.lastgroup in ("fraction", "upright")]
    for first in (upright or names)[:6]:
        if found := _read(text, first, run):
            return found
    return Quantity(text)


def _read(text: str, first: re.Match, run: list[re.Match]) -> Quantity | None:
    """Return the quantity whose unit begins with the token ``first``, or None."""
    at = first.start()
    if first.lastgroup == "upright" and (micro := re.search(r"\\(?:mu|micro)\s*$", text[:at])):
        at = micro.start()
    bare = text[:at].rstrip()
    if not bare or bare.endswith(_OPERATORS):
        return None
    spelled = _flat(token for token in run if token.start() >= at)
    found = parse(spelled)
    if found is None:
        return None
    words, unit, known = found
    if first.lastgroup != "plain" and (first.lastgroup != "sign" or _VALUE.fullmatch(bare)):
        single = first is run[-1] and len(spelled.strip()) == 1
        return None if single and not known else Quantity(bare, words, unit, "firm")
    if not _VALUE.fullmatch(bare) and not (known and _all_firm(spelled)):
        return None
    spaced = text[at - 1 : at] == " "
    if known:
        kind = "firm" if _all_firm(spelled) else "loose" if spaced else "tight"
        return Quantity(bare, words, unit, kind) if kind == "firm" or number(bare) else None
    nouns = len(spelled.split()[0]) > 3 and number(bare)
    return Quantity(bare, words, unit, "firm") if nouns else None


def _all_firm(spelled: str) -> bool:
    """Return whether plain letters can only be a unit: no single-letter symbols, or one per another."""
    words = re.findall(r"[A-Za-z]+", spelled)
    return all(word in _FIRM_PLAIN or (len(word) > 3 and lookup(word)) for word in words if word != "per") or (
        ("/" in spelled or "per" in words) and all(word == "per" or lookup(word) for word in words)
    )


def _flat(tokens: Iterable[re.Match]) -> str:
    """Return the tokens in plain characters: ``kg·m/s^2``."""
    spelled = []
    for token in tokens:
        if token["fraction"]:
            spelled.append(f" ({_inside(token[2])})/({_inside(token[4])})")
        else:
            spelled.append(_inside(token[0]))
    return _MICRO.sub("µ", "".join(spelled))


def _inside(text: str) -> str:
    text = re.sub(rf"{_UPRIGHT}{_GROUP}", r"\1", text)
    text = re.sub(r"\^\s*\{\s*([^{}]*?)\s*\}", r"^\1", text)
    text = re.sub(r"\\(?:cdot|times)(?![A-Za-z])|\*|·", "·", text)
    text = re.sub(r"\\(?:Omega|ohm)(?![A-Za-z])", "Ω", text)
    text = re.sub(r"\\(?:mu|micro)(?![A-Za-z])\s*", "µ", text)
    return re.sub(r"\\AA(?![A-Za-z])", "Å", text)


# --- the grammar

_PART = re.compile(r"\s*(?:([A-Za-zµΩÅ]+(?:'s)?)|(\^)\s*([-+]?[0-9]+(?:/[0-9]+)?)|([/()·])|([-.,]))")
_POWER_WORDS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
_AFTER_WORDS = {"squared": 2, "cubed": 3}


@lru_cache(maxsize=4_096)
def parse(spelled: str) -> tuple[str, Unit, bool] | None:
    """Return the unit in one spelling, its value, and whether every word is a unit (else things are counted)."""
    parts, at = [], 0
    spelled = spelled.rstrip(" .")
    while at < len(spelled):
        part = _PART.match(spelled, at)
        if not part:
            return None
        if part[1]:
            parts.append("/" if part[1] == "per" else part[1])
        elif part[2]:
            parts.append("^" + part[3])
        elif part[4]:
            parts.append(part[4])
        at = part.end()
    words = [part for part in parts if part[0].isalpha()]
    if not words or parts[0].lower() in _AFTER_WORDS or any(_changes_the_value(word.lower()) for word in words):
        return None
    reader = _UnitParser(parts)
    unit = reader.product()
    if unit is not None and reader.at == len(parts):
        return _spelled(parts), unit, True
    if any(part in "()" or part[0] == "^" for part in parts if part != "/") and not _powered_noun(parts):
        return None
    return _spelled(parts), counted(_spelled(parts)), False


def _changes_the_value(word: str) -> bool:
    """Return whether ``word`` changes a number's value, or is mathematics; coins (quarters) are counted."""
    return word not in _AFTER_WORDS and word != "quarters" and not _NO_UNIT.isdisjoint((word, singular(word)))


def _powered_noun(parts: list[str]) -> bool:
    return len(parts) == 2 and parts[0].isalpha() and len(parts[0]) > 3 and parts[1] in ("^2", "^3")


def _spelled(parts: list[str]) -> str:
    return " ".join("per" if part == "/" else singular(part.lower()) if part.isalpha() else part for part in parts)


class _UnitParser:
    def __init__(self, parts: list[str]) -> None:
        self._parts = parts
        self.at = 0

    def product(self) -> Unit | None:
        total, below = ONE, False
        while self.at < len(self._parts) and self._parts[self.at] != ")":
            if self._parts[self.at] in "/·":
                below |= self._parts[self.at] == "/"
                self.at += 1
                continue
            factor = self._factor()
            if factor is None:
                return None
            total = total.times(factor, -1 if below else 1)
        return total

    def _factor(self) -> Unit | None:
        word, power = self._take(), Fraction(1)
        if word.lower() in _POWER_WORDS and self.at < len(self._parts):
            power, word = Fraction(_POWER_WORDS[word.lower()]), self._take()
        if word.lower() == "degree" or word.lower() == "degrees":
            unit = self._degrees()
        elif word == "(":
            unit = self.product()
            if self._take() != ")":
                return None
        else:
            unit = lookup(word) if word[0].isalpha() else None
        if unit is None:
            return None
        if self.at < len(self._parts) and (after := self._parts[self.at])[0] == "^":
            self.at += 1
            power *= Fraction(after[1:])
        elif self.at < len(self._parts) and after.lower() in _AFTER_WORDS:
            self.at += 1
            power *= _AFTER_WORDS[after.lower()]
        return ONE.times(unit, power) if abs(power) <= 20 else None

    def _degrees(self) -> Unit | None:
        scale = self._parts[self.at].lower() if self.at < len(self._parts) else ""
        name = {"celsius": "degree C", "c": "degree C", "fahrenheit": "degree F", "f": "degree F"}.get(scale, "degree")
        self.at += name != "degree"
        return counted(name)

    def _take(self) -> str:
        self.at += 1
        return self._parts[self.at - 1] if self.at <= len(self._parts) else ""
