r"""Detect LaTeX commands that lost their backslash: ``\frac`` under-escaped in JSON is a form feed and ``rac``.

Python, JSON and YAML read ``\a \b \t \n \v \f \r \e`` as one control character each. If such a character replaces
the start of a command, the text is not what its author wrote: no right answer equals the ground truth.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

# The rest of each command, by the control character that replaced its first letters. Single letters and English words
# after a tab or a line break count as commands only inside formulas.
_ANYWHERE = {
    "\a": "lpha|ngle|pprox|rccos|rcsin|rctan|rg|rray|st",
    "\b": "ackslash|ar|ecause|egin|eta|f|ig(?:cap|cup|g|gl|gr|l|r)?|inom|mod|old|oldsymbol|ot|ox|oxed|reve|ullet",
    "\v": "arepsilon|arphi|artheta|dots|ec|ee|ert",
    "\f": "box|lat|loor|orall|rac|rown",
    "\x1b": "ll|mptyset|nd|psilon|quiv|ta|xists|xp",
    "\t": "imes|heta|ilde|herefore|riangle|ext(?:bf|it|rm|sf|tt|style)?(?=\\{)|frac(?=\\{|\\d)|anh(?=[ ({\\\\])",
    "\r": "ight(?:arrow)?|angle|ceil|floor|ho|m(?=\\{)|brace|brack",
}
_IN_FORMULAS = {
    "\t": "an|au|o|op|extstyle|bin",
    "\n": "eq|eg|abla|otin|mid|parallel|exists|earrow|subseteq|ot(?=\\s*\\\\)",
}
_LETTER = {"\a": "a", "\b": "b", "\v": "v", "\f": "f", "\x1b": "e", "\t": "t", "\r": "r", "\n": "n"}


def _pattern(table: dict[str, str]) -> re.Pattern[str]:
    rests = (f"{re.escape(control)}(?=(?:{rest})(?![a-zA-Z]))" for control, rest in table.items())
    return re.compile("|".join(rests))


_CERTAIN, _LIKELY = _pattern(_ANYWHERE), _pattern(_IN_FORMULAS)
_FORMULA = re.compile(r"\$\$.+?\$\$|\$[^$\n]*(?:\n[^$\n]+)*\$|\\\(.+?\\\)|\\\[.+?\\\]", re.DOTALL)
_WHOLE = re.compile(r".+", re.DOTALL)


def swallowed(text: str, formula: bool = False) -> str | None:
    r"""Return the first swallowed escape of ``text`` as it should be, with its context (``\frac{1}{2}``); or None.

    ``formula``: the whole text is one, without dollar signs (a ground truth).
    """
    places = [match.start() for match in _CERTAIN.finditer(text)]
    if _LIKELY.search(text):  # most texts have none
        spans = _WHOLE if formula else _FORMULA
        places += [span.start() + match.start() for span in spans.finditer(text) for match in _LIKELY.finditer(span[0])]
    if not places:
        return None
    first = min(places)
    return f"\\{_LETTER[text[first]]}{text[first + 1 : first + 20]}"


def repaired(text: str, formula: bool = False) -> str:
    """Return ``text`` with its swallowed escapes restored; ``formula`` as in ``swallowed``."""
    if swallowed(text, formula) is None:
        return text

    def put_back(match: re.Match[str]) -> str:
        return "\\" + _LETTER[match[0]]

    text = _CERTAIN.sub(put_back, text)
    return (_WHOLE if formula else _FORMULA).sub(lambda span: _LIKELY.sub(put_back, span[0]), text)


TRUTHS = frozenset({"ground_truth", "answer", "final_answer", "expected_answer"})  # fields that hold a bare formula


def swallowed_in(row: dict[str, Any]) -> str | None:
    """Return a line naming the field of a row with a LaTeX command that lost its backslash, or None."""
    for field, value in row.items():
        for text, formula in _strings(value, field in TRUTHS):
            if command := swallowed(text, formula):
                return (
                    f"{field}: holds a control character where {command!r:.40} was meant: its backslash was swallowed"
                )
    return None


def with_escapes(value: Any, formula: bool = False) -> Any:
    """Return a JSON value with the backslashes restored that ``swallowed_in`` reports."""
    if isinstance(value, dict):
        return {name: with_escapes(each, formula or name in TRUTHS) for name, each in value.items()}
    if isinstance(value, list):
        return [with_escapes(each, formula) for each in value]
    return repaired(value, formula) if isinstance(value, str) else value


def _strings(value: Any, formula: bool) -> Iterator[tuple[str, bool]]:
    if isinstance(value, str):
        yield value, formula
    elif isinstance(value, dict):
        for name, each in value.items():
            yield from _strings(each, formula or name in TRUTHS)
    elif isinstance(value, list):
        for each in value:
            yield from _strings(each, formula)
