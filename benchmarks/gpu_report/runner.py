"""Run stages, each in its own process and with a deadline, and merge their findings after each.

A stage may crash, hang, or leave processes behind without stopping the others; what it found by then is kept. Stopping
the runner (Ctrl-C, SIGTERM) ends the running stage and loses none of the finished ones.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import psutil

from benchmarks.gpu_report.page import page
from benchmarks.gpu_report.results import (
    ABSENT,
    DONE,
    FAILED,
    STARTED,
    Found,
    Report,
    locked,
    merged,
    read,
)
from benchmarks.gpu_report.stages import PARTS, Stage
from benchmarks.machine import ROOT
from megatron_dypo.runtime.fs import atomic_write
from megatron_dypo.runtime.prctl import adopt_orphans

ENVIRONMENT = {
    "PYTHONUNBUFFERED": "1",
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # a stage may fork after it has asked whether there is a device
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",  # as under torchrun
}
LAST_LINES, LONGEST = 40, 300  # what a failed stage says at its end, on the terminal; characters of its last line


@dataclass(frozen=True)
class Machine:
    """The machine; ``gpu``: its name, or CPU; ``gpus``: how many."""

    gpu: str
    gpus: int


def absence(stage: Stage, machine: Machine) -> str | None:
    """Return why a stage cannot run here, or None."""
    missing = [name for name in stage.needs if not _importable(name)]
    if missing:
        return f"{', '.join(missing)} is not installed"
    return f"needs {stage.gpus} GPUs" if stage.gpus > max(1, machine.gpus) else None


def _importable(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # its parent is not there either
        return False


def _descendants() -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True))


def _end(processes: set[psutil.Process]) -> None:
    """End what a stage left behind, servers in their own sessions included: they would keep the GPU's memory."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=10)


@contextmanager
def _adopting_orphans() -> Iterator[None]:
    """Adopt what a stage started as children of this process once the stage is gone."""
    adopt_orphans()
    try:
        yield
    finally:
        adopt_orphans(False)


class Runner:
    """The runner; ``file``: the results, with the page next to it. ``tiny``: a part's stages share a process."""

    def __init__(self, file: Path, machine: Machine, commit: str, tiny: bool):
        self.file, self.machine, self.commit, self.tiny = file, machine, commit, tiny
        self.failed: list[str] = []

    def run(self, stages: list[Stage]) -> int:
        """Run the stages; return 1 if one failed, else 0."""
        with _adopting_orphans():
            for part, seconds in PARTS.items():
                own = [stage for stage in stages if stage.part == part]
                absent = {stage.name: why for stage in own if (why := absence(stage, self.machine))}
                self._keep({name: self._blank(ABSENT, why) for name, why in absent.items()})
                self._part([stage for stage in own if stage.name not in absent], time.monotonic() + seconds)
        return int(bool(self.failed))

    def _part(self, stages: list[Stage], ends: float) -> None:
        groups = [stages] if self.tiny and stages else [[stage] for stage in stages]
        for group in groups:
            left = ends - time.monotonic()
            if left < 1:
                why = "not run: the part's time was over; measure it alone with ONLY"
                self._keep({stage.name: self._blank(FAILED, f"{why}={stage.name}") for stage in group})
                continue
            last = group is groups[-1]  # nothing waits for it: it may take what is left of the part's time
            self._keep(self._measure(group, left if last else min(left, sum(stage.seconds for stage in group))))

    def _measure(self, group: list[Stage], seconds: float) -> dict[str, Found]:
        with tempfile.TemporaryDirectory(prefix="gpu_report_") as folder:
            log, before = Path(folder) / "log", _descendants()
            names = [stage.name for stage in group]
            arguments = [folder, self.commit, "yes" if self.tiny else "no", *names]
            with log.open("wb") as output:
                process = subprocess.Popen(
                    [sys.executable, "-m", "benchmarks.gpu_report.child", *arguments],
                    cwd=ROOT,
                    env=os.environ | ENVIRONMENT,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # Ctrl-C is the runner's alone
                )
                try:
                    process.wait(seconds)
                    ended = f"ended with exit code {process.returncode}"
                except subprocess.TimeoutExpired:
                    ended = f"stopped after {seconds:.0f} s, its deadline"
                finally:
                    process.kill()
                    process.wait()
                    _end(_descendants() - before)
            said = log.read_text(errors="replace").strip().splitlines()[-LAST_LINES:]
            why = ended + (f": {said[-1].strip()[:LONGEST]}" if said else "")
            found = {}
            for name in names:
                file = Path(folder) / f"{name}.json"
                found[name] = json.loads(file.read_text()) if file.exists() else self._blank(FAILED, f"not run: {why}")
                if found[name]["state"] == STARTED:
                    noted = found[name]["says"]
                    found[name] |= {"state": FAILED, "says": f"{noted}; {why}".removeprefix("; ")}
                    print("\n".join(said), file=sys.stderr)
            return found

    def _blank(self, state: str, says: str) -> Found:
        now = time.strftime("%Y-%m-%d %H:%M", time.gmtime())
        empty = {"figures": {}, "tables": [], "notes": []}
        about = {"commit": self.commit, "date": now, "versions": {}, "hardware": self.machine.gpu}
        return {"state": state, "says": says, **about, "seconds": 0.0, **empty}

    def _keep(self, found: dict[str, Found]) -> None:
        """Store the findings in the file and the page, and print one line per stage."""
        if not found:
            return
        with locked(self.file.parent):
            report: Report = merged(read(self.file, self.machine.gpu, measured=not self.tiny), found)
            atomic_write(self.file, json.dumps(report, indent=1) + "\n")
            atomic_write(self.file.with_suffix(".md"), page(report))
        for name, each in found.items():
            print(f"{each['state']:7} {name:18} {each['seconds']:6.1f} s  {each['says']}".rstrip(), flush=True)
            if each["state"] not in (DONE, ABSENT):
                self.failed.append(name)
