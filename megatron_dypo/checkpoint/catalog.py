"""Which checkpoints a run folder holds and whether their files are what was written; imports nothing heavy.

``step_N/manifest.json`` is ``{"files": {name: {"bytes": int, "sha256": hex}}}``, written last. Whatever it holds, and
whatever has become of the files, is told in one line and never raises.
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
PREFETCHED = "in_flight.jsonl"  # the batch that was sampled already, and not trained on yet; where there was one
SIDE = "side."  # before the names of a second model's tensors
ALWAYS_THERE = (".metadata", "common.pt", "metadata.json", "state.json")
_STEP = re.compile("step_([1-9][0-9]*)")
_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class File:
    """What the manifest says of one file."""

    bytes: int
    sha256: str


def step_folder(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step}"


def prefetched_file(folder: Path) -> Path | None:
    """The file of the batch that was sampled ahead when the checkpoint was saved, if there was one."""
    return folder / PREFETCHED if PREFETCHED in listed_files(folder) else None


def complete_steps(run_dir: Path) -> list[int]:
    """Steps of the complete checkpoints, oldest first: those whose manifest's files are all there in full.

    Reads no file but the manifests; ``find_fault`` compares contents.
    """
    names = (folder.name for folder in (run_dir / "checkpoints").glob("step_*"))
    steps = sorted(int(found[1]) for name in names if (found := _STEP.fullmatch(name)))
    return [step for step in steps if _is_complete(step_folder(run_dir, step))]


def none_left(run_dir: Path) -> str:
    """What to say where there are checkpoints and none can be used: to train over them is for the user to decide."""
    return f"{run_dir / 'checkpoints'}: every checkpoint is damaged; remove the folder to start anew"


def listed_files(folder: Path) -> list[str]:
    """Names of the files in the folder's manifest, sorted; none where the manifest is no good."""
    files, _ = _read_manifest(folder)
    return sorted(files)


def find_fault(folder: Path, names: Iterable[str] | None = None) -> str | None:
    """What is wrong with the manifest, or with one of these files (all of them, if None); None where nothing is.

    Every byte of the named files is read.
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
        log.warning("%s: not a complete checkpoint, left aside", fault)
    return fault is None


def _read_manifest(folder: Path) -> tuple[dict[str, File], str | None]:
    """(what the manifest lists, None), or ({}, what is wrong with it)."""
    path = folder / MANIFEST
    try:
        tree = json.loads(path.read_bytes())
    except OSError as error:
        return {}, f"{path}: cannot be read: {error.strerror}"
    except (ValueError, RecursionError) as error:
        return {}, f"{path}: not valid JSON: {error}"
    entries = tree.get("files") if isinstance(tree, dict) else None
    if not isinstance(entries, dict):
        return {}, f"{path}: holds no mapping of files"
    files = {}
    for name, entry in entries.items():
        if (file := _file(entry)) is None or not is_safe_name(name):
            return {}, f"{path}: {name!r:.80} is no file of this folder with bytes and sha256"
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
