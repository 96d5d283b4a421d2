"""The files of recorded rollouts: one per step, one JSON line per prompt (docs/data.md). Does not import torch."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from megatron_dypo.errors import UserError

_NAME = re.compile(r"step_(\d+)\.jsonl")
_Parsed = TypeVar("_Parsed")


def step_file(folder: str | Path, step: int) -> Path:
    return Path(folder) / f"step_{step:06d}.jsonl"


def step_files(folder: Path) -> dict[int, Path]:
    """Return the recorded steps of a folder, by number."""
    return {int(match[1]): path for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))}


def require_steps(folder: str | Path, steps: range) -> None:
    """Raise UserError naming the first of ``steps`` that was never recorded in ``folder``."""
    for step in steps:
        if not os.path.isfile(step_file(folder, step)):
            raise UserError(f"rollout.replay: {step_file(folder, step)}: no recorded step {step}")


def read_lines(path: Path, parse: Callable[[Any], _Parsed]) -> Iterator[tuple[int, _Parsed]]:
    """Yield (line number from 1, ``parse`` of its JSON), one line at a time, since a step may be gigabytes.

    Raises UserError naming file and line if a line is not JSON, or ``parse`` rejects it as a value of that kind.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    parsed = parse(json.loads(line))
                except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
                    raise UserError(f"{path}:{number}: not a recorded rollout: {error}") from None
                yield number, parsed
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def token_ids(values: Any, vocab_size: int = 2**31) -> list[int]:
    """Return ``values``, a list from JSON. Raises ValueError if one is not a whole number below ``vocab_size``."""
    for value in values:
        if type(value) is not int or not 0 <= value < vocab_size:
            raise ValueError(f"{value!r} is not a token id of a vocabulary of {vocab_size}")
    return values
