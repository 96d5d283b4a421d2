"""Read JSON Lines and Parquet rows as ``Prompt`` records, in our layout and in that of LUFFY and verl.

ours       prompt (string or chat), ground_truth, teachers [{name, trace}], optional id, data_source
LUFFY/verl prompt (chat), reward_model {ground_truth}, target or target_lst (traces), data_source
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from megatron_dypo.data.row_files import BadRow, filled_lines, parquet_rows, parse_line
from megatron_dypo.errors import UserError
from megatron_dypo.escapes import swallowed_in, with_escapes
from megatron_dypo.records import Prompt, Teacher

log = logging.getLogger(__name__)
_READ = ("prompt", "ground_truth", "reward_model", "teachers", "target", "target_lst")  # fields that hold text
_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can escape half a pair; no tokenizer or file accepts it


Escapes = Literal["refuse", "repair", "keep"]


def read(
    path: str,
    skip_bad_rows: bool = False,
    *,
    escapes: Escapes = "refuse",
    any_truth: bool = False,
    graded: bool = True,
) -> list[Prompt]:
    """Read all rows of a ``.jsonl`` or ``.parquet`` file.

    Raises UserError naming file, line and field of the first malformed row; with ``skip_bad_rows``, such rows are
    skipped and counted in the log. Ids must be unique; the line number names a row without one. ``escapes``: what to do
    with LaTeX commands whose backslash was swallowed. ``any_truth``: ground truths may be lists
    and objects. Without ``graded``, ground truths are not read.
    """
    file = Path(path)
    if not os.path.isfile(path):
        raise UserError(f"data: {path}: no such file")
    prompts, seen, skipped, repairs = [], set(), 0, 0
    for line, row in _raw_rows(file):
        try:
            prompt = read_row(row, line, any_truth, graded)
            if escapes != "keep" and (field := swallowed_in({name: row.get(name) for name in _READ})):
                if escapes == "refuse":
                    raise BadRow(f"{field} (data.repair_escapes: true, or a tool's --repair-escapes, puts it back)")
                prompt, repairs = read_row(with_escapes(row), line, any_truth, graded), repairs + 1
            if prompt.id in seen:
                raise BadRow(f"id: {prompt.id!r} occurs twice")
        except BadRow as error:
            if not skip_bad_rows:
                raise UserError(f"{path}:{line}: {error}") from None
            skipped += 1
            continue
        seen.add(prompt.id)
        prompts.append(prompt)
    if skipped:
        log.warning("%s: %d malformed rows skipped, %d read", path, skipped, len(prompts))
    if repairs:
        log.warning("%s: %d rows with swallowed backslashes repaired, of %d", path, repairs, len(prompts))
    return prompts


def _raw_rows(file: Path) -> Iterator[tuple[int, Any]]:
    """Yield (line number from 1, row); for an unparsable JSON line, the row is the ``BadRow`` to raise."""
    if file.suffix == ".parquet":
        yield from enumerate(parquet_rows(file), start=1)
        return
    for number, line in filled_lines(file):
        try:
            yield number, parse_line(line)
        except BadRow as error:
            yield number, error


def read_row(row: Any, line: int, any_truth: bool = False, graded: bool = True) -> Prompt:
    """Read one row; ``line`` names a row without an id. ``any_truth``, ``graded`` as in ``read``. Raises BadRow."""
    if isinstance(row, BadRow):
        raise row
    if not isinstance(row, dict):
        raise BadRow("expected an object")
    text, messages = _prompt_field(row.get("prompt"))
    truth = _truth(row, any_truth) if graded else ""
    identity = f"row-{line}" if row.get("id") is None else row["id"]
    if not isinstance(identity, (str, int)):
        raise BadRow(f"id: expected a string, got {_short(identity)}")
    teachers = _teachers(row)
    for field, texts in (
        ("id", [str(identity)]),
        ("prompt", [text, *(message["content"] for message in messages)]),
        ("ground_truth", strings(truth)),
        ("teachers", [teacher.trace for teacher in teachers]),
    ):
        if any(map(_SURROGATE.search, texts)):
            raise BadRow(f"{field}: holds half a surrogate pair, which is not text")
    extra = row.get("extra_info")
    if extra is not None and not isinstance(extra, dict):
        raise BadRow(f"extra_info: expected an object, got {_short(extra)}")
    kept = json.dumps(extra, default=str) if extra else ""
    return Prompt(str(identity), truth, teachers, str(row.get("data_source") or ""), messages, text, kept)


def _truth(row: dict, any_truth: bool) -> Any:
    nested = row.get("reward_model")
    truth = row.get("ground_truth")
    if truth is None and isinstance(nested, dict):
        truth = nested.get("ground_truth")
    if isinstance(truth, float) and not math.isfinite(truth):
        raise BadRow(f"ground_truth: expected a finite number, got {truth}")
    if isinstance(truth, (int, float)) and not isinstance(truth, bool):
        truth = str(truth)
    if any_truth and isinstance(truth, (list, dict)) and truth:
        return json.loads(json.dumps(truth, default=str))  # Parquet may hold values that JSON cannot express
    if not isinstance(truth, str) or not truth.strip():
        raise BadRow(f"ground_truth: expected a non-empty string, got {_short(truth)}")
    return truth


def strings(value: Any) -> list[str]:
    """Return every string in a JSON value, field names excepted."""
    if isinstance(value, (list, dict)):
        return [text for each in (value.values() if isinstance(value, dict) else value) for text in strings(each)]
    return [value] if isinstance(value, str) else []


def _prompt_field(value: Any) -> tuple[str, tuple[dict[str, str], ...]]:
    if isinstance(value, str) and value.strip():
        return value, ()
    if not isinstance(value, list) or not value:
        raise BadRow(f"prompt: expected a string or a list of chat messages, got {_short(value)}")
    for message in value:
        if not isinstance(message, dict) or not all(isinstance(message.get(name), str) for name in ("role", "content")):
            raise BadRow(f"prompt: a chat message needs string role and content, got {_short(message)}")
    return "", tuple({"role": message["role"], "content": message["content"]} for message in value)


def _teachers(row: dict) -> tuple[Teacher, ...]:
    entries = row.get("teachers")
    if entries is not None:
        if not isinstance(entries, list):
            raise BadRow(f"teachers: expected a list, got {_short(entries)}")
        for entry in entries:
            if not isinstance(entry, dict) or not all(
                isinstance(entry.get(name), str) and entry[name] for name in ("name", "trace")
            ):
                raise BadRow(f"teachers: an entry needs non-empty string name and trace, got {_short(entry)}")
        return tuple(Teacher(entry["name"], entry["trace"]) for entry in entries)
    targets = row.get("target_lst") or ([row["target"]] if row.get("target") else [])
    if not isinstance(targets, list):
        raise BadRow(f"target_lst: expected a list of targets, got {_short(targets)}")
    return tuple(Teacher(f"target-{i}", _target_text(target)) for i, target in enumerate(targets))


def _target_text(target: Any) -> str:
    """Return the text of a LUFFY target: a string, one chat message, or a list of them (the assistant's turns)."""
    messages = target if isinstance(target, list) else [target]
    texts = [message.get("content") if isinstance(message, dict) else message for message in messages]
    if not texts or not all(isinstance(text, str) and text for text in texts):
        raise BadRow(f"target: expected text or chat messages with content, got {_short(target)}")
    return "\n".join(texts)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
