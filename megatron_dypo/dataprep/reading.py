"""Read every row of the sources into the store, unless a filter drops it: the first stage of ``prepare``.

Each row adds one to exactly one count ``rows: ...`` and each trace to exactly one ``traces: ...``, so the counts of a
report add up to what was read.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

from megatron_dypo.data.row_files import BadRow
from megatron_dypo.data.traces import without_ends
from megatron_dypo.dataprep.attempts import Grader
from megatron_dypo.dataprep.filters import (
    EvaluationProblems,
    TokenCounter,
    fault,
    is_text,
    problem_key,
    without_instruction,
)
from megatron_dypo.dataprep.formats import LAYOUTS, Item, columns, is_proof, layout_of
from megatron_dypo.dataprep.options import Options
from megatron_dypo.dataprep.sources import RowSource
from megatron_dypo.dataprep.store import Store
from megatron_dypo.errors import UserError
from megatron_dypo.escapes import swallowed_in, with_escapes
from megatron_dypo.records import Prompt

_ROWS = 128  # rows per commit and per call of the grader


@dataclass
class _Batch:
    """Work for the grader. ``traces``: (problem, answer to check or "", teacher, text); ``claims``: (answer of a
    known problem, another answer in a later row).
    """

    traces: list[tuple[int, str, str, str]] = field(default_factory=list)
    claims: list[tuple[str, str]] = field(default_factory=list)


class Reading:
    """The reading stage; ``grade`` is None if nothing is to be verified."""

    def __init__(self, options: Options, store: Store, grade: Grader | None, evaluation: list[RowSource]):
        self._options, self._store, self._grade = options, store, grade
        self._evaluation = EvaluationProblems(
            evaluation, options.ngram, options.overlap_share, options.instruction_text
        )
        self._tokens = TokenCounter(options.tokenizer) if options.tokenizer else None

    def read(self, sources: list[RowSource], limit: int, show: Callable[[str], None]) -> None:
        """Read every row after the store's cursor, at most ``limit`` unless that is 0.

        Raises UserError naming file, row and field of a malformed one, unless those are skipped.
        """
        done, row = self._store.cursor
        left = limit or sys.maxsize
        for index, source in enumerate(sources[done:], start=done):
            rows: Iterator[tuple[int, Any]] = islice(source.rows(row), left)
            first = next(rows, None)
            if first is not None:
                # A resumed run decides by the same row as the one before it.
                read = self._layout(source, first[1] if row == 0 else next(source.rows())[1])
                rows = chain([first], rows)
                while batch := list(islice(rows, _ROWS)):
                    self._take(source, read, batch)
                    left -= len(batch)
                    self._store.commit(index, batch[-1][0])
                    show(f"{source.name}: row {batch[-1][0]}")
            row = 0
            self._store.commit(index + 1, 0)

    def _layout(self, source: RowSource, first: Any) -> Callable[[dict], Item]:
        if self._options.columns:
            return columns(self._options.columns)
        try:
            return LAYOUTS[self._options.layout or layout_of(first)][1]
        except BadRow as error:
            raise UserError(f"{source.name}: {error}") from None

    def _take(self, source: RowSource, read: Callable[[dict], Item], rows: list[tuple[int, Any]]) -> None:
        batch = _Batch()
        for number, row in rows:
            place = f"{source.name}:{number}"
            try:
                if not isinstance(row, dict):
                    raise BadRow("expected an object")
                fate = self._screen(place, read(self._with_escapes(row)), batch)
            except BadRow as error:
                if not self._options.skip_bad_rows:
                    raise UserError(f"{place}: {error}") from None
                fate = "malformed"
            self._store.count(f"rows: {fate}")
        self._verify(batch)

    def _with_escapes(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return the row with swallowed backslashes restored, if enabled. Raises BadRow otherwise."""
        if (field := swallowed_in(row)) is None:
            return row
        if not self._options.repair_escapes:
            raise BadRow(f"{field} (--repair-escapes puts the backslash back)")
        self._store.count("swallowed backslashes put back, rows")
        return with_escapes(row)

    def _screen(self, place: str, item: Item, batch: _Batch) -> str:
        """Return what becomes of a row (the name of its count); add its traces to the batch if its problem is kept."""
        options, store = self._options, self._store
        texts = [item.problem, item.answer, item.id, item.source, *(trace.text for trace in item.traces)]
        if not is_text(*texts, *(message["content"] for message in item.messages)):
            raise BadRow("holds half a surrogate pair, which is not text")
        problem = without_instruction(item.problem, options.instruction_text)
        if is_proof(item):
            return "proof, nothing to check"
        if not item.answer:
            return "no answer"
        key = problem_key(problem)
        if known := store.find(key):
            number, answer = known
            if answer != item.answer:
                batch.claims.append((answer, item.answer))
            self._screen_traces(item, number, answer, batch)
            return "problem seen before, traces merged"
        if hit := self._evaluation.hit(problem):
            store.add_overlap(place, {"row": place, "problem": problem, **dataclasses.asdict(hit)})
            return "overlaps with evaluation"
        row = self._row(item, problem)
        prompt = Prompt(place, item.answer, (), messages=tuple(row["messages"]), text=row["text"])
        if self._tokens and options.max_prompt_tokens and self._tokens.prompt(prompt) > options.max_prompt_tokens:
            return "prompt too long"
        self._screen_traces(item, store.add_problem(key, item.id, item.answer, row), item.answer, batch)
        return "new problem"

    def _row(self, item: Item, problem: str) -> dict[str, Any]:
        """Return the output row; its prompt is ``messages`` or ``text``."""
        options = self._options
        row = {"messages": list(item.messages), "text": "", "data_source": item.source, "extra_info": item.extra}
        if item.finished and options.instruction is None and options.system is None:
            return row if item.messages else row | {"text": item.problem}
        own = next((message["content"] for message in item.messages if message["role"] == "system"), "")
        system = own if options.system is None else options.system
        content = "\n\n".join(filter(None, [problem, options.instruction_text]))
        messages = [{"role": "system", "content": system}] if system else []
        return row | {"messages": [*messages, {"role": "user", "content": content}]}

    def _screen_traces(self, item: Item, problem: int, answer: str, batch: _Batch) -> None:
        options = self._options
        for trace in item.traces:
            text = (self._tokens.without_ends if self._tokens else without_ends)(trace.text).strip()
            if not text:
                fate = "empty"
            elif (fate := fault(trace)) is not None:
                pass
            elif self._store.has_trace(problem, text):
                fate = "duplicate"
            elif self._tokens and self._tokens.end_inside(text):
                fate = "end token inside"
            elif self._tokens and options.max_trace_tokens and self._tokens.trace(text) > options.max_trace_tokens:
                fate = "too long"
            elif options.verify == "marks" and trace.mark is False:
                fate = "wrong answer"
            else:
                trusted = options.verify == "none" or (options.verify == "marks" and trace.mark)
                batch.traces.append((problem, "" if trusted else answer, options.teacher or trace.teacher, text))
                continue
            self._store.count(f"traces: {fate}")

    def _verify(self, batch: _Batch) -> None:
        """Grade what must be graded in one call, and store the traces that are right."""
        claims = [(answer, f"\\boxed{{{claim}}}") for answer, claim in batch.claims]
        graded = [(answer, text) for _, answer, _, text in batch.traces if answer] + claims
        if self._grade and graded:
            verdicts = self._grade([answer for answer, _ in graded], [text for _, text in graded])
        else:
            verdicts = [False] * len(graded)  # only claims: their texts differ, and nothing more is known
        rest = iter(verdicts)
        for problem, answer, teacher, text in batch.traces:
            verdict = next(rest) if answer else True
            if verdict is None:
                fate = "answer not gradable"
            elif not verdict:
                fate = "wrong answer"
            else:
                fate = "kept" if self._store.add_trace(problem, teacher, text) else "duplicate"
            self._store.count(f"traces: {fate}")
        if differ := sum(not verdict for verdict in rest):
            self._store.count("ground truths that differ from an earlier row's", differ)
