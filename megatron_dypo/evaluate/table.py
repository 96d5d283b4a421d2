"""What an evaluation shows: a line now and then while it runs, and a table of the suites at the end."""

from __future__ import annotations

import time
from typing import Any

from megatron_dypo.monitor.progress import print_table

SECONDS = 10.0  # between two lines


class Progress:
    """Told how many responses there are, of how many; prints a line every few seconds, at the start and at the end."""

    def __init__(self, suite: str, active: bool):
        self._suite, self._active, self._last = suite, active, float("-inf")

    def __call__(self, done: int, total: int) -> None:
        if self._active and (done == total or time.monotonic() - self._last > SECONDS):
            self._last = time.monotonic()
            print(f"{self._suite}: {done}/{total} responses", flush=True)


def rows(results: dict[str, dict[str, Any]]) -> list[tuple[str, ...]]:
    """A row for each suite, the header first; shares in percent with their 95% confidence intervals."""
    found = [("suite", "problems", "samples", "avg@n = pass@1", "pass@n", "tokens", "truncated", "not graded")]
    for name, result in results.items():
        n = result["samples"]
        average, best = (_share(result["figures"][key]) for key in (f"avg@{n}", f"pass@{n}"))
        counts = str(result["problems"]), str(n)
        rest = f"{result['response_tokens']:.0f}", f"{result['truncated_frac']:.1%}", str(result["faults"])
        found.append((name, *counts, average, best if n > 1 else "-", *rest))
    return found


def _share(figure: dict[str, float]) -> str:
    return f"{figure['value']:.1%} [{figure['low']:.1%}, {figure['high']:.1%}]"


def show(results: dict[str, dict[str, Any]], title: str) -> None:
    """Print the table."""
    header, *lines = rows(results)
    print_table(header, lines, {"suite"}, title)
