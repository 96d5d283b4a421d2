"""Requests out to servers, each to the one with the fewest outstanding tokens, and again elsewhere when one is lost.

A server is lost when a request to it fails, when it stops answering, and when it serves other weights than it was
given (it was restarted). It may return within the call, with the right weights; what it was asked for goes to others
meanwhile. A request counts as done once, by the first response that is handled.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from dataclasses import dataclass, field

from megatron_dypo.errors import TrainingError
from megatron_dypo.records import Response
from megatron_dypo.rollout.engine import Request, Sampling
from megatron_dypo.rollout.server import Server, ServerFault, session

log = logging.getLogger(__name__)
STRIKES = 3  # losses in one call after which a server does not return in it


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
        """Responses in the order of the requests. Raises TrainingError when no server is left."""
        self._requests, self._sampling = requests, sampling
        self._waiting = deque(range(len(requests)))
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
        """Give waiting requests to the servers that have room."""
        while self._waiting:
            free = [lane for lane in self._lanes if lane.lost is None and len(lane.running) < self._limits.window]
            if not free:
                return
            lane, index = min(free, key=lambda lane: lane.tokens), self._waiting.popleft()
            lane.tokens += self._cost(index)
            lane.running[index] = asyncio.create_task(self._sample(lane, index))

    def _cost(self, index: int) -> int:
        return len(self._requests[index].prompt_ids) + self._sampling.max_tokens

    async def _sample(self, lane: _Lane, index: int) -> None:
        arguments = self._requests[index], self._sampling, self._label, self._limits.request_timeout
        try:
            outcome: Response | ServerFault = await lane.server.sample(self._http, *arguments)
        except ServerFault as fault:
            outcome = fault
        await self._events.put(_Event(lane, index, outcome))

    async def _watch(self, lane: _Lane) -> None:
        """Ask the server for a sign of life, again and again."""
        while True:
            await asyncio.sleep(min(2.0, self._limits.server_timeout / 4))
            try:
                label = await lane.server.label(self._http, self._limits.server_timeout)
                other = f"{lane.server.url}: serves the weights {label!r}, not {self._label!r}: it was restarted"
                outcome = None if label == self._label else ServerFault(f"{other}, or another run uses it, too")
            except ServerFault as fault:
                outcome = fault
            await self._events.put(_Event(lane, None, outcome))

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
        lane, index, outcome = event.lane, event.index, event.outcome
        if index is not None and index not in lane.running:
            return  # the lane was lost meanwhile, and the request given away
        if isinstance(outcome, Response) and index is not None:
            self._results[index] = outcome
            del lane.running[index]
            lane.tokens -= self._cost(index)
        elif isinstance(outcome, ServerFault):
            self._lose(lane, str(outcome))
        elif lane.lost is not None and lane.strikes < STRIKES:
            log.warning("%s: is back", lane.server.url)
            lane.lost = None

    def _silent(self) -> bool:
        return time.monotonic() - self._alive > self._limits.server_timeout

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
