"""Which suites are asked for: the paper's by their names, and files of one's own.

aime24                                       a suite of suites.py
data/olympiad.jsonl                          a file; its suite is called olympiad
hard=data/olympiad.jsonl?samples=8&extract=number
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from megatron_dypo.errors import UserError
from megatron_dypo.evaluate.files import SUFFIXES
from megatron_dypo.evaluate.suites import SUITES, Suite

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_TAKEN = {*SUITES, "valid"}  # eval/valid/* are the metrics of data.valid
_OPTIONS = {  # what each may be
    "samples": re.compile("[1-9][0-9]{0,5}"),
    "extract": re.compile("boxed|marked|number"),
    "reward": re.compile("math|choice"),
}
_SHAPES = {"samples": "a number from 1 on", "extract": "boxed, marked or number", "reward": "math or choice"}
FORM = "[NAME=]FILE[?samples=N&extract=boxed|marked|number&reward=math|choice]"


def named_suites(asked: Iterable[str], where: str) -> list[Suite]:
    """In order. Raises UserError, beginning with ``where``: neither a suite nor a file's, a bad form, a name twice."""
    suites = [SUITES[each] if each in SUITES else _own(each, where) for each in asked]
    seen: set[str] = set()
    for suite in suites:
        if suite.name in seen:
            raise UserError(f"{where}: two suites are called {suite.name!r}; give one another name: NAME=FILE")
        seen.add(suite.name)
    return suites


def _own(asked: str, where: str) -> Suite:
    place, mark, text = asked.partition("?")
    name, equals, path = place.rpartition("=")
    file = Path(os.path.expandvars(path)).expanduser()
    if file.suffix.lower() not in SUFFIXES:
        raise UserError(
            f"{where}: {asked!r} is not one of the suites {', '.join(SUITES)}, nor a file of one's own ({FORM}; "
            f"{', '.join(SUFFIXES)})"
        )
    name = name if equals else file.stem
    if not _NAME.fullmatch(name) or name in _TAKEN:
        why = "is taken" if name in _TAKEN else "has more than letters, digits, dots, dashes and underscores"
        raise UserError(f"{where}: {asked!r}: the name {name!r} {why}; give another: NAME={path}")
    if not file.is_file():
        raise UserError(f"{where}: {asked!r}: there is no file {file}")
    return Suite(name, file=file, **_options(asked, text if mark else None, where))


def _options(asked: str, text: str | None, where: str) -> dict:
    """Fields of the suite that ``text`` sets: ``samples=8&extract=number``."""
    found: dict[str, str] = {}
    for part in [] if text is None else text.split("&"):
        key, equals, value = part.partition("=")
        if not equals or key not in _OPTIONS or key in found:
            raise UserError(f"{where}: {asked!r}: {part!r} is not one of {FORM}, each at most once")
        if not _OPTIONS[key].fullmatch(value):
            raise UserError(f"{where}: {asked!r}: {key} is {value!r}, not {_SHAPES[key]}")
        found[key] = value
    fields = found | ({"samples": int(found["samples"])} if "samples" in found else {})
    return fields | {"given": frozenset(found)}
