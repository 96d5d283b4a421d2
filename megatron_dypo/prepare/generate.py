"""``generate``: prompts of a file to teachers' traces in another, and what became of each teacher."""

from __future__ import annotations

import asyncio
from pathlib import Path

from megatron_dypo.data import rows
from megatron_dypo.errors import UserError
from megatron_dypo.prepare.attempts import AttemptFile
from megatron_dypo.prepare.grading import grader
from megatron_dypo.prepare.teachers import Generation, Tally, first_error, load_teachers

_WIDTH = 120  # of a table in a log


def generate(
    prompts: str, teachers: Path, out: Path, *, attempts: int, extract: str, workers: int, repair_escapes: bool = False
) -> dict[str, Tally]:
    """Ask, verify and record, going on from what ``out`` holds. Raises UserError for input that cannot be used."""
    settings = load_teachers(teachers)
    found = rows.read(prompts, escapes="repair" if repair_escapes else "refuse")
    if not found:
        raise UserError(f"{prompts}: holds no prompt")
    with AttemptFile(out) as file, grader(workers, extract) as grade:
        generation = Generation(found, settings, file, grade, attempts)
        try:
            asyncio.run(generation.run())
        except BaseExceptionGroup as group:  # of tasks: the first is why the others were cancelled
            raise first_error(group) from None
    return generation.tallies


def print_tallies(title: str, tallies: dict[str, Tally]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    names = ("asked", "kept", "wrong", "incomplete", "not gradable", "failed", "prompt tokens", "completion tokens")
    table.add_column("teacher")
    for name in names:
        table.add_column(name, justify="right")
    for teacher, tally in tallies.items():
        verdicts = [tally.verdicts[verdict] for verdict in ("right", "wrong", "incomplete", "unknown")]
        numbers = [tally.asked, *verdicts, tally.failed, tally.prompt_tokens, tally.completion_tokens]
        table.add_row(teacher, *(f"{number:,}" for number in numbers))
    console = Console()
    if not console.is_terminal:
        console.width = _WIDTH
    console.print(table)
