"""Route requests to servers: each to the one with the fewest outstanding tokens, and elsewhere if one fails.

A server is *lost* if it does not answer, if it serves other weights than it was given (it was restarted), and after
several bad answers in a row; its requests go to the others. It may return within the call, with the right weights. A
single bad answer costs that request a try, and the next try goes to another server: a request that no server can handle
is an error that names it, and excludes no server. A request is done once, by the first response that is handled.
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
from megatron_dypo.runtime import trace

log = logging.getLogger(__name__)
STRIKES = 3  # losses in a call after which a server stays out of it
TRIES = 3  # bad answers to one request, or in a row from one server, at most


@dataclass(frozen=True)
class Limits:
    """``window``: concurrent requests per server; deadlines in seconds (``rollout.*_timeout``)."""

    window: int
    server_timeout: float
    request_timeout: float


@dataclass
class _Slot:
    """A server and its sampling tasks by request."""

    server: Server
    lost: str | None = None  # the reason
    strikes: int = 0
    bad_answers: int = 0  # in a row
    tokens: int = 0  # outstanding
    running: dict[int, asyncio.Task] = field(default_factory=dict)
    busy_since: float | None = None

    def trace(self) -> None:
        """Add the number of running requests to the trace, and a span once there are none."""
        trace.count(self.server.lane, requests=len(self.running))
        if self.running and self.busy_since is None:
            self.busy_since = time.perf_counter()
        elif not self.running and self.busy_since is not None:
            trace.add("sampling", "server", self.busy_since, lane=self.server.lane)
            self.busy_since = None


@dataclass(frozen=True)
class _Event:
    """A response or a fault of request ``index``; without an index, a health check's result (None: healthy)."""

    slot: _Slot
    index: int | None
    outcome: Response | ServerFault | None


