"""Declare keys of the configuration.

``key(default, doc)`` declares a key. ``resumable=True`` marks keys that may change when a run is resumed (layout,
logging, paths, number of steps, engine, micro-batch budget); the others form the run's fingerprint. ``path=True`` marks
keys in which `~` and `$VARIABLE` are expanded as in a shell.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

YEAR = 31_536_000  # seconds; the largest deadline, which every clock accepts


def key(default: Any = ..., doc: str = "", *, resumable: bool = False, path: bool = False, **bounds: Any) -> Any:
    """Declare a key with its default, documentation and bounds."""
    return Field(default, description=doc, json_schema_extra={"resumable": resumable, "path": path}, **bounds)


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, validate_default=True, allow_inf_nan=False)
