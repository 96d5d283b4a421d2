"""Requests out to servers, each to the one with the fewest outstanding tokens, and again elsewhere where one fails.

A server is *lost* when it does not answer, when it serves other weights than it was given (it was restarted), and after
several bad answers in a row; its requests go to the others. It may return within the call, with the right weights. A
single bad answer costs that request a try, and the next try is another server's: a request that nobody can serve is an
error that names it, and takes no server down. A request counts as done once, by the first response that is handled.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict, deque
from dataclasses import dataclass, field

from megatron_dypo.errors import TrainingError
from megatron_dypo.records import Response
from megatron_dypo.rollout.engine import Request, Sampling
from megatron_dypo.rollout.server import BadAnswer, Server, ServerFault, session

log = logging.getLogger(__name__)
STRIKES = 3  # losses in one call after which a server does not return in it
TRIES = 3  # bad answers to one request, or in a row from one server, before that is the end of it


@dataclass(frozen=True)
class Limits:
    """``window``: requests on one server at a time; deadlines in seconds (``rollout.*_timeout``)."""

    window: int
    server_timeout: float
    request_timeout: float


@dataclass
class _Lane:
    """A server and what it is sampling: task by request."""

    server: Server
    lost: str | None = None  # why
    strikes: int = 0
    bad_answers: int = 0  # in a row
    tokens: int = 0  # outstanding
    running: dict[int, asyncio.Task] = field(default_factory=dict)


@dataclass(frozen=True)
class _Event:
    """A response or a fault of request ``index``; without an index, a sign of life (None) or of its absence."""

    lane: _Lane
    index: int | None
    outcome: Response | ServerFault | None


class Dispatch:
    """One call of ``run`` per set of requests; ``lost``: servers that must not be used, by URL, with the reason."""

    def __init__(self, servers: list[Server], lost: dict[str, str], label: str, limits: Limits):
        self._lanes = [_Lane(server, lost.get(server.url), STRIKES * (server.url in lost)) for server in servers]
        self._label, self._limits = label, limits

    async def run(self, requests: list[Request], sampling: Sampling) -> list[Response]:
        """Responses in the order of the requests.

        Raises TrainingError when no server is left, or when a request got nothing but bad answers.
        """
        self._requests, self._sampling = requests, sampling
        self._waiting = deque(range(len(requests)))
        self._tried: dict[int, list[_Lane]] = defaultdict(list)  # who gave a bad answer to a request
        self._results: dict[int, Response] = {}
        self._events: asyncio.Queue[_Event] = asyncio.Queue()
        self._alive = time.monotonic()  # when a server was last usable
        async with session() as self._http:
            watchers = [asyncio.create_task(self._watch(lane)) for lane in self._lanes if lane.strikes < STRIKES]
            try:
                while len(self._results) < len(requests):
                    self._hand_out()
                    await self._step()
            finally:
                tasks = [*watchers, *(task for lane in self._lanes for task in lane.running.values())]
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        return [self._results[index] for index in range(len(requests))]

    def _hand_out(self) -> None:
        """Give waiting requests to the servers that have room; one that was tried, to another if there is one."""
        usable = [lane for lane in self._lanes if lane.lost is None]
        aside = []
        while self._waiting and any(self._has_room(lane) for lane in usable):
            index = self._waiting.popleft()
            fresh = [lane for lane in usable if lane not in self._tried[index]] if index in self._tried else usable
            free = [lane for lane in fresh or usable if self._has_room(lane)]
            if free:
                lane = min(free, key=lambda lane: lane.tokens)
                lane.tokens += self._cost(index)
                lane.running[index] = asyncio.create_task(self._sample(lane, index))
            else:
                aside.append(index)
        self._waiting.extendleft(reversed(aside))

    def _has_room(self, lane: _Lane) -> bool:
        return len(lane.running) < self._limits.window

    def _cost(self, index: int) -> int:
        return len(self._requests[index].prompt_ids) + self._sampling.max_tokens

    async def _sample(self, lane: _Lane, index: int) -> None:
        arguments = self._requests[index], self._sampling, self._label, self._limits.request_timeout
        await self._tell(lane, index, lane.server.sample(self._http, *arguments))

    async def _watch(self, lane: _Lane) -> None:
        """Ask the server for a sign of life, again and again."""

        async def look() -> None:
            label = await lane.server.label(self._http, self._limits.server_timeout)
            if label != self._label:
                other = f"{lane.server.url}: serves the weights {label!r}, not {self._label!r}"
                raise ServerFault(f"{other}: it was restarted, or another run uses it, too")

        while True:
            await asyncio.sleep(min(2.0, self._limits.server_timeout / 4))
            await self._tell(lane, None, look())

    async def _tell(self, lane: _Lane, index: int | None, work) -> None:
        """Put what became of ``work`` among the events, whatever it was: nobody looks at the task itself."""
        try:
            outcome = await work
        except ServerFault as fault:
            outcome = fault
        except Exception as error:
            outcome = BadAnswer(f"{lane.server.url}: {type(error).__name__}: {error}")
        await self._events.put(_Event(lane, index, outcome))

    async def _step(self) -> None:
        """Wait for the next event, and take note of it."""
        if any(lane.lost is None for lane in self._lanes):
            self._alive = time.monotonic()
        elif all(lane.strikes >= STRIKES for lane in self._lanes) or self._silent():
            reasons = "; ".join(str(lane.lost) for lane in self._lanes)
            raise TrainingError(f"no rollout server is left, {len(self._waiting)} responses are missing: {reasons}")
        try:
            event = await asyncio.wait_for(self._events.get(), timeout=1.0)
        except TimeoutError:
            return
        if event.index is None:
            self._take_sign(event.lane, event.outcome)
        elif event.index in event.lane.running:  # else the lane was lost meanwhile, and the request given away
            self._take_answer(event.lane, event.index, event.outcome)

    def _silent(self) -> bool:
        return time.monotonic() - self._alive > self._limits.server_timeout

    def _take_sign(self, lane: _Lane, outcome: Response | ServerFault | None) -> None:
        if isinstance(outcome, ServerFault):
            self._lose(lane, str(outcome))
        elif lane.lost is not None and lane.strikes < STRIKES:
            log.warning("%s: is back", lane.server.url)
            lane.lost, lane.bad_answers = None, 0

    def _take_answer(self, lane: _Lane, index: int, outcome: Response | ServerFault | None) -> None:
        if not isinstance(outcome, BadAnswer | Response):
            self._lose(lane, str(outcome))
            return
        del lane.running[index]
        lane.tokens -= self._cost(index)
        if isinstance(outcome, Response):
            self._results[index] = outcome
            lane.bad_answers = 0
            return
        log.warning("rollout request %d is tried again: %s", index, outcome)
        self._waiting.appendleft(index)
        self._tried[index].append(lane)
        lane.bad_answers += 1
        if len(self._tried[index]) >= TRIES:
            raise TrainingError(f"no server samples request {index}, tried {TRIES} times; the last: {outcome}")
        if lane.bad_answers >= TRIES:
            self._lose(lane, f"{outcome} ({TRIES} bad answers in a row)")

    def _lose(self, lane: _Lane, reason: str) -> None:
        if lane.lost is None:
            lane.strikes += 1
            given_back = sorted(lane.running)
            log.warning("rollout server lost, %d requests go elsewhere: %s", len(given_back), reason)
            for task in lane.running.values():
                task.cancel()
            lane.running.clear()
            lane.tokens = 0
            self._waiting.extendleft(reversed(given_back))
        lane.lost = reason
