"""Answer an evaluation's questions with a rollout engine or an OpenAI-compatible server, and keep the answers on disk.

``SUITE.jsonl`` starts with a line that says what was asked of which model; each further line is one response. A killed
evaluation resumes from it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_dypo.config.schema import Config
from megatron_dypo.data.tokenizer import Tokenizer
from megatron_dypo.dataprep.endpoint import Completion, Endpoint, EndpointFault
from megatron_dypo.errors import UserError
from megatron_dypo.records import Prompt
from megatron_dypo.rollout.engine import Engine, Request, Sampling
from megatron_dypo.runtime.determinism import stable_hash
from megatron_dypo.runtime.fs import sync_file, take_lock


@dataclass(frozen=True)
class Answer:
    """Response number ``sample`` to a problem; ``fault`` says why it could not be graded."""

    problem: str
    sample: int
    text: str
    tokens: int
    finish_reason: str
    right: bool
    fault: str | None = None


class AnswerFile:
    """A file of answers: ``answers`` holds its content, ``add`` appends. Only one process may write it.

    Raises UserError if another process does, if it belongs to another evaluation (``about`` differs), or is damaged.
    """

    def __init__(self, path: Path, about: dict[str, Any], restart: bool = False):
        self.answers: list[Answer] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab+")
        if not take_lock(self._file):
            raise UserError(f"{path}: another evaluation is using this file")
        if restart:
            self._file.truncate(0)
        self._file.seek(0)
        *lines, torn = self._file.read().split(b"\n")
        if torn:  # a kill in the middle of a line
            self._file.truncate(self._file.tell() - len(torn))
        if not lines:
            self._write([about])
            return
        try:
            before = dict(json.loads(lines[0]))
            self.answers = [Answer(**json.loads(line)) for line in lines[1:]]
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}: not the responses of an evaluation: {error} (--restart removes it)") from None
        if differing := [name for name in about | before if about.get(name) != before.get(name)]:
            changes = ", ".join(f"{name} (was {before.get(name)!r}, now {about.get(name)!r})" for name in differing)
            raise UserError(
                f"{path}: belongs to another evaluation: {changes}; --restart discards it, or give another --out"
            )

    def add(self, answers: list[Answer]) -> None:
        """Append the answers and sync them to disk."""
        self._write([asdict(answer) for answer in answers])
        self.answers += answers

    def _write(self, rows: list[dict]) -> None:
        self._file.write(b"".join(json.dumps(row).encode() + b"\n" for row in rows))
        sync_file(self._file)

    def close(self) -> None:
        self._file.close()


@dataclass(frozen=True)
class Question:
    """A request for response number ``sample`` to a problem."""

    prompt: Prompt
    sample: int

    def seed(self, base: int) -> int:
        """Return a hash of (base, problem, sample): neither layout nor order changes what is drawn."""
        return stable_hash(base, "evaluate", self.prompt.id, self.sample)


@dataclass(frozen=True)
class Said:
    """A response; ``tokens`` as counted by what generated it."""

    text: str
    tokens: int
    finish_reason: str


Respond = Callable[[list[Question]], list[Said | EndpointFault]]  # a question without an answer gets a fault instead


def longest_response(config: Config) -> int:
    """Return the longest response, in tokens."""
    return config.evaluation.max_response_tokens or config.rollout.max_response_tokens


def engine_responses(engine: Engine, tokenizer: Tokenizer, config: Config) -> Respond:
    """Return a ``Respond`` that samples with a rollout engine and its current weights."""
    settings = config.evaluation
    greedy = settings.temperature == 0
    sampling = Sampling(settings.temperature or 1.0, settings.top_p, longest_response(config), tokenizer.end_ids)

    def respond(questions: list[Question]) -> list[Said | EndpointFault]:
        requests = [
            Request(tokenizer.encode_prompt(question.prompt), None if greedy else question.seed(settings.seed))
            for question in questions
        ]
        responses = engine.generate(requests, sampling)
        return [Said(tokenizer.decode(one.ids), len(one.ids), one.finish_reason) for one in responses]

    return respond


@dataclass(frozen=True)
class ChatServer:
    """An OpenAI-compatible address; ``url`` is what precedes ``/chat/completions``."""

    url: str
    model: str
    key: str | None
    concurrency: int


def server_responses(server: ChatServer, config: Config) -> Respond:
    """Return a ``Respond`` that asks a server."""
    settings, most = config.evaluation, longest_response(config)

    async def ask(questions: list[Question]) -> list[Completion | EndpointFault]:
        """Return each answer or fault; one request's failure does not affect the others."""
        seconds = config.rollout.request_timeout
        try:
            async with Endpoint(
                server.url, server.model, key=server.key, concurrency=server.concurrency, seconds=seconds
            ) as endpoint:
                asked = (one(endpoint, question) for question in questions)
                return await asyncio.gather(*asked)
        except EndpointFault as fault:  # an address that no request can be made with
            return [fault] * len(questions)

    async def one(endpoint: Endpoint, question: Question) -> Completion | EndpointFault:
        try:
            return await endpoint.ask(
                list(question.prompt.messages),
                temperature=settings.temperature,
                top_p=settings.top_p,
                max_tokens=most,
                extra={"seed": question.seed(settings.seed)},
            )
        except EndpointFault as fault:
            return fault

    def respond(questions: list[Question]) -> list[Said | EndpointFault]:
        return [
            answer
            if isinstance(answer, EndpointFault)
            else Said(answer.trace, answer.completion_tokens or 0, answer.finish_reason)
            for answer in asyncio.run(ask(questions))
        ]

    return respond
