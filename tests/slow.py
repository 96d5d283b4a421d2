"""Decide which tests are slow from the names in their code: those that start processes, or vLLM.

So no marker can be forgotten. Forked ranks, torchrun and other interpreters import for seconds first. A test that is
slow without them carries ``@pytest.mark.slow``.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterator
from dis import get_instructions
from itertools import chain
from typing import Any

import pytest

STARTERS = {"subprocess", "multiprocessing", "vllm"}  # tests/ranks.py and tests/launch.py use the first two
FOLLOWED = {"tests", "benchmarks"}  # packages whose functions are inspected; of megatron_dypo's a test may use any


def is_slow(item: pytest.Function) -> bool:
    """Return whether the test, its fixtures or parameters, or what these call in ``FOLLOWED``, uses a ``STARTERS``."""
    fixtures = (fixture.func for fixture in chain.from_iterable(item._fixtureinfo.name2fixturedefs.values()))
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    return starts_processes((item.function, *filter(_is_ours, (*fixtures, *parameters))))


@functools.cache
def starts_processes(functions: tuple[Callable, ...]) -> bool:
    waiting: list[Any] = list(functions)
    seen = set()
    while waiting:
        found = waiting.pop()
        if inspect.isclass(found):
            waiting += vars(found).values()
        found = inspect.unwrap(getattr(found, "__func__", found))
        if not inspect.isfunction(found) or found in seen:
            continue
        seen.add(found)
        for value in _named(found.__code__, found.__globals__):
            if _module(value).split(".")[0] in STARTERS:
                return True
            if _is_ours(value):
                waiting.append(value)
    return False


def _named(code: types.CodeType, names: dict[str, Any]) -> Iterator[Any]:
    """Yield what the code uses: globals, attributes of modules in ``FOLLOWED``, and names of imported modules."""
    for step in get_instructions(code):
        if step.opname == "IMPORT_NAME":
            yield step.argval
        elif step.opname == "LOAD_GLOBAL" and step.argval in names:
            value = names[step.argval]
            yield value
            if inspect.ismodule(value) and _is_ours(value):
                yield from (getattr(value, name) for name in code.co_names if hasattr(value, name))
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _named(constant, names)


def _module(value: Any) -> str:
    if isinstance(value, str):
        return value
    return value.__name__ if inspect.ismodule(value) else str(getattr(value, "__module__", None))


def _is_ours(value: Any) -> bool:
    return _module(value).split(".")[0] in FOLLOWED
