"""Read rows of local files and of Hugging Face hub data sets, one at a time and from any row on.

train.jsonl   problems.json (a list)   part-0.parquet   folder/ (all of these in it, by name)
hub:open-r1/OpenR1-Math-220k?config=default&split=train&revision=main
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from megatron_dypo.data.row_files import BadRow, filled_lines, parquet_rows, parse_line
from megatron_dypo.errors import UserError

HUB = "hub:"
SUFFIXES = (".jsonl", ".json", ".parquet")
_OPTIONS = ("config", "split", "revision")
_CHUNK = 1 << 20  # characters of a JSON list read at a time
_LONGEST = 1 << 28  # characters of one row of it, at most


@dataclass(frozen=True)
class RowSource:
    """A source; ``name`` as given, or a file of the folder given. ``identity`` changes when the rows do."""

    name: str
    identity: str

    def rows(self, start: int = 0) -> Iterator[tuple[int, Any]]:
        """Yield (row number from 1, row) after the first ``start`` rows. Raises UserError naming file and row."""
        read = _hub_rows if self.name.startswith(HUB) else _READERS[Path(self.name).suffix]
        return enumerate(read(self.name, start), start=start + 1)


def find_sources(names: list[str]) -> list[RowSource]:
    """Return every file that ``names`` mean, in order. Raises UserError if there is none, or its kind is unknown."""
    sources: list[RowSource] = []
    for name in names:
        if name.startswith(HUB):
            sources.append(_hub_source(name))
            continue
        path = Path(name)
        found = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES) if path.is_dir() else [path]
        if not found:
            raise UserError(f"{name}: this folder holds no {', '.join(SUFFIXES)} file")
        sources += map(_file_source, found)
    return sources


def _file_source(path: Path) -> RowSource:
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: expected a file {', '.join(SUFFIXES)}, a folder of them, or {HUB}NAME")
    try:
        status = path.stat()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    return RowSource(str(path), f"{status.st_size} bytes of {status.st_mtime_ns}")


def _json_lines(name: str, start: int) -> Iterator[Any]:
    for number, (_, line) in enumerate(filled_lines(Path(name), start), start + 1):
        try:
            yield parse_line(line)
        except BadRow as error:
            raise UserError(f"{name}: row {number}: {error}") from None


def _json_list(name: str, start: int) -> Iterator[Any]:
    """Yield the elements of a JSON list, one at a time, without holding the file in memory."""
    yield from islice(_elements(name), start, None)


def _elements(name: str) -> Iterator[Any]:
    decoder, text, number, opened = json.JSONDecoder(), "", 0, False
    try:
        with Path(name).open(encoding="utf-8-sig") as file:
            while chunk := file.read(_CHUNK):
                text = (text + chunk).lstrip()
                if not opened and text:
                    if text[0] != "[":
                        raise UserError(f"{name}: expected a list of rows; for one object a line the name is *.jsonl")
                    text, opened = text[1:], True
                while text := text.lstrip(" \t\r\n,"):
                    if text[0] == "]":
                        return
                    try:
                        element, end = decoder.raw_decode(text)
                    except RecursionError as error:
                        raise UserError(f"{name}: row {number + 1}: not valid JSON: {error}") from None
                    except ValueError as error:
                        if len(text) > _LONGEST:
                            raise UserError(f"{name}: row {number + 1}: not valid JSON: {error}") from None
                        break  # the rest of it is in the next chunk, if anywhere
                    text, number = text[end:], number + 1
                    yield element
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not UTF-8: {error}") from None
    except OSError as error:
        raise UserError(f"{name}: cannot be read: {error.strerror}") from None
    raise UserError(f"{name}: row {number + 1}: the list is cut off, or this row is not valid JSON")


def _parquet(name: str, start: int) -> Iterator[Any]:
    return parquet_rows(Path(name), start)


_READERS = {".jsonl": _json_lines, ".json": _json_list, ".parquet": _parquet}


def _hub_options(name: str) -> tuple[str, dict[str, str]]:
    path, _, query = name.removeprefix(HUB).partition("?")
    try:
        options = dict(parse_qsl(query, strict_parsing=bool(query)))
    except ValueError as error:
        raise UserError(f"{name}: {error}") from None
    if not path or set(options) - set(_OPTIONS):
        raise UserError(f"{name}: expected {HUB}NAME?config=...&split=...&revision=...")
    return path, options


def _hub_source(name: str) -> RowSource:
    """Resolve a hub name to an exact revision, so that a resume reads what the first run read."""
    path, options = _hub_options(name)
    _datasets(name)
    if not Path(path).is_dir():  # a folder laid out like a hub data set needs no hub
        from huggingface_hub import HfApi

        try:
            options["revision"] = str(HfApi().dataset_info(path, revision=options.get("revision"), timeout=60).sha)
        except Exception as error:  # whatever the hub's client raises
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"{name}: cannot be had from the hub: {reason}") from None
    exact = "&".join(f"{option}={options[option]}" for option in _OPTIONS if option in options)
    return RowSource(f"{HUB}{path}?{exact}" if exact else f"{HUB}{path}", exact)


def _hub_rows(name: str, start: int) -> Iterator[Any]:
    path, options = _hub_options(name)
    try:
        rows = _datasets(name).load_dataset(
            path,
            options.get("config"),
            split=options.get("split", "train"),
            revision=options.get("revision"),
            streaming=True,
        )
        yield from rows.skip(start)
    except Exception as error:  # whatever the library raises
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{name}: cannot be read from the hub: {reason}") from None


def _datasets(name: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"{name}: data sets of the hub need the library `datasets` (pip install datasets, or the extra [eval])"
        ) from None
    return datasets
