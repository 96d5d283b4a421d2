"""The file of teachers' answers: one line an attempt, appended when the answer is there, so that a kill loses none.

The verdict comes a moment later, into the line's own last bytes: they are written as ``null`` and have a fixed width. A
line that a kill left without is graded by the next run.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from megatron_dypo.errors import UserError

Verdict = Literal["right", "wrong", "incomplete", "unknown"]
FIELDS = {"id", "prompt", "ground_truth", "teacher", "asked_model", "sampling", "trace", "finish_reason", "verdict"}
_LONGEST_VERDICT = 12  # characters, quotes included


@dataclass(frozen=True)
class Line:
    """``end``: where in the file the verdict's bytes begin."""

    record: dict[str, Any]
    end: int


class AttemptFile:
    """Held by one process at a time. Context manager."""

    def __init__(self, path: Path):
        """Raises UserError where the file cannot be written, or another run holds it. A torn last line is cut off."""
        self._path = path
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from None
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._fd)
            raise UserError(f"{path}: another run is at work with this file") from None
        self._size = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._fd)

    def lines(self) -> Iterator[Line]:
        """All that is there, to be read once before anything is appended. Raises UserError naming a malformed line."""
        with open(self._fd, "rb", closefd=False) as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    break
                try:
                    record = json.loads(line)
                    if not isinstance(record, dict) or not record.keys() >= FIELDS:
                        raise ValueError(f"expected an object of {', '.join(sorted(FIELDS))}")
                except (ValueError, RecursionError) as error:
                    raise UserError(f"{self._path}:{number}: not what this tool writes: {error}") from None
                self._size += len(line)
                yield Line(record, self._size - len(_tail(None)))
        os.ftruncate(self._fd, self._size)

    def append(self, record: dict[str, Any]) -> Line:
        """A new line without a verdict. Raises UserError where the disk takes no more; the file is then as before."""
        head = json.dumps(record, ensure_ascii=False)[:-1].encode("utf-8", "replace")
        self._write(head + _tail(None), self._size)
        self._size += len(head) + len(_tail(None))
        return Line(record, self._size - len(_tail(None)))

    def judge(self, line: Line, verdict: Verdict) -> None:
        self._write(_tail(verdict), line.end)

    def _write(self, content: bytes, place: int) -> None:
        try:
            while content:
                written = os.pwrite(self._fd, content, place)
                content, place = content[written:], place + written
        except OSError as error:
            os.ftruncate(self._fd, self._size)
            raise UserError(f"{self._path}: cannot be written: {error.strerror}") from None


def _tail(verdict: Verdict | None) -> bytes:
    kept = None if verdict is None else verdict == "right"
    return f', "verdict": {json.dumps(verdict):<{_LONGEST_VERDICT}}, "kept": {json.dumps(kept):<5}}}\n'.encode()
