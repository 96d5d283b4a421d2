"""Write the store's problems as rows of ``data/rows.py``, whole or not at all: the second stage of ``prepare``."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from megatron_dypo.dataprep.options import Options
from megatron_dypo.dataprep.store import Store
from megatron_dypo.errors import UserError
from megatron_dypo.runtime.fs import replaced

_PARQUET_ROWS = 256  # rows in a row group; a row of long traces may take a megabyte


def output_rows(store: Store, options: Options, counts: Counter[str]) -> Iterator[dict[str, Any]]:
    """Yield the rows to write; ``counts`` gets what is dropped, what is written, and traces by teacher."""
    for row, found in store.rows():
        taken: Counter[str] = Counter()
        teachers = []
        for teacher, text in found:
            taken[teacher] += 1
            if options.traces_per_teacher and taken[teacher] > options.traces_per_teacher:
                counts["kept traces beyond the number per teacher"] += 1
                continue
            teachers.append({"name": teacher, "trace": text})
        if not teachers and not options.keep_without_trace:
            counts["problems without a trace, left out"] += 1
            continue
        counts["rows written"] += 1
        for written in teachers:
            counts[f"traces written: {written['name']}"] += 1
        prompt = {"prompt": row["text"] or row["messages"]}
        rest = {name: row[name] for name in ("data_source", "extra_info") if row[name]}
        yield {"id": row["id"]} | prompt | {"ground_truth": row["ground_truth"], "teachers": teachers} | rest


def write_rows(path: Path, store: Store, options: Options) -> Counter[str]:
    """Write ``path`` and sync it to disk; its name appears once it is whole. Return the counts of ``output_rows``."""
    counts: Counter[str] = Counter()
    rows = output_rows(store, options, counts)
    try:
        with replaced(path) as file:
            if path.suffix == ".jsonl":
                file.writelines(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)
            else:
                extra = _extra_type(row["extra_info"] for row, _ in store.rows() if row["extra_info"])
                _write_parquet(file, rows, extra)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None
    return counts


def _write_parquet(file: BinaryIO, rows: Iterator[dict[str, Any]], extra: Any) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    text, message = pa.string(), pa.struct([("role", pa.string()), ("content", pa.string())])
    teacher = pa.struct([("name", text), ("trace", text)])
    first = list(islice(rows, 1))
    plain = bool(first) and isinstance(first[0]["prompt"], str)
    fields = [("id", text), ("prompt", text if plain else pa.list_(message)), ("ground_truth", text)]
    fields += [("teachers", pa.list_(teacher)), ("data_source", text)] + ([("extra_info", extra)] if extra else [])
    with parquet.ParquetWriter(file, schema := pa.schema(fields), compression="zstd") as writer:
        while batch := first + list(islice(rows, _PARQUET_ROWS - len(first))):
            if any(isinstance(row["prompt"], str) != plain for row in batch):
                raise UserError(
                    "--out: Parquet takes chats or plain prompts, not both: write .jsonl, or give --instruction"
                )
            writer.write_table(pa.Table.from_pylist(batch, schema))
            first = []


def _extra_type(values: Iterable[dict[str, Any]]) -> Any:
    """Return the Arrow type that holds all values; None if there are none."""
    try:
        return _unified(values)
    except (ValueError, TypeError) as error:  # Arrow's errors are subclasses of these
        reason = str(error).splitlines()[0]
        raise UserError(f"--out: extra_info does not fit into one Parquet column, write .jsonl: {reason}") from None


def _unified(values: Iterable[dict[str, Any]]) -> Any:
    import pyarrow as pa

    schema = None
    while batch := list(islice(values := iter(values), _PARQUET_ROWS)):
        found = pa.schema([("extra_info", pa.array(batch).type)])
        schema = pa.unify_schemas([schema, found], promote_options="permissive") if schema else found
    return schema.field("extra_info").type if schema else None
