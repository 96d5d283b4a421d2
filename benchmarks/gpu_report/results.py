"""What was measured: one JSON file a GPU, to which every stage adds its own part as soon as it has one.

    {"gpu": "NVIDIA H200", "measured": true, "stages": {"head": {"state": "done", "says": "", "commit": "8af92cb",
     "date": "2026-11-30 02:00", "seconds": 61.2, "versions": {...}, "hardware": "...",
     "figures": {"t32768/over_products": {"label": "...", "value": 1.18, "unit": "x"}},
     "tables": [{"title": "...", "header": [...], "rows": [[...]]}], "notes": ["..."]}}}

States: ``done``; ``failed`` (also after its deadline, or where the part's time was over before it began); ``absent``: a
package, or a second GPU, is not there.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_dypo.runtime.fs import atomic_write, take_lock

DONE, FAILED, ABSENT, STARTED = "done", "failed", "absent", "started"
CPU = "CPU"
Report = dict[str, Any]
Found = dict[str, Any]


class Record:
    """A stage's findings, written to a file after every figure, so that a stop loses none of them.

    ``began``: start time, in seconds since the epoch.
    """

    def __init__(self, file: Path, options: dict[str, Any], tiny: bool, began: float, about: dict[str, Any]):
        self.options, self.tiny = options, tiny
        self._file, self._began = file, began
        self._found: Found = {"state": STARTED, "says": "", **about, "figures": {}, "tables": [], "notes": []}
        self._write()

    def figure(self, name: str, value: float | bool | str, unit: str, label: str) -> None:
        """Record a figure; ``unit``: s, ms, GiB, TFLOP/s, x (a ratio), nats, tokens/s; empty for a yes or no."""
        self._found["figures"][name] = {"label": label, "value": value, "unit": unit}
        self._write()

    def table(self, title: str, header: list[str], rows: list[list[str]]) -> None:
        """Record a table; ``header`` gives the units."""
        self._found["tables"].append({"title": title, "header": header, "rows": rows})
        self._write()

    def note(self, text: str) -> None:
        self._found["notes"].append(text)
        self._write()

    def fail(self, why: str) -> None:
        """Mark the stage as failed; it continues."""
        self._found["says"] = f"{self._found['says']}; {why}".removeprefix("; ")
        self._write()

    def finish(self) -> float:
        """Finish the record; return the time."""
        self._found["state"] = FAILED if self._found["says"] else DONE
        self._write()
        return time.time()

    def _write(self) -> None:
        self._found["seconds"] = round(time.time() - self._began, 1)
        atomic_write(self._file, json.dumps(self._found, indent=1))


def report_file(folder: Path, gpu: str) -> Path:
    """Return the file of a GPU's results: NVIDIA H200 is h200."""
    name = re.sub(r"[^a-z0-9.]+", "_", gpu.lower().removeprefix("nvidia ")).strip("_")
    return folder / f"gpu_report_{name}.json"


def read(file: Path, gpu: str, measured: bool = True) -> Report:
    """Read the report, or return an empty one."""
    return json.loads(file.read_text()) if file.exists() else {"gpu": gpu, "measured": measured, "stages": {}}


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock ``folder``, which is created if missing: two parts may run at a time, but only one may write."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        take_lock(descriptor, patience=math.inf)
        yield
    finally:
        os.close(descriptor)


def merged(report: Report, found: dict[str, Found]) -> Report:
    """Return ``report`` with the stages in ``found`` replaced; a stage that cannot run keeps its old figures."""
    stages = dict(report["stages"])
    for name, new in found.items():
        if new["state"] != ABSENT or stages.get(name, new)["state"] == ABSENT:
            stages[name] = new
    return report | {"stages": stages}
