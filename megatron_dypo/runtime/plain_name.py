"""Names of files that are read out of other files."""

from __future__ import annotations

import re


def is_plain(name: object) -> bool:
    """Whether ``name`` is a text that stays in its folder (no path, absolute or upwards) and a file system takes."""
    return isinstance(name, str) and name not in ("", ".", "..") and not re.search("[/\0\ud800-\udfff]", name)
