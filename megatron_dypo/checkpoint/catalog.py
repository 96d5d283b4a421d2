"""List a run's checkpoints and verify their files; imports nothing heavy.

``step_N/manifest.json`` is ``{"files": {name: {"bytes": int, "sha256": hex}}}``, written last. A damaged manifest or
file is reported in one line and never raises.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dypo.runtime.fs import is_safe_name

log = logging.getLogger(__name__)
MANIFEST = "manifest.json"
PREFETCHED = "in_flight.jsonl"  # the batch sampled ahead but not trained on yet, if any
SIDE = "side."  # prefix of a second model's tensor names
ALWAYS_THERE = (".metadata", "common.pt", "metadata.json", "state.json")
_STEP = re.compile("step_([1-9][0-9]*)")
_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class File:
    """One file's entry in the manifest."""

    bytes: int
    sha256: str


def step_folder(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step}"


def prefetched_file(folder: Path) -> Path | None:
    """Return the file of the batch sampled ahead when the checkpoint was saved, or None."""
    return folder / PREFETCHED if PREFETCHED in listed_files(folder) else None


def complete_steps(run_dir: Path) -> list[int]:
    """Return the steps of the complete checkpoints, oldest first: every file of the manifest is there in full.

    Reads only the manifests; ``find_fault`` compares contents.
    """
    names = (folder.name for folder in (run_dir / "checkpoints").glob("step_*"))
    steps = sorted(int(found[1]) for name in names if (found := _STEP.fullmatch(name)))
    return [step for step in steps if _is_complete(step_folder(run_dir, step))]


def none_left(run_dir: Path) -> str:
    """Return the message for a run whose checkpoints are all damaged: the user decides whether to overwrite them."""
    return f"{run_dir / 'checkpoints'}: every checkpoint is damaged; remove the folder to start over"


def listed_files(folder: Path) -> list[str]:
    """Return the names of the files in the folder's manifest, sorted; none if the manifest is invalid."""
    files, _ = _read_manifest(folder)
    return sorted(files)


def find_fault(folder: Path, names: Iterable[str] | None = None) -> str | None:
    """Return what is wrong with the manifest or one of these files (default: all of them); None if nothing is.

    Reads every byte of the named files.
    """
    files, fault = _read_manifest(folder)
    if fault:
        return fault
    for name in files if names is None else names:
        if name not in files:
            return f"{folder / MANIFEST}: does not list {name}"
        if fault := _size_fault(folder / name, files[name]) or _checksum_fault(folder / name, files[name]):
            return fault
    return None


def _is_complete(folder: Path) -> bool:
    files, fault = _read_manifest(folder)
    for name, file in files.items():
        fault = fault or _size_fault(folder / name, file)
    if fault:
        log.warning("%s: not a complete checkpoint, ignored", fault)
    return fault is None


def _read_manifest(folder: Path) -> tuple[dict[str, File], str | None]:
    """Return (entries of the manifest, None), or ({}, what is wrong with it)."""
    path = folder / MANIFEST
    try:
        tree = json.loads(path.read_bytes())
    except OSError as error:
        return {}, f"{path}: cannot be read: {error.strerror}"
    except (ValueError, RecursionError) as error:
        return {}, f"{path}: not valid JSON: {error}"
    entries = tree.get("files") if isinstance(tree, dict) else None
    if not isinstance(entries, dict):
        return {}, f"{path}: does not hold a mapping of files"
    files = {}
    for name, entry in entries.items():
        if (file := _file(entry)) is None or not is_safe_name(name):
            return {}, f"{path}: {name!r:.80} is not a file of this folder with bytes and sha256"
        files[name] = file
    if missing := [name for name in ALWAYS_THERE if name not in files]:
        return {}, f"{path}: does not list {missing[0]}"
    return files, None


def _file(entry: Any) -> File | None:
    size, digest = (entry.get("bytes"), entry.get("sha256")) if isinstance(entry, dict) else (None, None)
    if type(size) is not int or size < 0 or not isinstance(digest, str) or not _SHA256.fullmatch(digest):
        return None
    return File(size, digest)


def _size_fault(path: Path, file: File) -> str | None:
    try:
        if not path.is_file():
            return f"{path}: is missing"
        size = path.stat().st_size
    except OSError as error:
        return f"{path}: cannot be read: {error.strerror}"
    return None if size == file.bytes else f"{path}: has {size} bytes instead of {file.bytes}"


def _checksum_fault(path: Path, file: File) -> str | None:
    try:
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        return f"{path}: cannot be read: {error.strerror}"
    return None if digest == file.sha256 else f"{path}: is damaged: its checksum differs from the manifest's"
