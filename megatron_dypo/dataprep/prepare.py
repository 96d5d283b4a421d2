"""Convert rows of any known layout into training rows; resumes after a kill at any moment.

First all sources are read into the store, a batch of rows at a time; what a batch adds to problems, traces and counts
is committed together with the position reached (``reading.py``). Then the store is written out in order of first
appearance (``writing.py``). The output is thus a function of sources and options alone.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_dypo.dataprep.attempts import grader
from megatron_dypo.dataprep.options import Options
from megatron_dypo.dataprep.reading import Reading
from megatron_dypo.dataprep.sources import find_sources
from megatron_dypo.dataprep.store import Store, remove
from megatron_dypo.dataprep.writing import output_rows, write_rows
from megatron_dypo.errors import UserError
from megatron_dypo.runtime.fs import atomic_write

_SHOWN_OVERLAPS = 100  # overlaps listed in the report
_PROGRESS_SECONDS = 5.0


def prepare(
    options: Options, out: Path, *, workers: int = 1, restart: bool = False, dry_run: int = 0
) -> dict[str, int]:
    """Write ``out`` (.jsonl or .parquet) and ``out``.report.json; return all counts.

    ``dry_run``: only count over the first N rows. ``restart``: discard what a killed run left. Raises UserError for an
    input that cannot be read or understood, and for unfinished work with other options.
    """
    if out.suffix not in (".jsonl", ".parquet"):
        raise UserError(f"--out {out}: expected a name that ends with .jsonl or .parquet")
    if not dry_run:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {out}: {error.strerror}") from None
    sources, evaluation = find_sources(list(options.inputs)), find_sources(list(options.decontaminate))
    work = None if dry_run else out.with_name(f"{out.name}.work")
    if work and restart:
        remove(work)
    settings = options.settings(sources, evaluation, out.suffix)
    with contextlib.ExitStack() as stack:
        store = Store(work, settings)
        stack.callback(store.close)
        grade = None if options.verify == "none" else stack.enter_context(grader(workers, options.extract))
        Reading(options, store, grade, evaluation).read(sources, dry_run, _progress())
        if dry_run:
            written: Counter[str] = Counter()
            for _ in output_rows(store, options, written):
                pass
        else:
            written = write_rows(out, store, options)
        counts = _with_totals(store.counts) | dict(sorted(written.items()))
        if not dry_run:
            report = {"counts": counts, "settings": settings, "overlaps": store.overlaps(_SHOWN_OVERLAPS)}
            atomic_write(out.with_name(f"{out.name}.report.json"), json.dumps(report, indent=2, ensure_ascii=False))
            store.remove()
    return counts


def print_counts(title: str, counts: dict[str, int]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, count in counts.items():
        table.add_row(name, f"{count:,}")
    Console().print(table)


def _with_totals(counts: dict[str, int]) -> dict[str, int]:
    """Return the counts with their totals: what was read is the sum of what became of it."""
    totals = {
        f"{kind} read": sum(count for name, count in counts.items() if name.startswith(f"{kind}: "))
        for kind in ("rows", "traces")
    }
    return totals | dict(sorted(counts.items()))


def _progress() -> Callable[[str], Any]:
    """Return a function that prints a line at intervals."""
    last = time.monotonic()

    def show(line: str) -> None:
        nonlocal last
        if time.monotonic() - last > _PROGRESS_SECONDS:
            last = time.monotonic()
            print(line, file=sys.stderr, flush=True)

    return show