class Router:
    """Runs one set of requests per ``run``; ``lost``: servers that must not be used, by URL, with the reason."""

    def __init__(self, servers: list[Server], lost: dict[str, str], label: str, limits: Limits):
        self._slots = [_Slot(server, lost.get(server.url), STRIKES * (server.url in lost)) for server in servers]
        self._label, self._limits = label, limits

    async def run(self, requests: list[Request], sampling: Sampling) -> list[Response]:
        """Return the responses in the order of the requests.

        Raises TrainingError if no server is left, or if a request got nothing but bad answers.
        """
        self._requests, self._sampling = requests, sampling
        self._waiting = deque(range(len(requests)))
        self._tried: dict[int, list[_Slot]] = defaultdict(list)  # servers that gave a bad answer, by request
        self._results: dict[int, Response] = {}
        self._events: asyncio.Queue[_Event] = asyncio.Queue()
        self._alive = time.monotonic()  # when a server was last usable
        async with session() as self._http:
            watchers = [asyncio.create_task(self._watch(slot)) for slot in self._slots if slot.strikes < STRIKES]
            try:
                while len(self._results) < len(requests):
                    self._hand_out()
                    await self._step()
            finally:
                tasks = [*watchers, *(task for slot in self._slots for task in slot.running.values())]
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        return [self._results[index] for index in range(len(requests))]

    def _hand_out(self) -> None:
        """Give waiting requests to the servers that have room; retried ones to another server if there is one."""
        usable = [slot for slot in self._slots if slot.lost is None]
        aside = []
        while self._waiting and any(self._has_room(slot) for slot in usable):
            index = self._waiting.popleft()
            fresh = [slot for slot in usable if slot not in self._tried[index]] if index in self._tried else usable
            free = [slot for slot in fresh or usable if self._has_room(slot)]
            if free:
                slot = min(free, key=lambda slot: slot.tokens)
                slot.tokens += self._cost(index)
                slot.running[index] = asyncio.create_task(self._sample(slot, index))
                slot.trace()
            else:
                aside.append(index)
        self._waiting.extendleft(reversed(aside))

    def _has_room(self, slot: _Slot) -> bool:
        return len(slot.running) < self._limits.window

    def _cost(self, index: int) -> int:
        return len(self._requests[index].prompt_ids) + self._sampling.max_tokens

    async def _sample(self, slot: _Slot, index: int) -> None:
        arguments = self._requests[index], self._sampling, self._label, self._limits.request_timeout
        await self._tell(slot, index, slot.server.sample(self._http, *arguments))

    async def _watch(self, slot: _Slot) -> None:
        """Check the server's health, again and again."""

        async def look() -> None:
            label = await slot.server.label(self._http, self._limits.server_timeout)
            if label != self._label:
                other = f"{slot.server.url}: serves the weights {label!r}, not {self._label!r}"
                raise ServerFault(f"{other}: it was restarted, or another run uses it, too")

        while True:
            await asyncio.sleep(min(2.0, self._limits.server_timeout / 4))
            await self._tell(slot, None, look())

    async def _tell(self, slot: _Slot, index: int | None, work) -> None:
        """Put the outcome of ``work`` among the events, also an exception, because the task itself is never awaited."""
        try:
            outcome = await work
        except ServerFault as fault:
            outcome = fault
        except Exception as error:
            outcome = BadAnswer(f"{slot.server.url}: {type(error).__name__}: {error}")
        await self._events.put(_Event(slot, index, outcome))

    async def _step(self) -> None:
        """Wait for the next event, and handle it."""
        if any(slot.lost is None for slot in self._slots):
            self._alive = time.monotonic()
        elif all(slot.strikes >= STRIKES for slot in self._slots) or self._silent():
            reasons = "; ".join(str(slot.lost) for slot in self._slots)
            raise TrainingError(f"no rollout server is left, {len(self._waiting)} responses are missing: {reasons}")
        try:
            event = await asyncio.wait_for(self._events.get(), timeout=1.0)
        except TimeoutError:
            return
        if event.index is None:
            self._take_sign(event.slot, event.outcome)
        elif event.index in event.slot.running:  # otherwise the server was lost meanwhile, and its requests reassigned
            self._take_answer(event.slot, event.index, event.outcome)

    def _silent(self) -> bool:
        return time.monotonic() - self._alive > self._limits.server_timeout

    def _take_sign(self, slot: _Slot, outcome: Response | ServerFault | None) -> None:
        if isinstance(outcome, ServerFault):
            self._lose(slot, str(outcome))
        elif slot.lost is not None and slot.strikes < STRIKES:
            log.warning("%s: is back", slot.server.url)
            slot.lost, slot.bad_answers = None, 0

    def _take_answer(self, slot: _Slot, index: int, outcome: Response | ServerFault | None) -> None:
        if not isinstance(outcome, BadAnswer | Response):
            self._lose(slot, str(outcome))
            return
        del slot.running[index]
        slot.trace()
        slot.tokens -= self._cost(index)
        if isinstance(outcome, Response):
            self._results[index] = outcome
            slot.bad_answers = 0
            return
        log.warning("retrying rollout request %d: %s", index, outcome)
        self._waiting.appendleft(index)
        self._tried[index].append(slot)
        slot.bad_answers += 1
        if len(self._tried[index]) >= TRIES:
            raise TrainingError(f"no server sampled request {index} in {TRIES} tries; the last: {outcome}")
        if slot.bad_answers >= TRIES:
            self._lose(slot, f"{outcome} ({TRIES} bad answers in a row)")

    def _lose(self, slot: _Slot, reason: str) -> None:
        if slot.lost is None:
            slot.strikes += 1
            given_back = sorted(slot.running)
            log.warning("rollout server lost, %d requests reassigned: %s", len(given_back), reason)
            for task in slot.running.values():
                task.cancel()
            slot.running.clear()
            slot.trace()
            slot.tokens = 0
            self._waiting.extendleft(reversed(given_back))
        slot.lost = reason
