"""Rank 0's terminal: a live bar for people, about twenty plain lines for logs, and a table at the end."""

from __future__ import annotations

import errno
import math
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any, Self

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress
from rich.table import Table
from rich.text import Text

from megatron_dypo.runtime.console import drop_output

PLAIN_LINES = 20
REGIMES = (("easy", "#35c99b"), ("mid", "#56a8e8"), ("hard", "#ff8a47"))  # the report's colours
REGIME_CELLS = 18
FULL = (errno.ENOSPC, errno.EDQUOT)


class Progress:
    """Progress of ``total_steps`` training steps, of which ``start_step`` were done before a resume.

    A live display on a terminal; elsewhere one plain line every few steps, without control codes. A context manager.
    """

    def __init__(self, total_steps: int, start_step: int = 0, console: Console | None = None) -> None:
        self.console = console or default_console()
        self._total = total_steps
        self._start = start_step
        self._every = max(1, math.ceil((total_steps - start_step) / PLAIN_LINES))
        self._began = time.monotonic()
        self._live = self.console.is_terminal and not self.console.is_dumb_terminal
        self._bar = _Bar(self.console, total_steps, start_step) if self._live else None
        if self._bar:
            self._bar.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def update(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Show ``step`` as done. Missing and null metrics show as ``-``."""
        elapsed = time.monotonic() - self._began
        left = elapsed / max(step - self._start, 1) * (self._total - step)
        if self._bar:
            self._bar.show(step, metrics, left)
        elif step in (self._start + 1, self._total) or step % self._every == 0:
            fields = "  ".join(f"{name} {value}" for name, value in _fields(metrics))
            shares = "/".join(_percent(metrics.get(f"dypo/{name}_frac")) for name, _ in REGIMES)
            times = f"elapsed {_clock(elapsed)}  left {_clock(left)}"
            self.log(f"step {step}/{self._total}  {fields}  easy/mid/hard {shares}  {times}")

    def log(self, line: str) -> None:
        """Print one line, above the bar if there is one."""
        _print(self.console, Text(line))

    def close(self) -> None:
        """Leave the display as it is. May be called twice."""
        if self._bar:
            self._bar.stop()


class _StandardOutput(Console):
    """Continues without output if its reader has gone: rich would end the run."""

    def on_broken_pipe(self) -> None:
        drop_output()


def default_console() -> Console:
    """Return a console on standard output, without control codes off a terminal even if CI sets FORCE_COLOR."""
    return _StandardOutput() if sys.stdout.isatty() else _StandardOutput(force_terminal=False, color_system=None)


def summary(rows: Iterable[tuple[str, str]], title: str, console: Console | None = None) -> None:
    """Print the final table of (name, value); off a terminal as aligned plain lines, never wrapped."""
    console = console or default_console()
    rows = list(rows)
    if console.is_terminal:
        table = Table(title=Text(title, style="bold"), show_header=False, title_justify="left", border_style="dim")
        table.add_column(style="dim", no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in rows:
            table.add_row(Text(name), Text(value))
        _print(console, table)
        return
    width = max((len(name) for name, _ in rows), default=0)
    for line in (title, *(f"  {name:<{width}}  {value}" for name, value in rows)):
        _print(console, Text(line))


def print_table(
    header: Sequence[str], rows: Iterable[Sequence[str]], words: set[str], title: str | None = None
) -> None:
    """Print columns, those in ``words`` left-aligned; off a terminal as aligned plain lines, never wrapped."""
    console, rows = default_console(), list(rows)
    if console.is_terminal:
        table = Table(title=title and Text(title, style="bold"), title_justify="left", border_style="dim")
        for column in header:
            table.add_column(Text(column), justify="left" if column in words else "right")
        for row in rows:
            table.add_row(*map(Text, row))
        _print(console, table)
        return
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (header, *rows)]
    for line in ([title] if title else []) + [f"  {line}".rstrip() for line in lines]:
        _print(console, Text(line))


def _print(console: Console, what: RenderableType) -> None:
    """Print, without wrapping lines. Output to a full disk must not end the run."""
    try:
        console.print(what, soft_wrap=isinstance(what, Text))
    except OSError as error:
        if error.errno not in FULL:
            raise


class _Bar(RichProgress):
    """A bar with times, and the step's metrics below it."""

    def __init__(self, console: Console, total_steps: int, start_step: int) -> None:
        self._metrics: Mapping[str, Any] = {}
        columns = (
            BarColumn(bar_width=None, complete_style="#56a8e8", finished_style="#35c99b"),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("[dim]left[/dim] {task.fields[left]}"),
        )
        super().__init__(*columns, console=console, expand=True, refresh_per_second=4)
        self._task: TaskID = self.add_task("", total=total_steps, completed=start_step, left="-")

    def show(self, step: int, metrics: Mapping[str, Any], left: float) -> None:
        self._metrics = metrics
        self.update(self._task, completed=step, left=_clock(left), refresh=True)

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self._metrics:
            yield self._details()

    def _details(self) -> Text:
        text = Text("  ")
        for name, value in _fields(self._metrics):
            text.append(f"{name} ", style="dim").append(f"{value}   ", style="bold")
        shares = [self._metrics.get(f"dypo/{name}_frac") for name, _ in REGIMES]
        filled = accumulate(0.0 if share is None or math.isnan(share) else share for share in shares)
        ends = [round(REGIME_CELLS * share) for share in filled]
        for (_, colour), begin, end in zip(REGIMES, [0, *ends], ends, strict=False):
            text.append("━" * (end - begin), style=colour)
        for (name, colour), share in zip(REGIMES, shares, strict=True):
            text.append(f" {name} ", style=colour).append(_percent(share))
        return text


def _fields(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        ("reward", _number(metrics.get("reward/mean"), ".3f")),
        ("loss", _number(metrics.get("loss/total"), ".4f")),
        ("tokens/s", _number(metrics.get("perf/tokens_per_second"), ",.0f")),
    ]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None or not math.isfinite(value) else format(value, form)


def _percent(value: float | None) -> str:
    return _number(value, ".0%")


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
