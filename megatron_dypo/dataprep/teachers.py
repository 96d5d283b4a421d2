"""Ask several teachers for traces of every prompt, until one verifies; see tools/generate_teacher_traces.py."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import JsonValue, ValidationError

from megatron_dypo.config.section import YEAR, Section, key
from megatron_dypo.config.yaml_text import parse_yaml
from megatron_dypo.data import rows
from megatron_dypo.dataprep.attempts import AttemptFile, AttemptLine, Grader, Verdict, grader
from megatron_dypo.dataprep.endpoint import Completion, Endpoint, EndpointFault, Refused
from megatron_dypo.dataprep.filters import fault
from megatron_dypo.dataprep.formats import Trace
from megatron_dypo.errors import UserError
from megatron_dypo.records import Prompt

log = logging.getLogger(__name__)
_GIVE_UP = 20  # consecutive failed requests of a teacher, each after all its tries
_PROGRESS_SECONDS = 10.0


class TeacherSampling(Section):
    temperature: float = key(0.6, "Sampling temperature.", ge=0)
    top_p: float = key(0.95, "Nucleus sampling.", gt=0, le=1)
    max_tokens: int = key(8192, "Longest answer, reasoning included.", ge=1)
    extra: dict[str, JsonValue] = key({}, "More fields of the request's body, as the endpoint knows them.")


class TeacherSettings(Section):
    name: str = key(..., "What the traces' teacher is called.", min_length=1)
    url: str = key(..., "What goes before `/chat/completions`, e.g. `https://api.deepseek.com/v1`.")
    model: str = key(..., "The endpoint's name of the model.")
    key_env: str | None = key(None, "Environment variable that holds the API key.")
    sampling: TeacherSampling = key(TeacherSampling(), "How answers are sampled.")
    concurrency: int = key(8, "Requests under way at a time.", ge=1, le=10_000)
    seconds: float = key(1800.0, "Deadline of one request.", gt=0, le=YEAR)
    tries: int = key(8, "Times that a request is made before it counts as failed.", ge=1, le=100)


class Teachers(Section):
    teachers: list[TeacherSettings] = key(..., "The teachers.", min_length=1)


def load_teachers(path: Path) -> list[TeacherSettings]:
    """Load teachers.yaml. Raises UserError naming file and key, but quoting no value: it may be a misplaced secret."""
    try:
        teachers = Teachers.model_validate(parse_yaml(path.read_text(encoding="utf-8"))).teachers
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors()[0]
        unknown = "; keys come from the environment, through key_env" if first["type"] == "extra_forbidden" else ""
        raise UserError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}{unknown}") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None
    for teacher in teachers:
        if [other.name for other in teachers].count(teacher.name) > 1:
            raise UserError(f"{path}: the name {teacher.name!r} occurs twice")
        if teacher.key_env and not os.environ.get(teacher.key_env):
            raise UserError(f"{path}: teacher {teacher.name}: the environment variable {teacher.key_env} is not set")
    return teachers


@dataclass
class Tally:
    """Counts of one teacher, over all runs on the file; ``failed`` and ``stopped`` (why) are this run's."""

    verdicts: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    failed: int = 0
    stopped: str | None = None

    @property
    def asked(self) -> int:
        return sum(self.verdicts.values())

    def count(self, record: dict[str, Any], verdict: Verdict) -> None:
        self.verdicts[verdict] += 1
        self.prompt_tokens += record.get("prompt_tokens") or 0
        self.completion_tokens += record.get("completion_tokens") or 0


class _Judge:
    """The grader for many tasks at once: it takes everything that waits, while the event loop continues."""

    def __init__(self, grade: Grader):
        self._grade = grade
        self._waiting: asyncio.Queue[tuple[str, str, asyncio.Future]] = asyncio.Queue()

    async def verdict(self, truth: str, trace: str) -> Verdict:
        future = asyncio.get_running_loop().create_future()
        self._waiting.put_nowait((truth, trace, future))
        right = await future
        return "unknown" if right is None else "right" if right else "wrong"

    async def work(self) -> None:
        while True:
            batch = [await self._waiting.get()]
            while not self._waiting.empty():
                batch.append(self._waiting.get_nowait())
            truths, traces, futures = map(list, zip(*batch, strict=True))
            for future, right in zip(futures, await asyncio.to_thread(self._grade, truths, traces), strict=True):
                if not future.cancelled():
                    future.set_result(right)


