"""Files: names that are safe to join to a folder, and text that is there in full or not at all."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def is_safe_name(name: object) -> bool:
    """Whether ``name`` is a text that stays in its folder: no path, absolute or upwards, and nothing that hides."""
    return isinstance(name, str) and name.isprintable() and "/" not in name and name not in ("", ".", "..")


def atomic_write(path: Path, text: str) -> None:
    """Write ``text`` to ``path``, down to the disk; a kill or a full disk leaves the old file, never half of the new.

    Raises OSError, which names the file, and then nothing else is left behind either.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from None
