"""Which checkpoints a run folder holds, without importing anything heavy."""

from __future__ import annotations

import json
from pathlib import Path


def step_folder(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step}"


def complete_steps(run_dir: Path) -> list[int]:
    """Steps of the complete checkpoints, oldest first: those whose manifest's files are all there in full."""
    found = []
    for folder in (run_dir / "checkpoints").glob("step_*"):
        manifest = folder / "manifest.json"
        if manifest.exists():
            sizes = json.loads(manifest.read_text())
            if all((folder / name).exists() and (folder / name).stat().st_size == size for name, size in sizes.items()):
                found.append(int(folder.name.removeprefix("step_")))
    return sorted(found)


def saved_fingerprint(run_dir: Path, step: int) -> dict:
    return json.loads((step_folder(run_dir, step) / "state.json").read_text())["fingerprint"]
