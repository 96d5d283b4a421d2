r"""Map names and symbols of units to scale and dimension: J, N m and \text{joules} are equal, J and eV are not.

A dimension maps bases to powers. Each counted thing (dollar, radian, degree, apple) is a base
of its own, and so is each scale whose zero is arbitrary (degrees of temperature).
"""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from typing import NamedTuple


class Unit(NamedTuple):
    """A unit's scale and ``powers``: (base, power), sorted."""

    scale: Fraction
    powers: tuple[tuple[str, Fraction], ...]

    def times(self, other: Unit, power: Fraction | int = 1) -> Unit:
        total = dict(self.powers)
        for base, exponent in other.powers:
            total[base] = total.get(base, 0) + exponent * power
        scale = self.scale * (other.scale**power if power == int(power) else other.scale)
        return Unit(scale, tuple(sorted((base, exponent) for base, exponent in total.items() if exponent)))


ONE = Unit(Fraction(1), ())


def _unit(scale: str | int | Fraction = 1, **powers: int) -> Unit:
    return Unit(Fraction(scale), tuple(sorted((base, Fraction(power)) for base, power in powers.items())))


def _counted(name: str) -> Unit:
    return Unit(Fraction(1), ((name, Fraction(1)),))


# --- with prefixes: (symbols, names, unit)

_METRIC: list[tuple[str, str, Unit]] = [
    ("m", "meter metre", _unit(m=1)),
    ("g", "gram gramme", _unit("1/1000", kg=1)),
    ("s sec", "second", _unit(s=1)),
    ("A", "ampere amp", _unit(A=1)),
    ("K", "kelvin", _unit(K=1)),
    ("mol", "mole", _unit(mol=1)),
    ("cd", "candela", _unit(cd=1)),
    ("Hz", "hertz", _unit(s=-1)),
    ("N", "newton", _unit(kg=1, m=1, s=-2)),
    ("Pa", "pascal", _unit(kg=1, m=-1, s=-2)),
    ("J", "joule", _unit(kg=1, m=2, s=-2)),
    ("W", "watt", _unit(kg=1, m=2, s=-3)),
    ("C", "coulomb", _unit(A=1, s=1)),
    ("V", "volt", _unit(kg=1, m=2, s=-3, A=-1)),
    ("F", "farad", _unit(kg=-1, m=-2, s=4, A=2)),
    ("Ω", "ohm", _unit(kg=1, m=2, s=-3, A=-2)),
    ("S", "siemens", _unit(kg=-1, m=-2, s=3, A=2)),
    ("Wb", "weber", _unit(kg=1, m=2, s=-2, A=-1)),
    ("T", "tesla", _unit(kg=1, s=-2, A=-1)),
    ("H", "henry", _unit(kg=1, m=2, s=-2, A=-2)),
    ("lm", "lumen", _unit(cd=1, sr=1)),
    ("lx", "lux", _unit(cd=1, sr=1, m=-2)),
    ("Bq", "becquerel", _unit(decay=1, s=-1)),
    ("Gy", "gray", _unit(m=2, s=-2)),
    ("Sv", "sievert", _unit(dose=1, m=2, s=-2)),
    ("eV", "electronvolt", _unit(Fraction("1.602176634") / 10**19, kg=1, m=2, s=-2)),
    ("L l", "liter litre", _unit("1/1000", m=3)),
    ("bar", "", _unit(100_000, kg=1, m=-1, s=-2)),
    ("cal", "calorie", _unit("4.184", kg=1, m=2, s=-2)),
    ("pc", "parsec", _unit(30_856_775_814_913_673, m=1)),
    ("Wh", "", _unit(3600, kg=1, m=2, s=-2)),
    ("Ah", "", _unit(3600, A=1, s=1)),
    ("Nm", "", _unit(kg=1, m=2, s=-2)),
    ("VA", "", _unit(kg=1, m=2, s=-3)),
    ("rad", "radian", _counted("radian")),
    ("bit", "", _counted("bit")),
    ("B", "byte", _unit(8, bit=1)),
    ("", "tonne", _unit(1000, kg=1)),
    ("M", "molar", _unit(1000, mol=1, m=-3)),
]
_PREFIXES = {
    "Y": (24, "yotta"), "Z": (21, "zetta"), "E": (18, "exa"), "P": (15, "peta"), "T": (12, "tera"), "G": (9, "giga"),
    "M": (6, "mega"), "k": (3, "kilo"), "h": (2, "hecto"), "da": (1, "deca"), "d": (-1, "deci"), "c": (-2, "centi"),
    "m": (-3, "milli"), "µ": (-6, "micro"), "n": (-9, "nano"), "p": (-12, "pico"), "f": (-15, "femto"),
    "a": (-18, "atto"),
}  # fmt: skip

# --- without prefixes

