"""Which checkpoints a run folder holds, without importing anything heavy."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

log = logging.getLogger(__name__)


def step_folder(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step}"


def complete_steps(run_dir: Path) -> list[int]:
    """Steps of the complete checkpoints, oldest first: those whose manifest's files are all there in full."""
    folders = (run_dir / "checkpoints").glob("step_*")
    steps = [int(found[1]) for folder in folders if (found := re.fullmatch(r"step_([0-9]+)", folder.name))]
    return sorted(step for step in steps if _is_complete(step_folder(run_dir, step)))


def _is_complete(folder: Path) -> bool:
    try:
        sizes = json.loads((folder / "manifest.json").read_text())
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError) as error:
        log.warning("%s: not a complete checkpoint, left aside (%s)", folder, error)
        return False
