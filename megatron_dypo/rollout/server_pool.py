"""All rollout servers as one receiver of weight transfers, driven by rank 0: admit, update, resume.

A server that fails on the way is excluded until the next sync, which readmits every server that answers and serves this
run's model: no server samples without having been synced.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import pickle
import time
from collections.abc import Awaitable, Callable

import aiohttp

from megatron_dypo.errors import TrainingError, UserError
from megatron_dypo.rollout.server import Server, ServerFault, WrongServer, session
from megatron_dypo.runtime import trace

log = logging.getLogger(__name__)
_PATIENCE = 1.0  # seconds between checks of servers that are starting


class ServerPool:
    """The servers of a run; all times are in seconds.

    ``wanted``: the model's name (``served_model_name``); ``timeout``: of a server that does not answer; ``deadline``:
    of the servers' startup, and of a whole sync, half of which one call may take.

    As vLLM's client of a weight transfer its methods are plain calls, each to all members at once.
    """

    def __init__(self, servers: list[Server], wanted: str, timeout: float, deadline: float):
        self.servers, self._wanted, self._timeout, self._deadline = servers, wanted, timeout, deadline
        self.members: list[Server] = []
        self.lost: dict[str, str] = {}  # why a server is not a member, by URL
        self.label = ""  # name of the next update's weights
        self.all_or_none = False  # whether a failing member fails the run, because the others wait for it

    def wait_for_all(self) -> None:
        """Wait until every server serves the model; raise UserError naming the first that does not, or not in time."""
        until = time.monotonic() + self._deadline
        while faults := {url: fault for url, fault in self._look().items() if fault}:
            if wrong := next((fault for fault in faults.values() if isinstance(fault, WrongServer)), None):
                raise UserError(f"rollout.servers: {wrong}")
            if time.monotonic() > until:
                raise UserError(
                    f"rollout.servers: {len(faults)} of {len(self.servers)} are not up within {self._deadline:g} s "
                    f"(rollout.sync_timeout): {next(iter(faults.values()))}"
                )
            time.sleep(_PATIENCE)

    def refresh(self, known_label: str) -> bool:
        """Admit all servers that answer and serve the model, and stop their sampling.

        Returns whether these are the same servers as before, none of them restarted since it received the weights
        ``known_label``. Raises TrainingError if there is none.
        """
        before, faults = self.members, self._look()
        self.lost = {url: str(fault) for url, fault in faults.items() if fault}
        self.members = [server for server in self.servers if server.url not in self.lost]
        for server in self.servers:
            if server in before and server.url in self.lost:
                log.warning("rollout server excluded: %s", self.lost[server.url])
            elif before and server not in before and server.url not in self.lost:
                log.warning("rollout server rejoined: %s", server.url)
        labels = self._all(lambda server, http: server.label(http, self._timeout))
        self._post("pause?mode=abort")
        return before == self.members and all(label == known_label for label in labels)

    def resume(self) -> None:
        """Clear what was cached under the old weights, and sample again."""
        answers = self._post("reset_prefix_cache")
        for server, answer in zip(self.members, answers, strict=True):
            if answer.get("success") is not True:
                raise TrainingError(f"{server.url}: did not reset its prefix cache after a weight sync")
        self._post("resume")

    def call_workers(self, method: str, **arguments: object) -> dict[str, list]:
        """Call a method of ``worker.WorkerExtension`` on all workers; return by URL one result per worker."""
        body = {"method": method, "kwargs": arguments}
        answers = self._post("collective_rpc", body)
        return {server.url: answer["results"] for server, answer in zip(self.members, answers, strict=True)}

    def world_sizes(self) -> list[int]:
        """Return the number of workers of each member."""
        sizes = self._all(lambda server, http: server.call(http, "GET", "get_world_size", seconds=self._timeout))
        return [int(size["world_size"]) for size in sizes]

    # vLLM's four phases

    def init_weight_transfer_engine(self, init_info: dict) -> None:
        infos = {server.url: dict(init_info) for server in self.members}
        if "rank_offset" in init_info:  # NCCL: the workers of all servers are in one group, in order of the servers
            offset = init_info["rank_offset"]
            for server, size in zip(self.members, self.world_sizes(), strict=True):
                infos[server.url]["rank_offset"] = offset
                offset += size
        self._post("init_weight_transfer_engine", lambda server: {"init_info": infos[server.url]})

    def start_weight_update(self) -> None:
        self._post("start_weight_update")

    def update_weights(self, update_info: dict) -> None:
        handles = update_info.pop("ipc_handles", None)
        if handles is not None:  # vLLM's form of CUDA IPC handles over HTTP
            update_info["ipc_handles_pickled"] = base64.b64encode(pickle.dumps(handles)).decode()
        self._post("update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._post("finish_weight_update", {"weight_version": weight_version or self.label})

    def _post(self, path: str, body: dict | Callable[[Server], dict] | None = None) -> list[dict]:
        async def call(server: Server, http: aiohttp.ClientSession) -> dict:
            content, began = body(server) if callable(body) else body, time.perf_counter()
            answer = asyncio.create_task(server.call(http, "POST", path, content, seconds=self._deadline / 2))
            silence = asyncio.create_task(self._silence(server, http))
            done, _ = await asyncio.wait((answer, silence), return_when=asyncio.FIRST_COMPLETED)
            for task in {answer, silence} - done:
                task.cancel()
            trace.add(path.partition("?")[0], "server", began, lane=server.lane)
            return (answer if answer in done else silence).result()

        return self._all(call)

    async def _silence(self, server: Server, http: aiohttp.ClientSession) -> dict:
        """Raise ServerFault once the server misses a health check's deadline, as during sampling.

        Its engine may be busy for long; vLLM's HTTP side, a separate process, keeps answering.
        """
        while True:
            await asyncio.sleep(min(2.0, self._timeout / 4))
            await server.serves(http, self._timeout)

    def _all(self, call: Callable[[Server, aiohttp.ClientSession], Awaitable]) -> list:
        """Return the answers of all members, and exclude those without one. Raises TrainingError if none is left."""
        outcomes = _side_by_side(self.members, call)
        for server, outcome in zip(list(self.members), outcomes, strict=True):
            if isinstance(outcome, ServerFault):
                log.warning("rollout server excluded: %s", outcome)
                self.lost[server.url] = str(outcome)
                self.members.remove(server)
                if self.all_or_none:
                    raise TrainingError(f"weight sync: {outcome}; the other servers wait for it: restart all of them")
        if not self.members:
            raise TrainingError("no rollout server is left: " + "; ".join(self.lost.values()))
        return [outcome for outcome in outcomes if not isinstance(outcome, ServerFault)]

    def _look(self) -> dict[str, ServerFault | None]:
        """Return the fault of each server, or None, by URL."""

        async def look(server: Server, http: aiohttp.ClientSession) -> None:
            serves = await server.serves(http, self._timeout)
            if serves != self._wanted:
                raise WrongServer(f"{server.url}: serves {serves!r}, this run needs {self._wanted!r}")

        outcomes = _side_by_side(self.servers, look)
        return {server.url: outcome for server, outcome in zip(self.servers, outcomes, strict=True)}


def _side_by_side(servers: list[Server], call: Callable[[Server, aiohttp.ClientSession], Awaitable]) -> list:
    """Return answers or faults, in order; for a thread without an event loop."""

    async def one(server: Server, http: aiohttp.ClientSession) -> object:
        try:
            return await call(server, http)
        except ServerFault as fault:
            return fault

    async def run() -> list:
        async with session() as http:
            return await asyncio.gather(*(one(server, http) for server in servers))

    return asyncio.run(run())
