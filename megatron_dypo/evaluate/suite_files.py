"""Find the files of evaluation suites as they circulate, and read their rows.

aime24.jsonl  MATH-500/test.jsonl  gsm8k/main/test-00000-of-00001.parquet  aime2025-I.jsonl + aime2025-II.jsonl
datasets--HuggingFaceH4--aime_2024/snapshots/SHA/data/train-00000-of-00001.parquet
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dypo.data.row_files import parquet_rows
from megatron_dypo.errors import UserError

SUFFIXES = (".json", ".jsonl", ".parquet", ".csv")
_DEEPEST = 5  # levels of folders above a file
_SHARD = re.compile(r"(.*?)[-_.]?(\d+)-?of-?(\d+)", re.IGNORECASE)
_PART = re.compile(r"(.*\d)[-_. ](I{1,3}|IV|part[-_ ]?\d)", re.IGNORECASE)
_WORDS = ("", "test", "problems")  # what may follow a suite's name in a file name


@dataclass(frozen=True)
class SuiteLocation:
    """Where a suite's problems lie: ``stems`` are file or folder names (letters and digits), ``splits`` file names in
    such a folder (the first present counts); ``configuration`` is the preferred folder.
    """

    stems: tuple[str, ...]
    splits: tuple[str, ...] = ("test",)
    configuration: str | None = None


def find(name: str, place: SuiteLocation, folder: Path) -> list[Path]:
    """Return the suite's file in or below the folder, or its parts in order.

    Raises UserError: no such folder, no file of the suite, two of them, or a missing part.
    """
    if not folder.is_dir():
        raise UserError(f"evaluation.data: {folder}: no such folder")
    found: defaultdict[tuple[int, Path, str], list[tuple[Any, Path]]] = defaultdict(list)
    for depth in range(_DEEPEST + 1):
        for path in sorted(folder.glob("/".join(["*"] * depth + ["*.*"]))):
            if path.suffix.lower() not in SUFFIXES or not path.is_file() or _is_output(path, folder):
                continue
            if seen := _read_name(path, folder, place):
                rank, base, part = seen
                found[rank, path.parent, f"{base}{path.suffix}"].append((part, path))
    if not found:
        raise UserError(f"evaluation.data: {folder}: no file of the suite {name} (such as {place.stems[0]}.jsonl)")
    best = min(rank for rank, _, _ in found)
    groups = [sorted(files) for (rank, _, _), files in sorted(found.items()) if rank == best]
    groups = _of_configuration(groups, place)
    if len(groups) > 1:
        (_, one), (_, other) = groups[0][0], groups[1][0]
        raise UserError(f"evaluation.data: {folder}: two files of the suite {name}: {one}, {other}")
    parts = [path for _, path in groups[0]]
    shard = _SHARD.fullmatch(parts[0].stem)
    if shard and len(parts) != int(shard[3]):
        raise UserError(f"evaluation.data: {parts[0].parent}: {len(parts)} of {shard[3]} parts of the suite {name}")
    return parts


def _is_output(path: Path, folder: Path) -> bool:
    """Return whether an evaluation wrote the file: responses are named after their suite, too."""
    parents = itertools.takewhile(lambda parent: parent != folder, path.parents)
    return (path.parent / "results.json").exists() or any((each / "fingerprint.json").exists() for each in parents)


def _of_configuration(groups: list[list[tuple[Any, Path]]], place: SuiteLocation) -> list[list[tuple[Any, Path]]]:
    """Keep the suite's own configuration if its folder holds several."""
    together = Path(os.path.commonpath([path.parent for files in groups for _, path in files]))
    if len(groups) == 1 or place.configuration is None or _folder_name(together.name) not in place.stems:
        return groups
    wanted = _plain(place.configuration)
    return [files for files in groups if wanted in map(_plain, files[0][1].relative_to(together).parts)] or groups


def _read_name(path: Path, folder: Path, place: SuiteLocation) -> tuple[int, str, Any] | None:
    """Return (rank, name without part, part) if the file is the suite's, else None; the lowest rank is preferred."""
    base = path.stem
    part: int | str = 0
    if shard := _SHARD.fullmatch(base):
        base, part = shard[1], int(shard[2])
    elif piece := _PART.fullmatch(base):
        base, part = piece[1], piece[2].upper()
    of_parts = "-" if isinstance(part, str) else ""  # its parts are another copy next to the whole file
    plain = _plain(base)
    if any(plain == stem + word for stem in place.stems for word in _WORDS):
        return 0, plain + of_parts, part
    above = map(_folder_name, (folder.resolve().name, *path.relative_to(folder).parts[:-1]))
    if plain in place.splits and any(name in place.stems for name in above):
        return place.splits.index(plain), plain + of_parts, part
    return None


def _folder_name(name: str) -> str:
    """Return the plain name, without the owner that the hub's cache includes."""
    return _plain(name.rpartition("--")[2])


def _plain(name: str) -> str:
    return re.sub("[^a-z0-9]", "", name.lower())


def read(file: Path) -> list[Any]:
    """Read the rows of a JSON list, JSON Lines, Parquet, or CSV with a header; a byte order mark is allowed.

    Raises UserError naming the file.
    """
    if file.suffix.lower() == ".parquet":
        return list(parquet_rows(file))
    try:
        text = file.read_bytes().decode("utf-8-sig")
        if file.suffix.lower() == ".csv":
            return list(csv.DictReader(io.StringIO(text)))
        lines = [line for line in text.split("\n") if line.strip()]
        if file.suffix.lower() == ".jsonl" or (len(lines) > 1 and _is_whole(lines[0])):
            return [json.loads(line) for line in lines]
        rows = json.loads(text)
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise UserError(f"{file}: cannot be read: {error}") from None
    if not isinstance(rows, list):
        raise UserError(f"{file}: expected a list of problems")
    return rows


def _is_whole(line: str) -> bool:
    """Return whether a line is a JSON object: then the file is JSON Lines, whatever its name."""
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False