_FOOT, _POUND = Fraction("0.3048"), Fraction("0.45359237")
_OTHERS: dict[str, Unit] = {
    "min minute": _unit(60, s=1), "h hr hour": _unit(3600, s=1), "day": _unit(86_400, s=1),
    "week wk": _unit(604_800, s=1),
    "month mo": _counted("month"), "year yr": _counted("year"), "decade": _counted("decade"),
    "century": _counted("century"),
    "in inch": _unit(_FOOT / 12, m=1), "ft foot feet": _unit(_FOOT, m=1), "yd yard": _unit(3 * _FOOT, m=1),
    "mi mile": _unit(5280 * _FOOT, m=1), "nmi": _unit(1852, m=1), "ly": _unit(9_460_730_472_580_800, m=1),
    "AU au": _unit(149_597_870_700, m=1), "Å angstrom": _unit(Fraction(1, 10**10), m=1),
    "micron": _unit("1/1000000", m=1),
    "mph": _unit(5280 * _FOOT / 3600, m=1, s=-1), "kmh kph kmph": _unit("5/18", m=1, s=-1), "mps": _unit(m=1, s=-1),
    "knot": _unit(Fraction(1852, 3600), m=1, s=-1), "lb lbs pound": _unit(_POUND, kg=1),
    "oz ounce": _unit(_POUND / 16, kg=1),
    "ton": _counted("ton"), "t": _unit(1000, kg=1),
    "u amu Da dalton": _unit(Fraction("1.66053906660") / 10**27, kg=1),
    "atm atmosphere": _unit(101_325, kg=1, m=-1, s=-2), "mmHg torr Torr": _unit("133.322", kg=1, m=-1, s=-2),
    "psi": _unit("6894.757", kg=1, m=-1, s=-2), "hp horsepower": _unit("745.7", kg=1, m=2, s=-3),
    "erg": _unit("1/10000000", kg=1, m=2, s=-2), "dyn dyne": _unit("1/100000", kg=1, m=1, s=-2),
    "acre": _counted("acre"), "ha hectare": _unit(10_000, m=2), "cc": _unit("1/1000000", m=3),
    "gal gallon": _counted("gallon"), "qt quart": _counted("quart"), "pint": _counted("pint"), "cup": _counted("cup"),
    "degree deg": _counted("degree"), "degree-C celsius": _counted("degree C"),
    "degree-F fahrenheit": _counted("degree F"),
    "rpm": _unit(revolution=1, s=-1).times(_unit(60), -1), "rev revolution": _counted("revolution"),
    "sr steradian": _counted("sr"), "dB decibel": _counted("decibel"), "ppm": _counted("ppm"),
    "unit": _counted("unit"), "dollar usd USD": _counted("dollar"), "cent": _counted("cent"),
    "euro EUR": _counted("euro"),
    "rupee Rs": _counted("rupee"), "yen": _counted("yen"), "percent pct percentage": _counted("percent"),
}  # fmt: skip


def _table() -> tuple[dict[str, Unit], dict[str, Unit]]:
    symbols: dict[str, Unit] = {}
    names: dict[str, Unit] = {}
    for short, long, unit in _METRIC:
        for prefix, (power, word) in _PREFIXES.items():
            scaled = Unit(unit.scale * Fraction(10) ** power, unit.powers)
            symbols |= {prefix + symbol: scaled for symbol in short.split()}
            names |= {word + name: scaled for name in long.split()}
    for short, long, unit in _METRIC:
        symbols |= dict.fromkeys(short.split(), unit)
        names |= dict.fromkeys(long.split(), unit)
    for spelled, unit in _OTHERS.items():
        for name in spelled.split():
            (symbols if len(name) <= 3 or not name.islower() else names)[name] = unit
    return symbols, names


SYMBOLS, NAMES = _table()
"""Symbols of a few letters, case-sensitive (mW, MW); and full names, in lower case and singular."""
_MANY = Counter(symbol.lower() for symbol in SYMBOLS)
_FOLDED = {symbol.lower(): unit for symbol, unit in SYMBOLS.items() if len(symbol) > 2 and _MANY[symbol.lower()] == 1}


def lookup(word: str) -> Unit | None:
    """Return the unit of a symbol or name, plural included, or None."""
    if word in SYMBOLS:
        return SYMBOLS[word]
    lower = word.lower()
    if len(word) == 1:
        return None
    for name in (lower, singular(lower)):
        if name in NAMES:
            return NAMES[name]
        if name in SYMBOLS and len(name) > 1:  # KM, Hr, kgs
            return SYMBOLS[name]
    return _FOLDED.get(lower)


def singular(word: str) -> str:
    """Return the singular: ``inch`` for ``inches``, ``body`` for ``bodies``; a guess if no table knows it."""
    for ending in ("s", "es"):
        short = word.removesuffix(ending)
        if short != word and (short in NAMES or (short in SYMBOLS and len(short) > 1)):
            return short
    if len(word) <= 3 or word.endswith("ss"):
        return word
    return word.removesuffix("s")


def counted(words: str) -> Unit:
    """Return a unit that counts things: ``red ball``."""
    return _counted(words)
