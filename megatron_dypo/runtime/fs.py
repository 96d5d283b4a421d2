"""Files: names that are safe to join to a folder, contents that are there in full or not at all, and locks.

Imports the standard library alone.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, BinaryIO

_GLANCE = 0.2  # seconds between attempts to take a lock


def is_safe_name(name: object) -> bool:
    """Whether ``name`` is a text that stays in its folder: no path, absolute or upwards, and nothing that hides."""
    return isinstance(name, str) and name.isprintable() and "/" not in name and name not in ("", ".", "..")


def sync_file(file: IO) -> None:
    """Bring what was written to ``file`` down to the disk. Raises OSError."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make the folder's entries, renames included, survive a crash of the machine. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which is on the disk after the block. Raises OSError.

    For a file of a folder that gets its own name when all are there; ``replaced`` is for one that stands alone.
    """
    with path.open("wb") as file:
        yield file
        sync_file(file)


@contextmanager
def replaced(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which takes the place of ``path`` after the block, on the disk.

    Whatever ends the block early (a kill, a full disk) leaves the old file, never half of the new, and nothing
    else but for a kill. Raises OSError, which names ``path``.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with new_file(temporary) as file:
            yield file
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None
    finally:
        with suppress(OSError):
            temporary.unlink()


def atomic_write(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` as ``replaced`` does. Raises OSError."""
    with replaced(path) as file:
        file.write(text.encode())


def take_lock(file: IO | int, patience: float = 0.0) -> bool:
    """Lock an open file against other processes for as long as it stays open.

    False where another one still holds it after ``patience`` seconds. Raises OSError without locks on the disk.
    """
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(_GLANCE)
        else:
            return True
