"""Keep problems, traces, counts and the cursor in a work file next to the output, committed together.

It is SQLite, so that memory does not grow with the data and a kill at any moment leaves the last commit: a row is
counted and stored, or neither, and then read again.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from megatron_dypo.dataprep.filters import digest
from megatron_dypo.errors import UserError

_TABLES = """
CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE problems (id INTEGER PRIMARY KEY, key TEXT UNIQUE NOT NULL, name TEXT UNIQUE NOT NULL,
                       answer TEXT NOT NULL, row TEXT NOT NULL);
CREATE TABLE traces (id INTEGER PRIMARY KEY, problem INTEGER NOT NULL, teacher TEXT NOT NULL, digest TEXT NOT NULL,
                     text TEXT NOT NULL, UNIQUE (problem, digest));
CREATE TABLE counts (name TEXT PRIMARY KEY, value INTEGER NOT NULL);
CREATE TABLE overlaps (place TEXT PRIMARY KEY, hit TEXT NOT NULL);
CREATE TABLE cursor (source INTEGER NOT NULL, row INTEGER NOT NULL);
INSERT INTO cursor VALUES (0, 0);
"""


class Store:
    """The store; ``path``: None for one in memory. ``settings`` identify the work in the file."""

    def __init__(self, path: Path | None, settings: dict[str, str]):
        """Open the file. Raises UserError if it has other settings (naming the first), or a run is using it."""
        self._path = path
        try:
            self._db = sqlite3.connect(str(path or ":memory:"), isolation_level=None, timeout=1.0)
        except sqlite3.Error:
            raise UserError(f"{path}: cannot be opened") from None
        try:
            self._db.execute("PRAGMA locking_mode = EXCLUSIVE")
            self._db.execute("BEGIN EXCLUSIVE")
            if not self._db.execute("SELECT 1 FROM sqlite_master").fetchone():
                for statement in _TABLES.split(";"):
                    self._db.execute(statement)
                self._db.executemany("INSERT INTO settings VALUES (?, ?)", sorted(settings.items()))
            self._db.execute("COMMIT")
            self._db.execute("PRAGMA synchronous = NORMAL")
            self._check(settings)
        except sqlite3.Error as error:
            self.close()
            raise UserError(f"{path}: {_REASONS.get(error.sqlite_errorname, str(error))}") from None
        except UserError:
            self.close()
            raise
        self._db.execute("BEGIN")

    def _check(self, settings: dict[str, str]) -> None:
        stored = dict(self._db.execute("SELECT name, value FROM settings"))
        for name in sorted(stored.keys() | settings.keys()):
            if (old := stored.get(name)) != (new := settings.get(name)):
                raise UserError(
                    f"{self._path}: the unfinished run here has another {name} "
                    f"({_short(old)}, now {_short(new)}): --restart starts over"
                )

    @property
    def cursor(self) -> tuple[int, int]:
        """Return (index of the source being read, its rows done)."""
        return self._db.execute("SELECT source, row FROM cursor").fetchone()

    def commit(self, source: int, row: int) -> None:
        """Commit everything done since the last commit, up to this row."""
        self._db.execute("UPDATE cursor SET source = ?, row = ?", (source, row))
        self._db.execute("COMMIT")
        self._db.execute("BEGIN")

    def count(self, name: str, by: int = 1) -> None:
        self._db.execute(
            "INSERT INTO counts VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = value + ?", (name, by, by)
        )

    @property
    def counts(self) -> dict[str, int]:
        return dict(self._db.execute("SELECT name, value FROM counts"))

    def find(self, key: str) -> tuple[int, str] | None:
        """Return (number, answer) of a known problem, or None."""
        return self._db.execute("SELECT id, answer FROM problems WHERE key = ?", (key,)).fetchone()

    def add_problem(self, key: str, name: str, answer: str, row: dict[str, Any]) -> int:
        """Add a problem and return its number. Its id is ``name``, or its key if that is empty or taken."""
        free = (each for each in (name, key[:16], key) if each and not self._is_taken(each))
        name = next(free)
        return self._db.execute(
            "INSERT INTO problems (key, name, answer, row) VALUES (?, ?, ?, ?)", (key, name, answer, json.dumps(row))
        ).lastrowid

    def _is_taken(self, name: str) -> bool:
        return self._db.execute("SELECT 1 FROM problems WHERE name = ?", (name,)).fetchone() is not None

    def has_trace(self, problem: int, text: str) -> bool:
        found = self._db.execute("SELECT 1 FROM traces WHERE problem = ? AND digest = ?", (problem, digest(text)))
        return found.fetchone() is not None

    def add_trace(self, problem: int, teacher: str, text: str) -> bool:
        """Add a trace; return whether it is new."""
        return bool(
            self._db.execute(
                "INSERT OR IGNORE INTO traces (problem, teacher, digest, text) VALUES (?, ?, ?, ?)",
                (problem, teacher, digest(text), text),
            ).rowcount
        )

    def add_overlap(self, place: str, hit: dict[str, Any]) -> None:
        self._db.execute("INSERT OR IGNORE INTO overlaps VALUES (?, ?)", (place, json.dumps(hit)))

    def overlaps(self, limit: int) -> list[dict[str, Any]]:
        """Return the first ``limit`` overlaps, in order of their rows."""
        found = self._db.execute("SELECT hit FROM overlaps ORDER BY rowid LIMIT ?", (limit,))
        return [json.loads(hit) for (hit,) in found]

    def rows(self) -> Iterator[tuple[dict[str, Any], list[tuple[str, str]]]]:
        """Yield (row with id and answer, its (teacher, trace) pairs), in order of first appearance."""
        for number, name, answer, row in self._db.execute("SELECT id, name, answer, row FROM problems ORDER BY id"):
            traces = self._db.execute("SELECT teacher, text FROM traces WHERE problem = ? ORDER BY id", (number,))
            yield {"id": name, "ground_truth": answer} | json.loads(row), traces.fetchall()

    def close(self) -> None:
        self._db.close()

    def remove(self) -> None:
        """Remove the work file: the work is done."""
        self.close()
        if self._path:
            remove(self._path)


def remove(path: Path) -> None:
    """Remove the work file and SQLite's side files."""
    for name in (path.name, f"{path.name}-journal", f"{path.name}-wal", f"{path.name}-shm"):
        with suppress(FileNotFoundError):
            path.with_name(name).unlink()


_REASONS = {
    "SQLITE_BUSY": "another run is using this file",
    "SQLITE_NOTADB": "is not a work file of this tool: remove it, or give another --out",
}


def _short(value: str | None) -> str:
    text = "none" if value is None else value
    return text if len(text) <= 100 else text[:97] + "..."
