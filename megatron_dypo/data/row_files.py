"""Read JSON Lines and Parquet files one row at a time, from any row on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_dypo.errors import UserError

_PARQUET_ROWS = 64  # rows decoded at a time; a row of long traces may take a megabyte


class BadRow(ValueError):
    """A row is not valid JSON, or a field is missing or of the wrong type."""


def filled_lines(path: Path, start: int = 0) -> Iterator[tuple[int, bytes]]:
    """Yield (line number from 1, line) of the non-empty lines after the first ``start`` of them.

    Raises UserError naming the file.
    """
    try:
        with path.open("rb") as lines:
            filled = ((number, line) for number, line in enumerate(lines, start=1) if line.strip())
            yield from islice(filled, start, None)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def parse_line(line: bytes) -> Any:
    """Parse a line as JSON. Raises BadRow."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadRow(f"not valid JSON: {error}") from None


def parquet_rows(path: Path, start: int = 0) -> Iterator[Any]:
    """Yield the rows after the first ``start``; Parquet row groups before them are not decoded.

    Raises UserError naming the file.
    """
    import pyarrow.parquet as parquet

    try:
        with parquet.ParquetFile(path) as file:
            first, groups = start, []
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if groups or first < rows:
                    groups.append(group)
                else:
                    first -= rows
            batches = file.iter_batches(batch_size=_PARQUET_ROWS, row_groups=groups) if groups else ()
            yield from islice((row for batch in batches for row in batch.to_pylist()), first, None)
    except (OSError, ValueError, NotImplementedError) as error:  # Arrow's errors are subclasses of these
        raise UserError(f"{path}: not a readable Parquet file: {error}") from None
