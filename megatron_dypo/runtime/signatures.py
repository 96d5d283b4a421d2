"""Ask a function which keywords it takes: torch and vLLM change them between versions that this project supports."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache


def accepted(function: Callable, **keywords: object) -> dict[str, object]:
    """Return those of ``keywords`` that ``function`` takes; all of them where it takes any (``**kwargs``)."""
    known = _keywords(function)
    return keywords if known is None else {name: value for name, value in keywords.items() if name in known}


@cache
def _keywords(function: Callable) -> frozenset[str] | None:
    """Read the names that may be given by keyword, once a function; None stands for any name."""
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return frozenset(parameter.name for parameter in parameters if parameter.kind in by_name)
