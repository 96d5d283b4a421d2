r"""Evaluate rational arithmetic with powers, roots, factorials and binomials to exact fractions.

    sum      = [+-] product ([+-] product)*
    product  = power ([* / \cdot \times \div] power)*     side by side only if a bracket stands between
    power    = atom [! | !!] [^ [+-] atom]                -2^2 is -4, 5!! is 5 \cdot 3 \cdot 1
    atom     = number | ( sum ) | { sum } | \frac power power | \binom power power | \sqrt [n] power

Text that is not such arithmetic, is ambiguous (``2\frac{3^5}{2}``) or too large gives None, and math-verify is
decides. Powers, factorials and binomials that would be too large are rejected before they are computed.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction
from typing import NamedTuple

from megatron_dypo.reward.numbers import may_be_several

MAX_BITS = 1 << 17
"""Largest numerator or denominator: 39,000 decimal digits."""
_MAX_WORK = 8 * MAX_BITS  # bits of all intermediate results: milliseconds, in the trainer's process
_MAX_DEPTH = 60
_MAX_ROOT = 64

_TOKEN = re.compile(
    r"\s*(?:((?:[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)"
    r"|\\(frac|binom|sqrt|cdot|times|div|ast)(?![a-zA-Z])|([-+*/^!(){}\[\]]))"
)
_LIKELY = re.compile(r"[0-9]")


class Ratio(NamedTuple):
    """``top / bottom``, not reduced; ``bottom`` > 0. ``rounded``: it involves decimals."""

    top: int
    bottom: int
    rounded: bool = False


class _NotRational(Exception):
    pass


def exact(text: str) -> Ratio | None:
    """Return the value of all of ``text``; None if it is not such arithmetic, or too large."""
    if not _LIKELY.search(text):
        return None
    try:
        reader = _ArithmeticParser(text)
        value = reader.sum()
        return value if reader.at == len(reader.tokens) else None
    except _NotRational:
        return None


def same(one: Ratio, other: Ratio) -> bool:
    return one.top * other.bottom == other.top * one.bottom


def fraction(value: Ratio) -> Fraction | None:
    """Return the reduced fraction; None if reducing would take long."""
    small = max(value.top.bit_length(), value.bottom.bit_length()) <= MAX_BITS // 8
    return Fraction(value.top, value.bottom) if small else None


class _ArithmeticParser:
    """Recursive-descent parser over the tokens of one text."""

    def __init__(self, text: str) -> None:
        self.tokens: list[str] = []
        self.at = self._work = self._depth = 0
        end = 0
        while end < len(text):
            token = _TOKEN.match(text, end)
            if not token:
                raise _NotRational
            self.tokens.append(token[1] or token[2] or token[3])
            end = token.end()

    def sum(self) -> Ratio:
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise _NotRational
        sign = self._take("+", "-")
        total = self._signed(sign, self._product())
        while sign := self._take("+", "-"):
            total = self._plus(total, self._signed(sign, self._product()))
        self._depth -= 1
        return total

    def _product(self) -> Ratio:
        value, divided = self._power(), False
        while True:
            operator = self._take("*", "cdot", "times", "ast", "/", "div")
            if operator:
                sign = self._take("+", "-")
                factor = self._signed(sign, self._power())
                divided = operator in ("/", "div")
                value = self._over(value, factor) if divided else self._times(value, factor)
            elif self._stands_beside():
                if divided:
                    raise _NotRational  # 1/2(3)
                value = self._times(value, self._power())
            else:
                return value

    def _stands_beside(self) -> bool:
        """Return whether a factor follows without an operator, with a bracket between the two."""
        sign, before = self._next(), self.tokens[self.at - 1]
        return sign == "(" or (before == ")" and (sign[:1].isdigit() or sign in ("frac", "sqrt", "binom")))

    def _power(self) -> Ratio:
        value = self._atom()
        if self._take("!"):
            value = self._factorial(value, 2 if self._take("!") else 1)
        if self._take("^"):
            sign = self._take("+", "-")  # x^10 without braces: LaTeX raises only the 1, people mean 10
            value = self._raised(value, self._signed(sign, self._atom()))
        if self._next() in ("!", "^"):
            raise _NotRational  # 3!!!, 2^3!, 2^3^2
        return value

    def _atom(self) -> Ratio:
        sign = self._next()
        self.at += 1
        if sign[:1].isdigit() or sign[:1] == ".":
            return self._number(sign)
        if sign in ("(", "{"):
            if sign == "(" and self._is_a_pair():
                raise _NotRational
            value = self.sum()
            self._must(")" if sign == "(" else "}")
            return value
        if sign == "frac":
            if self.at > 1 and (self.tokens[self.at - 2][-1].isdigit() or self.tokens[self.at - 2] in "}"):
                raise _NotRational  # a mixed number, or a product?
            return self._over(self._group(), self._group())
        if sign == "binom":
            return self._binomial(self._group(), self._group())
        if sign == "sqrt":
            degree = Ratio(2, 1)
            if self._take("["):
                degree = self.sum()
                self._must("]")
            return self._root(self._group(), _whole(degree))
        raise _NotRational

    def _is_a_pair(self) -> bool:
        """Return whether the brackets contain only ``1,200``: a point."""
        at = self.at + (self._next() in ("+", "-"))
        number, end = [*self.tokens[at : at + 2], "", ""][:2]
        return end == ")" and may_be_several(number)

    def _group(self) -> Ratio:
        r"""Parse an argument: ``{...}``, or one digit."""
        sign = self._next()
        if sign == "{" or (len(sign) == 1 and sign.isdigit()):
            return self._atom()
        raise _NotRational

    def _next(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def _take(self, *wanted: str) -> str:
        token = self._next()
        if token and token in wanted:
            self.at += 1
            return token
        return ""

    def _must(self, wanted: str) -> None:
        if not self._take(wanted):
            raise _NotRational

    # --- arithmetic, with the size checked before it is computed

    def _bounded(self, bits: int) -> None:
        self._work += bits + 1
        if bits > MAX_BITS or self._work > _MAX_WORK:
            raise _NotRational

    def _number(self, token: str) -> Ratio:
        whole, point, decimals = token.replace(",", "").partition(".")
        self._bounded(4 * len(token))
        return Ratio(int(whole + decimals), 10 ** len(decimals), bool(point))

    def _signed(self, sign: str, value: Ratio) -> Ratio:
        return Ratio(-value.top, value.bottom, value.rounded) if sign == "-" else value

    def _plus(self, x: Ratio, y: Ratio) -> Ratio:
        rounded = x.rounded or y.rounded
        if x.bottom == y.bottom:
            return Ratio(x.top + y.top, x.bottom, rounded)
        self._bounded(max(x.top.bit_length(), x.bottom.bit_length()) + max(y.top.bit_length(), y.bottom.bit_length()))
        return Ratio(x.top * y.bottom + y.top * x.bottom, x.bottom * y.bottom, rounded)

    def _times(self, x: Ratio, y: Ratio) -> Ratio:
        self._bounded(max(x.top.bit_length() + y.top.bit_length(), x.bottom.bit_length() + y.bottom.bit_length()))
        return Ratio(x.top * y.top, x.bottom * y.bottom, x.rounded or y.rounded)

    def _over(self, x: Ratio, y: Ratio) -> Ratio:
        if y.top == 0:
            raise _NotRational
        sign = -1 if y.top < 0 else 1
        return self._times(x, Ratio(sign * y.bottom, sign * y.top, y.rounded))

    def _raised(self, base: Ratio, exponent: Ratio) -> Ratio:
        if exponent.rounded and exponent.top % exponent.bottom:
            raise _NotRational
        divisor = math.gcd(exponent.top, exponent.bottom)
        power, degree = exponent.top // divisor, exponent.bottom // divisor
        if degree > 1:
            base = self._root(base, degree)
        if power < 0:
            base, power = self._over(Ratio(1, 1), base), -power
        if base.top == 0 and power == 0:
            raise _NotRational
        self._bounded(max(_bits(base.top, power), _bits(base.bottom, power)))
        if abs(base.top) <= 1 == base.bottom:
            power = power % 2 or 2 * (power > 0)  # (-1)^{10^{30}}
        return Ratio(base.top**power, base.bottom**power, base.rounded)

    def _root(self, value: Ratio, degree: int) -> Ratio:
        if not 2 <= degree <= _MAX_ROOT or value.top < 0:
            raise _NotRational
        divisor = math.gcd(value.top, value.bottom)
        self._bounded(max(value.top.bit_length(), value.bottom.bit_length()))
        roots = [_whole_root(part // divisor, degree) for part in value[:2]]
        return Ratio(*roots, value.rounded)

    def _factorial(self, value: Ratio, step: int) -> Ratio:
        n = _whole(value)
        if not 0 <= n <= MAX_BITS:
            raise _NotRational
        self._bounded(int(math.lgamma(n + 1) / math.log(2)))
        return Ratio(math.factorial(n) if step == 1 else math.prod(range(n, 0, -step)), 1)

    def _binomial(self, above: Ratio, below: Ratio) -> Ratio:
        n, k = _whole(above), _whole(below)
        if not 0 <= k <= n:
            raise _NotRational
        self._bounded(min(n, min(k, n - k) * n.bit_length()))
        return Ratio(math.comb(n, k), 1)


def _bits(n: int, power: int) -> int:
    """Return about how many bits ``n**power`` has, for power >= 0."""
    if abs(n) <= 1:
        return 1
    return math.ceil(power * math.log2(abs(n))) if power <= MAX_BITS else power


def _whole(value: Ratio) -> int:
    if value.top % value.bottom:
        raise _NotRational
    return value.top // value.bottom


def _whole_root(n: int, degree: int) -> int:
    """Return the root of n >= 0 if it is whole; raise _NotRational otherwise."""
    if degree == 2:
        root = math.isqrt(n)
    else:
        low, high = 0, 1 << (n.bit_length() // degree + 1)
        if n.bit_length() > MAX_BITS // 32:
            raise _NotRational
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if middle**degree <= n else (low, middle - 1)
        root = low
    if root**degree != n:
        raise _NotRational
    return root
