"""Writes ``trace.json``, a Chrome trace of all ranks that ui.perfetto.dev opens (``logging.trace``).

At the end of a step, ranks send their spans to rank 0, which appends them. The file is valid JSON between two appends,
so a kill loses the spans of the step in progress; a resumed run appends. Times are rank 0's wall clock, in
microseconds. The format is Chromium's "Trace Event Format" as an array: X is a span, C a count, M a name.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import statistics
import time
import zlib
from itertools import chain
from pathlib import Path
from typing import Self

from megatron_dypo.config.schema import Config
from megatron_dypo.runtime import trace
from megatron_dypo.runtime.distributed import Layout, all_gather_objects, gather_objects
from megatron_dypo.runtime.trace import Span

log = logging.getLogger(__name__)
MOST_BYTES = 128 * 2**20  # of a file; a full one becomes trace.1.json, in the place of the one before
_ROUNDS = 9  # of comparing clocks
_END = b"\n]\n"
_TAIL = 2**20  # bytes at the end of a torn file in which its last whole event is looked for


class Tracing:
    """Records on every rank inside ``with``, and writes on rank 0; does nothing without ``logging.trace``."""

    def __init__(self, config: Config, layout: Layout):
        self._on, self._layout = config.logging.trace, layout
        self._path = Path(config.trainer.run_dir) / "trace.json"
        self._lanes: set[str] = set()  # that have been named

    def __enter__(self) -> Self:
        if self._on:
            self._recorder, self._shift = trace.start(), _clock_shift(self._layout.rank)
            self._file = TraceFile(self._path) if self._layout.is_main else None
        return self

    def write(self) -> None:
        """Append what all ranks have recorded since the last call. Collective if the trace is on."""
        if self._on:
            parts = gather_objects(self._take())
            if self._file:
                names, events = (list(chain.from_iterable(each)) for each in zip(*parts, strict=True))
                self._file.append(names, events)

    def __exit__(self, *exception: object) -> None:
        """Write the rest of rank 0's own spans: after a failure the other ranks may be gone."""
        if self._on:
            trace.stop()
            if self._file:
                self._file.append(*self._take())

    def _take(self) -> tuple[list[str], list[str]]:
        """Return the lines that name new lanes, and the lines of spans."""
        spans, rank = self._recorder.take(), self._layout.rank
        fresh = sorted({span.lane for span in spans} - self._lanes)
        names = [] if self._lanes or not fresh else _names_of_rank(rank)
        names += [_name(rank, "thread_name", lane_number(lane), name=lane) for lane in fresh]
        self._lanes.update(fresh)
        return names, [event(span, rank, self._shift) for span in spans]


def event(span: Span, rank: int, shift: float) -> str:
    """Return a line of the file. Begin and end are rounded in the same way, so that spans still nest."""
    begin = int((span.began + shift) * 1e6)
    place = {"name": span.name, "cat": span.category, "pid": rank, "tid": lane_number(span.lane), "ts": begin}
    if span.ended is None:
        return json.dumps(place | {"ph": "C", "args": span.details})
    lasted = int((span.ended + shift) * 1e6) - begin
    return json.dumps(place | {"ph": "X", "dur": lasted, "args": span.details})


def lane_number(lane: str) -> int:
    """Return a lane's number, the same in every process that writes to the file."""
    return 0 if lane == "main" else 1 + zlib.crc32(lane.encode()) % (2**31 - 1)


def _names_of_rank(rank: int) -> list[str]:
    named = _name(rank, "process_name", 0, name=f"rank {rank} on {socket.gethostname()}")
    return [named, _name(rank, "process_sort_index", 0, sort_index=rank)]


def _name(rank: int, kind: str, tid: int, **named: object) -> str:
    return json.dumps({"name": kind, "ph": "M", "pid": rank, "tid": tid, "args": named})


def _clock_shift(rank: int) -> float:
    """Return the seconds from this rank's ``time.perf_counter`` to rank 0's wall clock. Collective.

    Processes of one machine share a clock. Ranks of different machines read theirs when a collective ends, which is the
    same moment up to the network's delay; the median of several differences is used.
    """
    machine, differences = _machine(), []
    all_gather_objects(None)
    for _ in range(_ROUNDS):
        readings = all_gather_objects((machine, time.perf_counter(), time.time()))
        differences.append(readings[0][1] - readings[rank][1])
    main, clock, wall = readings[0]
    return wall - clock + (0.0 if machine == main else statistics.median(differences))


def _machine() -> str:
    """Return an id of the running kernel: processes with the same id share ``time.perf_counter``."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


class TraceFile:
    """A JSON array of events, one per line, that grows at its end. Logs a warning if the disk refuses them."""

    def __init__(self, path: Path):
        self._path, self._names = path, dict[str, None]()  # the lines of names so far, for the next file
        self._end = _whole_bytes(path)  # of the last event
        self._failing = False

    def append(self, names: list[str], events: list[str]) -> None:
        """Add the lines, after those of ``names``, which are repeated in a new file."""
        self._names.update(dict.fromkeys(names))
        lines = names + events
        if not lines:
            return
        if self._end + sum(map(len, lines)) > MOST_BYTES:
            self._end, lines = 0, [*self._names, *events]
        content = "".join(",\n" + line for line in lines).encode() + _END
        try:
            if self._end == 0 and self._path.exists():
                self._path.replace(self._path.with_name("trace.1.json"))
            self._write(content if self._end else b"[" + content[1:])
        except OSError as error:
            if not self._failing:
                log.warning("trace not written, training continues: %s", error)
            self._failing = True
        else:
            self._failing = False
            self._end += len(content) - len(_END)

    def _write(self, content: bytes) -> None:
        """Overwrite the array's end with ``content``, or leave the file as it was. Raises OSError."""
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            written = 0
            while written < len(content):
                written += os.pwrite(descriptor, content[written:], self._end + written)
            os.ftruncate(descriptor, self._end + written)
        except OSError:
            if self._end:
                os.pwrite(descriptor, _END, self._end)
            os.ftruncate(descriptor, self._end + len(_END) if self._end else 0)
            raise
        finally:
            os.close(descriptor)


def _whole_bytes(path: Path) -> int:
    """Return the bytes up to the end of the last complete event; 0 if there is none. A kill may have torn the end."""
    if not path.exists():
        return 0
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        start = file.seek(max(0, size - _TAIL))
        tail = file.read()
    if tail.endswith(b"}" + _END):
        return size - len(_END)
    return start + 1 + tail.rfind(b"},\n") if b"},\n" in tail else 0
