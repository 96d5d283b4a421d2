"""Hold the options that determine the output of ``prepare``, which a resumed run must find unchanged."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

from megatron_dypo.config.schema import Evaluation
from megatron_dypo.dataprep.formats import LAYOUTS
from megatron_dypo.dataprep.sources import RowSource
from megatron_dypo.errors import UserError

INSTRUCTION: str = Evaluation.model_fields["instruction"].default
VERIFY = ("grader", "marks", "none")
COLUMNS = ("prompt", "ground_truth", "trace", "teacher", "id", "source")


@dataclass(frozen=True)
class Options:
    """The options of ``tools/prepare_data.py --help``. None: no limit, or the default that fits the row."""

    inputs: tuple[str, ...]
    layout: str | None = None
    columns: dict[str, str] | None = None
    instruction: str | None = None
    system: str | None = None
    teacher: str | None = None
    traces_per_teacher: int = 1
    verify: str = "grader"
    extract: str = "boxed"
    tokenizer: str | None = None
    max_prompt_tokens: int | None = None
    max_trace_tokens: int | None = None
    decontaminate: tuple[str, ...] = ()
    ngram: int = 8
    overlap_share: float = 0.5
    keep_without_trace: bool = False
    skip_bad_rows: bool = False
    repair_escapes: bool = False

    def __post_init__(self) -> None:
        """Raise UserError for invalid values, and for options that exclude each other."""
        if self.layout is not None and self.layout not in LAYOUTS:
            raise UserError(f"--layout {self.layout}: expected one of {', '.join(LAYOUTS)}")
        if self.columns is not None:
            if self.layout:
                raise UserError("--columns and --layout: give one of them")
            if not {"prompt", "ground_truth"} <= set(self.columns) <= set(COLUMNS):
                raise UserError(
                    f"--columns: expected prompt=..,ground_truth=.. and optionally {', '.join(COLUMNS[2:])}"
                )
        if (self.max_prompt_tokens or self.max_trace_tokens) and not self.tokenizer:
            raise UserError("--max-prompt-tokens and --max-trace-tokens need --tokenizer")
        if self.ngram < 1 or not 0 < self.overlap_share <= 1 or self.traces_per_teacher < 0:
            raise UserError("--ngram must be at least 1, --overlap-share in (0, 1], --traces-per-teacher at least 0")

    @property
    def instruction_text(self) -> str:
        return INSTRUCTION if self.instruction is None else self.instruction

    def settings(self, sources: list[RowSource], evaluation: list[RowSource], suffix: str) -> dict[str, str]:
        """Return everything that the output depends on, under the names that the user knows."""
        fields = dataclasses.asdict(self)
        for name in ("inputs", "decontaminate"):  # the resolved files below say more
            del fields[name]
        for name in ("skip_bad_rows", "repair_escapes"):  # rows already done were not malformed, or were all skipped
            del fields[name]
        settings = {f"--{name.replace('_', '-')}": json.dumps(value) for name, value in fields.items()}
        for kind, found in (("input", sources), ("evaluation file", evaluation)):
            settings[f"number of {kind}s"] = str(len(found))
            settings |= {f"{kind} {i}": f"{source.name}: {source.identity}" for i, source in enumerate(found, start=1)}
        return settings | {"--out format": suffix}
