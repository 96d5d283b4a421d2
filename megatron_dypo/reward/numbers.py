r"""Parse rational numbers: ``1,234``, ``-.5``, ``3/4``, ``\frac{3}{4}``, ``1\frac{4}{5}``, ``52_8``."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

_DIGITS = r"(?:(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)"
_SIGN = r"[-+]?"
_PLAIN = re.compile(rf"({_SIGN})\s*({_DIGITS})")
_OVER = re.compile(rf"({_SIGN})\s*({_DIGITS})\s*/\s*({_DIGITS})")
_FRAC = re.compile(rf"({_SIGN})\s*\\frac\s*\{{\s*({_SIGN}\s*{_DIGITS})\s*\}}\s*\{{\s*({_SIGN}\s*{_DIGITS})\s*\}}")
_MIXED = re.compile(
    rf"({_SIGN})\s*([0-9]+)(?:\s*\\frac\s*\{{\s*([0-9]+)\s*\}}\s*\{{\s*([0-9]+)\s*\}}|\s+([0-9]+)/([0-9]+))"
)
_POWER_OF_TEN = re.compile(
    rf"({_SIGN})\s*(?:({_DIGITS})\s*(?:\\times|\\cdot|\*)\s*)?10\s*\^\s*(?:\{{\s*({_SIGN}[0-9]{{1,3}})\s*\}}|([0-9]{{1,3}}))"
)
_EXPONENT = re.compile(rf"({_SIGN})({_DIGITS})[eE]({_SIGN}[0-9]{{1,3}})")
_REPEATING = re.compile(rf"({_SIGN})\s*([0-9]*)\.([0-9]*)\s*\\overline\s*\{{\s*([0-9]+)\s*\}}")
_BASED = re.compile(r"([0-9]+)_(?:\{\s*([0-9]{1,2})\s*\}|([0-9]{1,2}))")
_SEVERAL = re.compile(rf"{_SIGN}[0-9]{{1,3}}(?:,[1-9][0-9]{{2}})+")
_LARGEST_BASE = 36


class Number(NamedTuple):
    """``rounded``: written with decimals, so it may stand for a number with more of them."""

    value: Fraction
    rounded: bool = False


def number(text: str) -> Number | None:
    """Return the number that all of ``text`` (at most 4,000 characters) is, or None."""
    if match := _PLAIN.fullmatch(text):
        return Number(_signed(match[1], _decimal(match[2])), "." in text)
    if match := _OVER.fullmatch(text) or _FRAC.fullmatch(text):
        top, bottom = _decimal(match[2]), _decimal(match[3])
        return Number(_signed(match[1], top / bottom), "." in text) if bottom else None
    if match := _MIXED.fullmatch(text):
        whole, top, bottom = int(match[2]), int(match[3] or match[5]), int(match[4] or match[6])
        return Number(_signed(match[1], whole + Fraction(top, bottom))) if top < bottom else None
    if match := _POWER_OF_TEN.fullmatch(text):
        scale = Fraction(10) ** int(match[3] or match[4])
        return Number(_signed(match[1], _decimal(match[2] or "1") * scale), "." in text)
    if match := _REPEATING.fullmatch(text):
        once, repeated = match[3], match[4]
        period = Fraction(int(repeated), (10 ** len(repeated) - 1) * 10 ** len(once))
        return Number(_signed(match[1], _decimal(f"{match[2]}.{once}0") + period))
    if match := _EXPONENT.fullmatch(text):
        return Number(_signed(match[1], _decimal(match[2]) * Fraction(10) ** int(match[3])), True)
    return None


def may_be_several(text: str) -> bool:
    """Return whether thousands separators could also separate numbers in brackets: 1,200 could, 1,050 could not."""
    return _SEVERAL.fullmatch(text) is not None


def in_base(text: str) -> tuple[str, int] | None:
    """Return digits and value of a number with a base (``52_8``, ``52_{8}``); None if ``text`` is not one."""
    match = _BASED.fullmatch(text)
    base = int(match[2] or match[3]) if match else 0
    if not match or not 2 <= base <= _LARGEST_BASE or any(int(digit) >= base for digit in match[1]):
        return None
    return match[1].lstrip("0") or "0", int(match[1], base)


def _decimal(text: str) -> Fraction:
    digits = text.replace(",", "").replace(" ", "")
    return Fraction(int(digits)) if "." not in digits else Fraction(digits.removesuffix("."))


def _signed(sign: str, value: Fraction) -> Fraction:
    return -value if sign == "-" else value
