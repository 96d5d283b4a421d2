"""``metrics.jsonl``: one strict JSON object per step; every other view of a run derives from it."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from megatron_dypo.errors import UserError
from megatron_dypo.runtime.fs import atomic_write, sync_file


class MetricsFile:
    """Append-only metrics of one run; steps strictly increase, and a written step survives a machine crash.

    A partial line never stays in the file: a line that cannot be written (a full disk) is rolled back, kept in memory,
    and written with the next step that finds room.

    ``resume_step`` is the step of the checkpoint from which training resumes: later lines belong to steps that will run
    again, so the file is truncated to ``step <= resume_step`` (and a line torn by a kill is dropped). 0 is a fresh
    start and empties the file, including its step-0 line (the evaluation before training).

    Raises UserError if the existing lines cannot be read.
    """

    def __init__(self, path: str | Path, resume_step: int) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rows = read_metrics(self.path) if resume_step > 0 and self.path.exists() else []
        kept = [row for row in rows if row["step"] <= resume_step]
        atomic_write(self.path, "".join(_line(row) for row in kept))
        self.last_step: int | None = kept[-1]["step"] if kept else None
        self._file = self.path.open("ab", buffering=0)
        self._whole = self.path.stat().st_size  # bytes of complete lines
        self._waiting: list[str] = []

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append one line and sync it to disk. Non-finite values become null, since JSON has no NaN.

        Training steps count from 1; 0 is the evaluation before training. Raises ValueError if ``step`` does not follow
        the last one, and OSError if the line cannot be written; it is then kept for later.
        """
        if step < 0 or (self.last_step is not None and step <= self.last_step):
            raise ValueError(f"{self.path}: step {step} does not follow step {self.last_step}")
        self._waiting.append(_line({**metrics, "step": step}))
        self.last_step = step
        self.flush()

    def flush(self) -> None:
        """Write the pending lines. Raises OSError if they cannot all be written; then none of them is."""
        if not self._waiting:
            return
        content = "".join(self._waiting).encode()
        try:
            self._file.truncate(self._whole)
            left = memoryview(content)
            while left:
                left = left[self._file.write(left) :]
            sync_file(self._file)
        except OSError as error:
            with suppress(OSError):  # otherwise the next attempt truncates it
                self._file.truncate(self._whole)
            raise OSError(error.errno, error.strerror, str(self.path)) from None
        self._whole += len(content)
        self._waiting = []

    def rows(self) -> list[dict[str, Any]]:
        """Return all lines so far as dicts, pending ones included."""
        return read_metrics(self.path) + [json.loads(line) for line in self._waiting]

    def close(self) -> None:
        """Write pending lines and close. Raises OSError, naming the steps, if lines are lost."""
        try:
            self.flush()
        except OSError as error:
            steps = [json.loads(line)["step"] for line in self._waiting]
            lost = f"{error.strerror}; the metrics of steps {steps[0]} to {steps[-1]} are lost"
            raise OSError(error.errno, lost, str(self.path)) from None
        finally:
            self._file.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Return all lines of ``path`` as dicts, null as None; a torn last line, left by a kill, is skipped.

    Raises UserError, with file and line, for a missing file and for any other line that this module never writes: not
    an object, an unprintable name, a value that is not a finite number, a step that does not follow the last.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"{path}: cannot read the metrics: {error.strerror}") from None
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if _is_row(row) and (not rows or row["step"] > rows[-1]["step"]):
            rows.append(row)
        elif number < len(lines):  # only the last line lacks a newline: empty after a clean write, torn after a kill
            raise UserError(f"{path}: line {number} is not a JSON object with a step after the last and finite numbers")
    return rows


def _is_row(row: Any) -> bool:
    if not isinstance(row, dict) or type(row.get("step")) is not int or not all(map(str.isprintable, row)):
        return False
    return all(
        value is None or (isinstance(value, int | float) and abs(value) <= sys.float_info.max) for value in row.values()
    )


def _line(row: Mapping[str, Any]) -> str:
    ordered = {"step": row["step"], **{name: _plain(value) for name, value in row.items() if name != "step"}}
    return json.dumps(ordered, allow_nan=False) + "\n"


def _plain(value: Any) -> int | float | None:
    """Convert a Python, numpy or zero-dimensional torch number to a JSON number."""
    if value is None or isinstance(value, int):
        return value
    number = float(value)
    return number if math.isfinite(number) else None
