"""Faults of a weight sync to servers: each is reported in time, and the other servers get the weights and carry on.

HTTP, both ends of the transfer and our engine are real; the servers imitate vLLM's answers (tests/vllm_wire.py), since
a real one cannot produce these faults at a given moment. Real servers: tests/test_servers.py, test_rollout.py.
"""

from __future__ import annotations

import asyncio
import re
import resource
import time

import numpy as np
import pytest
import torch

from megatron_dypo.errors import TrainingError
from megatron_dypo.rollout import server_engine
from megatron_dypo.rollout.engine import Request, Sampling
from megatron_dypo.rollout.server_engine import ServerEngine
from megatron_dypo.runtime.distributed import Layout
from megatron_dypo.weight_sync import transfer
from tests.batches import make_config
from tests.rollout_server import EOS, Imitation, set_token
from tests.test_transfer import Source
from tests.vllm_wire import servers_of

LATE = 1.0  # seconds that one call may take: half of rollout.sync_timeout


class Policy(Source):
    """A source whose weights differ at each version."""

    version = 0

    def __iter__(self):
        return iter(self.tensors(self.version).items())


class Fleet:
    """Three servers behind our engine. ``at`` replaces the second one's answers, by path."""

    def __init__(self, backend: str, monkeypatch):
        monkeypatch.setattr(server_engine, "all_gather_objects", lambda value: [value])
        self._entered = servers_of(backend, 3, Source().sizes, torch.float32, monkeypatch)
        self.servers, self.models, self.wire = self._entered.__enter__()
        self.at: dict = {}
        rollout = {"engine": "server", "servers": [server.url for server in self.servers], "sync_backend": backend}
        rollout |= {"server_timeout": 0.5, "sync_timeout": 2 * LATE, "request_timeout": 5.0}
        usual = self.servers[1].behave

        async def behave(server: Imitation, path: str, body: dict) -> object:
            if path in self.at:
                return await self.at[path](server)
            return await usual(server, path, body)

        self.servers[1].behave = behave
        self.engine = ServerEngine(make_config(rollout=rollout), "the model", Layout())
        self.policy = Policy()

    def sync(self) -> float:
        """Sync once and return the seconds it took."""
        self.policy.version += 1
        began = time.monotonic()
        self.engine.sync(self.policy)
        return time.monotonic() - began

    def synced(self) -> list[bool]:
        """Return for each server whether its model has the weights sent last."""
        now = self.policy.tensors(self.policy.version)
        return [all(torch.equal(p, now[name]) for name, p in model.named_parameters()) for model in self.models]

    def sampled_from(self) -> list[int]:
        """Sample 30 requests and return how many each server has served."""
        before = [server.count("inference/v1/generate") for server in self.servers]
        asked = [Request(np.arange(2, 6, dtype=np.int32), seed) for seed in range(30)]
        responses = self.engine.generate(asked, Sampling(1.0, 1.0, 8, EOS))
        assert len(responses) == 30 and {response.weight_version for response in responses} == {self.policy.version}
        return [server.count("inference/v1/generate") - past for server, past in zip(self.servers, before, strict=True)]

    def close(self) -> None:
        self._entered.__exit__(None, None, None)


@pytest.fixture
def fleet_of(monkeypatch):
    set_token(monkeypatch)
    monkeypatch.setattr(transfer, "BUCKET_BYTES", 200)  # several buckets
    made = []

    def make(backend: str) -> Fleet:
        made.append(Fleet(backend, monkeypatch))
        return made[-1]

    yield make
    for fleet in made:
        fleet.close()


async def die(server: Imitation) -> None:
    await server._end()


async def late(server: Imitation) -> None:
    await asyncio.sleep(60)


async def no_memory(server: Imitation) -> None:
    raise MemoryError


@pytest.mark.parametrize("path", ["start_weight_update", "update_weights", "finish_weight_update"])
@pytest.mark.parametrize(
    ("fault", "said"),
    [(die, r"/({path}|v1/models): "), (late, r"no answer to /{path} within 1 s"), (no_memory, "HTTP 500")],
)
def test_the_others_have_the_weights_and_go_on_and_it_is_taken_in_again(fleet_of, path, fault, said, caplog):
    fleet = fleet_of("shared_memory")
    fleet.sync()
    assert fleet.synced() == [True, True, True]
    fleet.at = {path: fault}
    assert fleet.sync() < 3 * LATE
    assert fleet.synced()[::2] == [True, True] and list(fleet.engine._lost) == [fleet.servers[1].url]
    assert re.search(f"rollout server excluded: {fleet.servers[1].url}: .*{said.format(path=path)}", caplog.text)
    first, second, third = fleet.sampled_from()
    assert second == 0 and first and third, "nothing is sampled with weights that may be half old"
    fleet.at = {}
    if fault is die:
        fleet.servers[1].start()
    fleet.sync()
    assert fleet.synced() == [True, True, True] and fleet.engine._lost == {} and all(fleet.sampled_from())


def test_a_server_that_says_it_has_other_weights_than_it_was_given_samples_nothing_that_trains(fleet_of, caplog):
    fleet = fleet_of("shared_memory")
    fleet.sync()

    async def keeps_its_version(server: Imitation) -> dict:
        return {"message": "done"}

    fleet.at = {"finish_weight_update": keeps_its_version}
    fleet.sync()
    fleet.sampled_from()
    assert re.search(rf"{fleet.servers[1].url}: .*sampled from weights \['\w+:1'\], not '\w+:2'", caplog.text)
    fleet.at = {}
    fleet.sync()
    assert fleet.synced() == [True, True, True] and all(fleet.sampled_from())


@pytest.mark.parametrize("backend", ["nccl", "sparse_nccl"])
def test_where_all_workers_are_in_one_collective_the_run_ends_and_names_the_server(fleet_of, backend):
    fleet = fleet_of(backend)
    fleet.at = {"update_weights": no_memory}
    with pytest.raises(TrainingError, match=f"{fleet.servers[1].url}.*servers wait for it: restart all of them"):
        fleet.sync()


def test_too_little_shared_memory_is_said_with_what_is_needed(fleet_of):
    fleet = fleet_of("shared_memory")
    largest = max(cut.nbytes for cut in transfer.buckets(fleet.policy.metadata(), transfer.BUCKET_BYTES))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest - 1, hard))
    try:
        with pytest.raises(
            TrainingError, match=rf"^rollout.sync_backend: shared_memory: there is no room for 2 x {largest:,} "
        ):
            fleet.sync()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    fleet.sync()
    assert fleet.synced() == [True, True, True]
