"""Keep in a folder what a run's ids depend on besides its configuration: the day of its start, its tokens and ends.

A template that reads the clock (Llama 3.2's) would write other prompts on another day; here it reads the day the run
started, on every rank and after every resume. A tokenizer whose files have changed since is refused.
"""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Any

from megatron_dypo.data.tokenizer import Tokenizer
from megatron_dypo.errors import UserError
from megatron_dypo.runtime.fs import atomic_write

NAME = "text.json"


def start_day(*folders: Path) -> date | None:
    """Return the start day recorded in the first of ``folders`` that has one; None if none has."""
    for folder in folders:
        if kept := _read(folder):
            return date.fromisoformat(kept["day"])
    return None


def keep(folder: Path, tokenizer: Tokenizer) -> None:
    """Write what ``start_day`` and ``check_kept`` read. Raises OSError (a full disk)."""
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / NAME, json.dumps({"day": tokenizer.day.isoformat()} | _facts(tokenizer), indent=2))


def check_kept(folder: Path, tokenizer: Tokenizer) -> None:
    """Raise UserError naming what differs from the tokenizer that the folder's run began with, if it has one."""
    kept, now = _read(folder), _facts(tokenizer)
    changes = [
        f"{name} (was {kept[name]!r:.60}, now {now[name]!r:.60})" for name in now if kept and kept[name] != now[name]
    ]
    if changes:
        raise UserError(f"{folder}: belongs to a run with another tokenizer; differing: {', '.join(changes)}")


def _facts(tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "end tokens": sorted(tokenizer.end_ids),
        "end of a trace": tokenizer.eos_id,
        "vocabulary": f"{tokenizer.vocabulary:016x}",
        "chat template": tokenizer.template_digest,
    }


def _read(folder: Path) -> dict[str, Any] | None:
    path = folder / NAME
    try:
        kept = json.loads(path.read_bytes())
        date.fromisoformat(kept["day"])
        return {name: kept[name] for name in ("day", "end tokens", "end of a trace", "vocabulary", "chat template")}
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: not the record of a run: {type(error).__name__}: {error}") from None
