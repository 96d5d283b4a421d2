"""The responses of one suite as they come in: a file that a killed evaluation goes on from.

``SUITE.jsonl`` begins with a line of what was asked of whom; each further line is one response.
"""

from __future__ import annotations

import fcntl
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_dypo.errors import UserError


@dataclass(frozen=True)
class Answer:
    """Response number ``sample`` to a problem; ``fault`` says why nobody could grade it."""

    problem: str
    sample: int
    text: str
    tokens: int
    finish_reason: str
    right: bool
    fault: str | None = None


class AnswerFile:
    """``answers`` holds what is in the file, which ``add`` appends to. Only one process may write it.

    Raises UserError where it does, and where the file is of another evaluation (``about`` differs), or damaged.
    """

    def __init__(self, path: Path, about: dict[str, Any], restart: bool = False):
        self.answers: list[Answer] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{path}: another evaluation is at work with this file") from None
        if restart:
            self._file.truncate(0)
        self._file.seek(0)
        *lines, torn = self._file.read().split(b"\n")
        if torn:  # by a kill in the middle of a line
            self._file.truncate(self._file.tell() - len(torn))
        if not lines:
            self._write([about])
            return
        try:
            before = dict(json.loads(lines[0]))
            self.answers = [Answer(**json.loads(line)) for line in lines[1:]]
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}: holds no evaluation's responses: {error} (--restart removes it)") from None
        if differing := [name for name in about | before if about.get(name) != before.get(name)]:
            changes = ", ".join(f"{name} (was {before.get(name)!r}, now {about.get(name)!r})" for name in differing)
            raise UserError(f"{path}: is of another evaluation: {changes}; --restart removes it, --out names another")

    def add(self, answers: list[Answer]) -> None:
        """Append, down to the disk."""
        self._write([asdict(answer) for answer in answers])
        self.answers += answers

    def _write(self, rows: list[dict]) -> None:
        self._file.write(b"".join(json.dumps(row).encode() + b"\n" for row in rows))
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
