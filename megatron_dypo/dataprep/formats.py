r"""Read published layouts of mathematical data sets: one function per layout (``LAYOUTS``), from a row to an ``Item``.

A layout is recognised by its columns; the first in the table whose columns are all present is used.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from megatron_dypo.data.row_files import BadRow
from megatron_dypo.data.rows import read_row
from megatron_dypo.reward import last_boxed

REASONER = "deepseek-r1"  # teacher of the traces in OpenR1-Math and in LUFFY's selection of it
_MARK = re.compile(r"<<(.*?)>>")
_PROOF_ANSWERS = {"proof", "see the proof", "see proof"}
_NO_ANSWERS = {"", "not found", "none", "null", "nan"}


@dataclass(frozen=True)
class Trace:
    """A trace; ``mark``: whether the data set says that its answer is right; None if it does not say."""

    teacher: str
    text: str
    complete: bool = True
    mark: bool | None = None


@dataclass(frozen=True)
class Item:
    """A parsed row. ``messages``: the chat, if the row has one and not just a problem; ``answer``: "" if none.

    ``finished``: use the prompt unchanged.
    """

    problem: str
    answer: str
    traces: tuple[Trace, ...] = ()
    id: str = ""
    source: str = ""
    proof: bool = False
    messages: tuple[dict[str, str], ...] = ()
    finished: bool = False
    extra: dict[str, Any] = field(default_factory=dict)


def openr1(row: dict) -> Item:
    """Read OpenR1-Math-220k: several generations of one teacher, each with the data set's own marks."""
    generations = _list(row, "generations")
    complete, reasons = _list(row, "is_reasoning_complete"), _list(row, "finish_reasons")
    by_rule, by_model = _list(row, "correctness_math_verify"), _list(row, "correctness_llama")
    traces = [
        Trace(
            REASONER,
            text,
            complete=_at(complete, i) is not False and _at(reasons, i) != "length",
            mark=None if (marks := {_at(by_rule, i), _at(by_model, i)} - {None}) == set() else True in marks,
        )
        for i, text in enumerate(generations)
        if isinstance(text, str)
    ]
    return Item(
        _text(row, "problem"),
        _answer(row.get("answer")),
        tuple(traces),
        id=str(row.get("uuid") or ""),
        source=str(row.get("source") or ""),
        proof=row.get("question_type") == "proof" or row.get("problem_type") == "proof",
    )


def luffy(row: dict) -> Item:
    """Read LUFFY's and verl's layout, as ``data/rows.py`` does: a finished prompt, and traces of unnamed teachers."""
    item = rows(row)
    alone = len(item.traces) == 1
    traces = tuple(Trace(REASONER if alone else trace.teacher, trace.text) for trace in item.traces)
    return Item(**{**vars(item), "traces": traces})


def gsm8k(row: dict) -> Item:
    """Read GSM8K: worked text with calculator marks. Two teachers: the text, and the calculator's steps alone.

    The second is dropped if there are no marks, or if the last of them does not give the answer.
    """
    worked, marker, answer = _text(row, "answer").rpartition("####")
    if not marker:
        raise BadRow("answer: expected '#### ' before the final answer")
    answer = answer.strip().replace(",", "")
    boxed = f"\\boxed{{{answer}}}"
    traces = [Trace("solution", f"{_MARK.sub('', worked).strip()}\nThe answer is {boxed}.")]
    steps = [step.strip() for step in _MARK.findall(worked)]
    if steps and _same_number(steps[-1].rpartition("=")[2], answer):
        traces.append(Trace("equations", "\n".join([*steps, boxed])))
    return Item(_text(row, "question"), answer, tuple(traces), source="gsm8k")


def math(row: dict) -> Item:
    """Read MATH and its relatives; the answer is a column, or else the solution's last box (or row of boxes)."""
    solution = _text(row, "solution")
    answer = row.get("answer")
    return Item(
        _text(row, "problem"),
        _answer(answer if answer is not None else last_boxed(solution)),
        (Trace("solution", solution),),
        id=str(row.get("unique_id") or row.get("uuid") or ""),
        source=str(row.get("source") or row.get("data_source") or "math"),
        proof=row.get("question_type") == "proof",
    )


