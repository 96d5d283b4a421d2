"""What a key of the configuration is declared with.

``key(default, doc)`` declares a key. ``resumable=True`` marks those that may change when a run is resumed (layout,
logging, paths, number of steps, engine, micro-batch budget); all others make up the run's fingerprint. ``path=True``
marks those in which `~` and `$VARIABLE` stand for what they stand for in a shell.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

YEAR = 31_536_000  # seconds; what a deadline may be at most, so that every clock takes it


def key(default: Any = ..., doc: str = "", *, resumable: bool = False, path: bool = False, **bounds: Any) -> Any:
    """Declare a key with its default, documentation and bounds."""
    return Field(default, description=doc, json_schema_extra={"resumable": resumable, "path": path}, **bounds)


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, validate_default=True, allow_inf_nan=False)
