"""File helpers: names that are safe to join to a folder, atomic writes, and locks.

Imports only the standard library.
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
    """Return whether ``name`` is a plain file name: printable, no path, and neither ``.`` nor ``..``."""
    return isinstance(name, str) and name.isprintable() and "/" not in name and name not in ("", ".", "..")


def sync_file(file: IO) -> None:
    """Flush what was written to ``file`` to the disk. Raises OSError."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make the folder's entries, renames included, survive a machine crash. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that is on the disk after the block. Raises OSError.

    For a file inside a folder that is renamed once complete; use ``replaced`` for a file that stands alone.
    """
    with path.open("wb") as file:
        yield file
        sync_file(file)


@contextmanager
def replaced(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that replaces ``path`` after the block, on the disk.

    If the block ends early (a kill, a full disk), the old file stays, and no partial new one; only a kill leaves a
    temporary file. Raises OSError, which names ``path``.
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
    """Write ``text`` to ``path`` atomically (see ``replaced``). Raises OSError."""
    with replaced(path) as file:
        file.write(text.encode())


def take_lock(file: IO | int, patience: float = 0.0) -> bool:
    """Lock an open file against other processes for as long as it stays open.

    Returns False if another process still holds it after ``patience`` seconds. Raises OSError if the disk has no locks.
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
