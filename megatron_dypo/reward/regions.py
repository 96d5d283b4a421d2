r"""Rewrite conditions on one real variable as intervals: ``\{x \mid x>2\}``, ``x<1 \text{ or } x>3``, ``x \ne 2``.

    builder    \{x \mid condition\}   also with : or |, and x \in \mathbb{R}
    condition  part (or part)*        union
    part       bound (and bound)*     one lower and one upper bound; a<x<b; x \ne a; x \in (a,b); (a,b)

A variable over anything but the reals is rejected, and so are bounds that contain the variable.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from megatron_dypo.reward.lists import AND_WORD, OR_WORD

_REALS = r"\\mathbb\s*\{?\s*R\s*\}?|\\(?:R|reals|Reals)(?![A-Za-z])|\\text\s*\{\s*R\s*\}"
_VARIABLE = r"[A-Za-z]|\\(?:theta|alpha|beta|lambda|mu|phi|omega|varphi|rho|sigma|tau)(?![A-Za-z])"
_BUILDER = re.compile(
    rf"\\?\{{\s*({_VARIABLE})\s*(?:\\in\s*(?:{_REALS}))?\s*(?:\\mid(?![A-Za-z])|\\vert(?![A-Za-z])|\\?\||:|\\colon(?![A-Za-z]))\s*"
    r"((?:[^{}]|\\[{}]|\{[^{}]*\}|\{(?:[^{}]|\{[^{}]*\})*\})+?)\\?\}"
)
_IN_REALS = re.compile(rf"\s*,?\s*({_VARIABLE})\s*\\in\s*(?:{_REALS})\s*,?\s*")
_OR = re.compile(rf"\s*,?\s*(?:{OR_WORD}|\\(?:lor|vee|cup)(?![A-Za-z]))\s*")
_AND = re.compile(rf"\s*,?\s*(?:{AND_WORD}|\\(?:land|wedge)(?![A-Za-z]))\s*|\s*,\s+")
_SIGN = re.compile(r"\s*(<|>|\\(?:le|ge|ne|in)(?![A-Za-z])|(?<!\\n)=)\s*")
_INEQUALITY = re.compile(r"[<>]|\\(?:le|ge|ne)(?![A-Za-z])")
_ALL_REALS = re.compile(
    rf"(?:{_REALS})|(?:\\text\s*\{{)?\s*(?:(?:all|the|any) )?(?:real numbers?|reals)\s*\}}?",
    re.IGNORECASE,
)
_WITHOUT = re.compile(rf"(?:{_REALS})\s*\\(?:setminus|backslash|smallsetminus)\s*\\?\{{([^{{}}]*)\\?\}}")
_INTERVAL = re.compile(r"[(\[][^<>=;|()\[\],]*,[^<>=;|()\[\],]*[)\]]")
_LONGEST = 400


class Region(NamedTuple):
    """``intervals``: as LaTeX; ``variable``: the variable they belong to, or ""; ``bound``: by a set-builder."""

    intervals: str
    variable: str = ""
    bound: bool = False

    def may_equal(self, other: Region) -> bool:
        """Return whether the variables do not contradict each other: names of bound ones may differ."""
        return self.variable == other.variable or "" in (self.variable, other.variable) or (self.bound and other.bound)


def region(text: str) -> Region | None:
    """Return the part of the real line that ``text`` describes; None if it describes none, or is not understood."""
    if len(text) > _LONGEST:
        return None
    if _ALL_REALS.fullmatch(text):
        return Region(r"(-\infty,\infty)")
    if holes := _WITHOUT.fullmatch(text):
        points = [point.strip(" \\") for point in holes[1].split(",")]
        return Region(_around(points)) if len(points) == 1 else None
    if builder := _BUILDER.fullmatch(text):
        found = _condition(builder[2].strip(), builder[1])
        return Region(found, builder[1], True) if found else None
    variable = _the_variable(text)
    found = _condition(text, variable) if variable is not None else None
    return Region(found, variable) if found else None


def is_condition(text: str) -> bool:
    """Return whether ``text`` has to be rewritten before comparison: words between parts, or a set-builder."""
    if "\\" not in text and "<" not in text and ">" not in text and " or " not in text and "real" not in text:
        return False
    return (
        _BUILDER.fullmatch(text) is not None
        or _WITHOUT.fullmatch(text) is not None
        or _ALL_REALS.fullmatch(text) is not None
        or (_INEQUALITY.search(text) is not None and (_OR.search(text) or _AND.search(text)) is not None)
        or (_OR.search(text) is not None and _INTERVAL.search(text) is not None)
        or (r"\ne" in text and _SIGN.search(text) is not None)
    )


def _the_variable(text: str) -> str | None:
    """Return the only variable alone on a side of a sign; "" for bare intervals, None if there are two."""
    sides = [side.strip() for part in _OR.split(text) for piece in _AND.split(part) for side in _SIGN.split(piece)[::2]]
    names = {side for side in sides if re.fullmatch(_VARIABLE, side) and side not in ("e", "i")}
    return names.pop() if len(names) == 1 else None if names or not _INTERVAL.search(text) else ""


def _condition(text: str, variable: str) -> str | None:
    reals = _IN_REALS.search(text)
    if reals and reals[1] == variable:
        text = text[: reals.start()] + text[reals.end() :]
    parts = [_part(part.strip(), variable) for part in _OR.split(text)]
    return r"\cup".join(parts) if all(parts) else None


def _part(text: str, variable: str) -> str | None:
    if _INTERVAL.fullmatch(text):
        return text
    bounds = [_bound(piece.strip(), variable) for piece in _AND.split(text)]
    if None in bounds:
        return None
    if len(bounds) == 1:
        return bounds[0] if isinstance(bounds[0], str) else "{}{},{}{}".format(*_closed(bounds[0]))
    if any(isinstance(bound, str) for bound in bounds) or len(bounds) > 2:
        return None
    lower = [bound[0] for bound in bounds if bound[0]]
    upper = [bound[1] for bound in bounds if bound[1]]
    return "{}{},{}{}".format(*_closed((lower[0], upper[0]))) if len(lower) == len(upper) == 1 else None


Bound = tuple[str | None, str | None]
"""Start and end with their brackets, such as ``[2`` and ``3)``."""


def _bound(text: str, variable: str) -> Bound | str | None:
    pieces = _SIGN.split(text)
    sides, signs = [side.strip() for side in pieces[::2]], pieces[1::2]
    if not signs or variable not in sides or any(variable in _letters(side) for side in sides if side != variable):
        return None
    if any(not side for side in sides):
        return None
    if len(signs) == 1:
        other, sign = (sides[1], signs[0]) if sides[0] == variable else (sides[0], signs[0])
        if sign == r"\ne":
            return _around([other])
        if sign == "=":
            return rf"\{{{other}\}}"
        if sign == r"\in":
            return other if sides[0] == variable and _INTERVAL.fullmatch(other) else None
        below = (sides[0] == variable) == (sign in ("<", r"\le"))
        strict = sign in ("<", ">")
        return (None, other + ")]"[not strict]) if below else ("(["[not strict] + other, None)
    if len(signs) == 2 and sides[1] == variable and (set(signs) <= {"<", r"\le"} or set(signs) <= {">", r"\ge"}):
        if signs[0] in (">", r"\ge"):
            sides, signs = sides[::-1], signs[::-1]
        return "(["[signs[0] in (r"\le", r"\ge")] + sides[0], sides[2] + ")]"[signs[1] in (r"\le", r"\ge")]
    return None


def _closed(bound: Bound) -> tuple[str, str, str, str]:
    lower, upper = bound[0] or r"(-\infty", bound[1] or r"\infty)"
    return lower[0], lower[1:], upper[:-1], upper[-1]


def _around(points: list[str]) -> str:
    return rf"(-\infty,{points[0]})\cup({points[0]},\infty)"


def _letters(text: str) -> set[str]:
    return set(re.findall(r"\\[A-Za-z]+|[A-Za-z]", text))
