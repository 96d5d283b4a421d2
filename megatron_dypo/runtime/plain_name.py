"""Names of files that are read out of other files."""

from __future__ import annotations


def is_plain(name: object) -> bool:
    """Whether ``name`` is a text that stays in its folder: no path, absolute or upwards, and nothing that hides."""
    return isinstance(name, str) and name.isprintable() and "/" not in name and name not in ("", ".", "..")
