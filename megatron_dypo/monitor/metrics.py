"""``metrics.jsonl``: one strict JSON object a step; the record that every other view of a run is made from."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_dypo.errors import UserError


class MetricsFile:
    """Append-only metrics of one run; steps strictly increase, and a written step survives the machine going down.

    ``resume_step`` is the step of the checkpoint that training goes on from: later lines belong to steps that will be
    run again, so the file is cut back to ``step <= resume_step`` (and a line torn by a kill is dropped). 0 is a fresh
    start and empties the file, its step-0 line (the evaluation before training) included.

    Raises UserError if the lines already there cannot be read.
    """

    def __init__(self, path: str | Path, resume_step: int) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rows = read_metrics(self.path) if resume_step > 0 and self.path.exists() else []
        kept = [row for row in rows if row["step"] <= resume_step]
        _replace(self.path, "".join(_line(row) for row in kept))
        self.last_step: int | None = kept[-1]["step"] if kept else None
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append one line and sync it to disk. A value that is not finite becomes null, since JSON has no NaN.

        Training steps count from 1; 0 is for the evaluation before training. Raises ValueError if ``step`` does not
        follow the last one.
        """
        if step < 0 or (self.last_step is not None and step <= self.last_step):
            raise ValueError(f"{self.path}: step {step} does not follow step {self.last_step}")
        self._file.write(_line({**metrics, "step": step}))
        self._file.flush()
        os.fsync(self._file.fileno())
        self.last_step = step

    def close(self) -> None:
        self._file.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """All lines of ``path`` as dicts, null as None. A torn last line, which a kill leaves behind, is left out.

    Raises UserError, with file and line, for a missing file and for any other line that is not an object with a step.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"{path}: cannot read the metrics: {error.strerror}") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            rows.append({**row, "step": int(row["step"])})
        except (ValueError, TypeError, KeyError):
            # Only the last line lacks its line end: empty after a clean write, torn after a kill.
            if number < len(lines):
                raise UserError(f"{path}: line {number} is not a JSON object with a step") from None
    return rows


def _line(row: Mapping[str, Any]) -> str:
    ordered = {"step": row["step"], **{name: _plain(value) for name, value in row.items() if name != "step"}}
    return json.dumps(ordered, allow_nan=False) + "\n"


def _plain(value: Any) -> int | float | None:
    """A JSON number of a Python, numpy or zero-dimensional torch number."""
    if value is None or isinstance(value, int):
        return value
    number = float(value)
    return number if math.isfinite(number) else None


def _replace(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` so that a kill leaves the old file or the new one, never half of it."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