class Generation:
    """All teachers on all prompts; ``tallies`` by teacher."""

    def __init__(
        self, prompts: list[Prompt], teachers: list[TeacherSettings], file: AttemptFile, grade: Grader, attempts: int
    ):
        """Take in what the file holds. Raises UserError if it has other prompts or other settings."""
        self._prompts, self._teachers, self._file, self._attempts = prompts, teachers, file, attempts
        self._judge = _Judge(grade)
        self.tallies = {teacher.name: Tally() for teacher in teachers}
        self._asked: Counter[tuple[str, str]] = Counter()
        self._kept: set[tuple[str, str]] = set()
        self._ungraded: dict[int, AttemptLine] = {}
        self._said = time.monotonic()
        by_id, by_name = {prompt.id: prompt for prompt in prompts}, {teacher.name: teacher for teacher in teachers}
        for line in file.lines():
            self._resume(line, by_id, by_name)

    def _resume(self, line: AttemptLine, prompts: dict[str, Prompt], teachers: dict[str, TeacherSettings]) -> None:
        record = line.record
        teacher, prompt = teachers.get(record["teacher"]), prompts.get(record["id"])
        if teacher and (record["asked_model"], record["sampling"]) != (teacher.model, teacher.sampling.model_dump()):
            raise UserError(
                f"teacher {teacher.name}: --out holds answers of another model or sampling: rename the teacher"
            )
        if prompt and record["prompt"] != _messages(prompt):
            raise UserError(
                f"prompt {prompt.id}: --out holds answers to another prompt with this id: give another --out"
            )
        self._asked[record["teacher"], record["id"]] += 1
        if record["verdict"] is None:
            self._ungraded[line.end] = line
        else:
            self._count(record, record["verdict"])

    def _count(self, record: dict[str, Any], verdict: Verdict) -> None:
        if verdict == "right":
            self._kept.add((record["teacher"], record["id"]))
        self.tallies.setdefault(record["teacher"], Tally()).count(record, verdict)

    async def run(self) -> None:
        """Run until every prompt has a right answer of every teacher or no attempt is left; a refused teacher stops."""
        async with asyncio.TaskGroup() as group:
            judge = group.create_task(self._judge.work())
            await self._grade_rest()  # what a kill left
            await asyncio.gather(*map(self._ask_teacher, self._teachers))
            await self._grade_rest()  # what a stopped teacher left
            judge.cancel()

    async def _grade_rest(self) -> None:
        await asyncio.gather(*map(self._grade, list(self._ungraded.values())))

    async def _ask_teacher(self, teacher: TeacherSettings) -> None:
        todo = iter(
            [
                prompt
                for prompt in self._prompts
                if (teacher.name, prompt.id) not in self._kept and self._asked[teacher.name, prompt.id] < self._attempts
            ]
        )
        secret = os.environ[teacher.key_env] if teacher.key_env else None
        tally, patience = self.tallies[teacher.name], [_GIVE_UP]
        try:
            async with (
                Endpoint(
                    teacher.url,
                    teacher.model,
                    key=secret,
                    concurrency=teacher.concurrency,
                    seconds=teacher.seconds,
                    tries=teacher.tries,
                ) as endpoint,
                asyncio.TaskGroup() as group,
            ):
                for _ in range(teacher.concurrency):
                    group.create_task(self._ask_prompts(teacher, endpoint, todo, patience))
        except* Refused as refused:
            tally.stopped = str(first_error(refused))
            log.error("teacher %s: stopped: %s", teacher.name, tally.stopped)

    async def _ask_prompts(
        self, teacher: TeacherSettings, endpoint: Endpoint, todo: Iterator[Prompt], patience: list[int]
    ) -> None:
        for prompt in todo:
            while self._asked[teacher.name, prompt.id] < self._attempts:
                try:
                    answer = await endpoint.ask(_messages(prompt), **teacher.sampling.model_dump())
                except Refused:
                    raise
                except EndpointFault as fault:
                    self.tallies[teacher.name].failed += 1
                    log.warning("teacher %s, prompt %s: %s", teacher.name, prompt.id, fault)
                    patience[0] -= 1
                    if patience[0] <= 0:
                        raise Refused(f"{_GIVE_UP} requests in a row failed, the last: {fault}") from None
                    break
                patience[0] = _GIVE_UP
                line = self._record(teacher, prompt, answer)
                if await self._grade(line) == "right":
                    break

    def _record(self, teacher: TeacherSettings, prompt: Prompt, answer: Completion) -> AttemptLine:
        self._asked[teacher.name, prompt.id] += 1
        line = self._file.append(
            {
                "id": prompt.id,
                "prompt": _messages(prompt),
                "ground_truth": prompt.ground_truth,
                "data_source": prompt.source,
                "teacher": teacher.name,
                "attempt": self._asked[teacher.name, prompt.id],
                "asked_model": teacher.model,
                "model": answer.model,
                "sampling": teacher.sampling.model_dump(),
                "trace": answer.trace,
                "finish_reason": answer.finish_reason,
                "prompt_tokens": answer.prompt_tokens,
                "completion_tokens": answer.completion_tokens,
            }
        )
        self._ungraded[line.end] = line
        return line

    async def _grade(self, line: AttemptLine) -> Verdict:
        record = line.record
        broken = fault(Trace("", record["trace"], complete=record["finish_reason"] != "length"))
        verdict = "incomplete" if broken else await self._judge.verdict(record["ground_truth"], record["trace"])
        self._file.judge(line, verdict)
        del self._ungraded[line.end]
        self._count(record, verdict)
        if time.monotonic() - self._said > _PROGRESS_SECONDS:
            self._said = time.monotonic()
            state = (f"{name} {tally.verdicts['right']} of {tally.asked}" for name, tally in self.tallies.items())
            log.info("traces kept of those asked for (%d prompts): %s", len(self._prompts), ", ".join(state))
        return verdict


def _messages(prompt: Prompt) -> list[dict[str, str]]:
    return list(prompt.messages) or [{"role": "user", "content": prompt.text}]


def first_error(group: BaseExceptionGroup) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


_WIDTH = 120  # characters of a table in a log


def generate(
    prompts: str, teachers: Path, out: Path, *, attempts: int, extract: str, workers: int, repair_escapes: bool = False
) -> dict[str, Tally]:
    """Ask, verify and record, continuing from what ``out`` holds. Raises UserError for unusable input."""
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