def traces(row: dict) -> Item:
    """Read what tools/generate_teacher_traces.py writes: one attempt per row."""
    item = rows({name: value for name, value in row.items() if name != "teachers"})
    kept = row.get("kept")
    trace = Trace(
        _text(row, "teacher"),
        row["trace"] if isinstance(row.get("trace"), str) else "",
        complete=row.get("finish_reason") != "length",
        mark=kept if isinstance(kept, bool) else None,
    )
    return Item(**{**vars(item), "traces": (trace,)})


def rows(row: dict) -> Item:
    """Read our own layout."""
    truth = row.get("ground_truth", (row.get("reward_model") or {}).get("ground_truth"))
    # Here a missing answer is counted; it does not make the row malformed.
    prompt = read_row({**row, "ground_truth": truth if _answer(truth) else "none"}, 0)
    problem = prompt.text or next((m["content"] for m in reversed(prompt.messages) if m["role"] == "user"), "")
    if not problem.strip():
        raise BadRow("prompt: has no user message")
    return Item(
        problem,
        _answer(truth),
        tuple(Trace(teacher.name, teacher.trace) for teacher in prompt.teachers),
        id="" if row.get("id") is None else prompt.id,
        source=prompt.source,
        messages=prompt.messages,
        finished=True,
        extra=json.loads(prompt.extra) if prompt.extra else {},
    )


def columns(names: dict[str, str]) -> Callable[[dict], Item]:
    """Read any columns: ``prompt``, ``ground_truth``, and optionally ``trace``, ``teacher``, ``id``, ``source``.

    Without a ``teacher`` column, the name of the trace column is the teacher.
    """

    def read(row: dict) -> Item:
        traces: tuple[Trace, ...] = ()
        if "trace" in names and isinstance(text := row.get(names["trace"]), str) and text:
            teacher = row.get(names["teacher"]) if "teacher" in names else names["trace"]
            traces = (Trace(str(teacher), text),)
        item = rows({"prompt": row.get(names["prompt"]), "ground_truth": row.get(names["ground_truth"])})
        optional = {name: str(row[names[name]]) for name in ("id", "source") if row.get(names.get(name)) is not None}
        return Item(**{**vars(item), "traces": traces, "finished": bool(item.messages), **optional})

    return read


LAYOUTS: dict[str, tuple[tuple[str, ...], Callable[[dict], Item]]] = {
    "traces": (("prompt", "teacher", "trace", "kept"), traces),
    "luffy": (("prompt", "reward_model"), luffy),
    "rows": (("prompt", "ground_truth"), rows),
    "openr1": (("problem", "generations"), openr1),
    "math": (("problem", "solution"), math),
    "gsm8k": (("question", "answer"), gsm8k),
}
"""By name: the columns that tell it, and its function, which raises BadRow naming the column at fault."""


def layout_of(row: Any) -> str:
    """Return the name of the first layout whose columns the row has. Raises BadRow if none fits."""
    if isinstance(row, dict):
        for name, (needed, _) in LAYOUTS.items():
            if all(column in row for column in needed):
                return name
    shown = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
    raise BadRow(f"no known layout has these columns ({shown:.200}): name it with --layout, or map them with --columns")


def is_proof(item: Item) -> bool:
    """Return whether the task is to prove something, which leaves no answer to check."""
    return item.proof or item.answer.strip().strip(".").casefold() in _PROOF_ANSWERS


def _answer(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)) or value != value:
        return ""
    text = str(value).strip()
    return "" if text.casefold() in _NO_ANSWERS else text


def _text(row: dict, name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise BadRow(f"{name}: expected a non-empty string, got {value!r:.60}")
    return value


def _list(row: dict, name: str) -> list:
    value = row.get(name)
    if value is not None and not isinstance(value, list):
        raise BadRow(f"{name}: expected a list, got {value!r:.60}")
    return value or []


def _at(values: list, i: int) -> Any:
    return values[i] if i < len(values) else None


def _same_number(left: str, right: str) -> bool:
    try:
        return float(left.replace(",", "")) == float(right)
    except ValueError:
        return False
