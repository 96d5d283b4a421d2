"""Keep teachers' answers in a file: one line per attempt, appended on arrival, so that a kill loses none.

The verdict (whether training would reward the trace's answer) follows a moment later in the last bytes of the line,
which have a fixed width and are first written as ``null``. The next run grades a line that a kill left without one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, Self

from megatron_dypo.config.schema import Reward
from megatron_dypo.errors import UserError
from megatron_dypo.records import Prompt
from megatron_dypo.runtime.fs import take_lock


class Grader(Protocol):
    def __call__(self, answers: list[str], texts: list[str]) -> list[bool | None]:
        """Return for each text whether its answer is right; None if that could not be determined (a timeout, say)."""


@contextmanager
def grader(workers: int, extract: str) -> Iterator[Grader]:
    """Start a grader; ``extract`` as the key ``reward.extract``."""
    from megatron_dypo.reward import build_reward

    with build_reward(Reward(workers=workers, extract=extract)) as reward:

        def grade(answers: list[str], texts: list[str]) -> list[bool | None]:
            prompts = [Prompt(f"trace {i + 1} of a batch", answer, ()) for i, answer in enumerate(answers)]
            return [None if score.fault else score.value > 0.5 for score in reward(prompts, texts)]

        yield grade


Verdict = Literal["right", "wrong", "incomplete", "unknown"]
FIELDS = {"id", "prompt", "ground_truth", "teacher", "asked_model", "sampling", "trace", "finish_reason", "verdict"}
_LONGEST_VERDICT = 12  # characters, quotes included


@dataclass(frozen=True)
class AttemptLine:
    """One line; ``end`` is the offset of the verdict's bytes in the file."""

    record: dict[str, Any]
    end: int


class AttemptFile:
    """The file of attempts, held by one process at a time. A context manager."""

    def __init__(self, path: Path):
        """Open the file; cut off a torn last line. Raises UserError if it is not writable, or another run holds it."""
        self._path = path
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from None
        if not take_lock(self._fd):
            os.close(self._fd)
            raise UserError(f"{path}: another run is using this file")
        self._size = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._fd)

    def lines(self) -> Iterator[AttemptLine]:
        """Yield all lines present; read them once, before appending. Raises UserError naming a malformed line."""
        with open(self._fd, "rb", closefd=False) as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    break
                try:
                    record = json.loads(line)
                    if not isinstance(record, dict) or not record.keys() >= FIELDS:
                        raise ValueError(f"expected an object of {', '.join(sorted(FIELDS))}")
                except (ValueError, RecursionError) as error:
                    raise UserError(f"{self._path}:{number}: not a record of this tool: {error}") from None
                self._size += len(line)
                yield AttemptLine(record, self._size - len(_tail(None)))
        os.ftruncate(self._fd, self._size)

    def append(self, record: dict[str, Any]) -> AttemptLine:
        """Append a line without a verdict. Raises UserError if the disk is full; the file is then unchanged."""
        head = json.dumps(record, ensure_ascii=False)[:-1].encode("utf-8", "replace")
        self._write(head + _tail(None), self._size)
        self._size += len(head) + len(_tail(None))
        return AttemptLine(record, self._size - len(_tail(None)))

    def judge(self, line: AttemptLine, verdict: Verdict) -> None:
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
