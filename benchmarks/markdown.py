"""Share what the tables of benchmarks/README.md have in common."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def table(header: list[str], rows: Iterable[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def measured_on(report: dict[str, Any]) -> str:
    """Return a line on hardware, versions and load, from ``machine.environment``."""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return f"{report['hardware']}; {versions}; load average before: {report['load_average_before']:.1f}."
