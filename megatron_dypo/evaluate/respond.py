"""Who answers an evaluation's questions: a rollout engine, or whoever is behind an OpenAI-compatible address."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from megatron_dypo.config.schema import Config
from megatron_dypo.data.tokenizer import Tokenizer
from megatron_dypo.prepare.endpoint import Answer, Endpoint, EndpointFault
from megatron_dypo.records import Prompt
from megatron_dypo.rollout.engine import Engine, Request, Sampling
from megatron_dypo.runtime.seeding import stable_hash


@dataclass(frozen=True)
class Question:
    """Ask for response number ``sample`` to a problem."""

    prompt: Prompt
    sample: int

    def seed(self, base: int) -> int:
        """A hash of (base, problem, sample): neither layout nor order changes what is drawn."""
        return stable_hash(base, "evaluate", self.prompt.id, self.sample)


@dataclass(frozen=True)
class Said:
    """What came back: ``tokens`` as whoever generated it counts them."""

    text: str
    tokens: int
    finish_reason: str


Respond = Callable[[list[Question]], list[Said | EndpointFault]]  # a question without an answer has a fault instead


def longest_response(config: Config) -> int:
    """In tokens."""
    return config.evaluation.max_response_tokens or config.rollout.max_response_tokens


def engine_responses(engine: Engine, tokenizer: Tokenizer, config: Config) -> Respond:
    """By a rollout engine with the weights that it has."""
    settings = config.evaluation
    greedy = settings.temperature == 0
    sampling = Sampling(settings.temperature or 1.0, settings.top_p, longest_response(config), tokenizer.end_ids)

    def respond(questions: list[Question]) -> list[Said]:
        requests = [
            Request(tokenizer.encode_prompt(question.prompt), None if greedy else question.seed(settings.seed))
            for question in questions
        ]
        responses = engine.generate(requests, sampling)
        return [Said(tokenizer.decode(one.ids), len(one.ids), one.finish_reason) for one in responses]

    return respond


@dataclass(frozen=True)
class Server:
    """An OpenAI-compatible address: ``url`` is what goes before ``/chat/completions``."""

    url: str
    model: str
    key: str | None
    concurrency: int


def server_responses(server: Server, config: Config) -> Respond:
    """By a server."""
    settings, most = config.evaluation, longest_response(config)

    async def ask(questions: list[Question]) -> list[Answer | EndpointFault]:
        """Each answer that came, whatever became of the others."""
        timeouts = {"concurrency": server.concurrency, "seconds": config.rollout.request_timeout}
        try:
            async with Endpoint(server.url, server.model, key=server.key, **timeouts) as endpoint:
                asked = (one(endpoint, question) for question in questions)
                return await asyncio.gather(*asked)
        except EndpointFault as fault:  # an address that no request could be made with
            return [fault] * len(questions)

    async def one(endpoint: Endpoint, question: Question) -> Answer | EndpointFault:
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
