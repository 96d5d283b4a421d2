"""Real vLLM servers, as launch/servers.sh starts them: agreement, syncs, the token, and the effect of kills on a run.

Two servers for the whole file: each takes half a minute to start.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
import torch
import yaml

from benchmarks.servers import Servers, free_ports, running
from megatron_dypo.errors import TrainingError
from megatron_dypo.rollout.server import VARIABLE
from tests import planted
from tests.agreement import MODELS, agree, build, check, compare, policy_at, sampling
from tests.agreement import requests as requests_to_sample
from tests.launch import copy_task, metrics
from tests.ranks import run_ranks
from tests.rollout_server import SECRET

MODEL = "qwen3_moe"  # its layers come in parts if a bucket is small


@pytest.fixture(scope="module")
def servers(tmp_path_factory) -> Iterator[Servers]:
    folder, first = tmp_path_factory.mktemp("servers"), free_ports(2)
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(served_config([f"http://127.0.0.1:{first + i}" for i in range(2)], folder)))
    os.environ[VARIABLE] = SECRET
    with running(config, first, 2) as found:
        yield found
    del os.environ[VARIABLE]


def served_config(urls: list[str], folder: Path) -> dict:
    """Return ``tests.agreement``'s configuration in a file."""
    return {
        "model": {"preset": "tiny", "shape": MODELS[MODEL]},
        "data": {"train": "none"},
        "rollout": {"engine": "server", "servers": urls, "max_response_tokens": 40, "engine_memory": 0.25},
        "trainer": {"steps": 1, "run_dir": str(folder / "run")},
    }


def proved(folder: str, urls: list[str]) -> tuple[list[dict], str]:
    """Return the agreement with verification, and the sync's message about a server that loads another norm secretly.

    Runs on a forked rank, which has the environment of the server that it was forked from.
    """
    from megatron_dypo.runtime.distributed import all_gather_objects
    from megatron_dypo.weight_sync.source import Meta, Weights
    from megatron_dypo.weight_sync.transfer import SharedMemory

    os.environ[VARIABLE] = SECRET
    rollout = {"servers": urls, "verify_sync": "stored", "verify_syncs": 1, "server_timeout": 10.0}
    config, shape, layout, engine = build("server", MODEL, folder, **rollout)
    found = agree(config, shape, layout, engine)
    assert engine.devices == (2 if layout.is_main else 0), "a worker each"

    class OneNorm(dict):
        def metadata(self) -> list[Meta]:
            return [Meta(name, norm.dtype, tuple(norm.shape)) for name, norm in self.items()]

        def __iter__(self):
            return iter(self.items())

    def call_workers(method: str, plain=engine._pool.call_workers, **arguments) -> dict[str, list]:
        if method == "weight_report":
            plain("prepare_update", verify="off")  # the first report stays the requested one
            other = SharedMemory(
                engine._pool, OneNorm({"model.norm.weight": torch.full((shape.hidden_size,), 2.0)}), True
            )
            other.send_weights()
        return plain(method, **arguments)

    engine._pool.call_workers = call_workers
    said = planted.said(engine, Weights(policy_at({}, 1, config, shape, layout)))
    if said:
        all_gather_objects(None)  # the collective that ends a sync, in which the other rank waits
    return found, said


def test_logprobs_agree_and_stored_weights_are_those_sent_over_http_and_shared_memory(servers, tmp_path):
    ranks = run_ranks(2, proved, str(tmp_path), servers.urls, seconds=200)
    check([found for found, _ in ranks], 1e-5)
    fault = "worker 0: model.norm.weight: is not what the engine has stored (rollout.verify_sync)"
    assert ranks[0][1] == f"weight sync to {servers.urls[0]}, {fault}"


def listeners(pids: list[int]) -> set[str]:
    """Return addresses, as the kernel writes them, on which any of the processes listens."""
    sockets = {link.readlink().name for pid in pids for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()}
    rows = [row.split() for name in ("tcp", "tcp6") for row in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return {row[1] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in sockets}


def test_servers_listen_on_loopback_and_answer_nothing_without_the_token(servers):
    listening = listeners(servers.processes())
    ports = {f"{int(url.rpartition(':')[2]):04X}" for url in servers.urls}
    assert {f"0100007F:{port}" for port in ports} <= listening
    loopback = ("0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F")
    assert all(address.startswith(loopback) for address in listening), listening
    for url in servers.urls:
        for path in ("update_weights", "collective_rpc", "pause", "inference/v1/generate", "v1/models", "weight_info"):
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {SECRET}"}):
                for method in ("GET", "POST"):
                    assert requests.request(method, f"{url}/{path}", headers=headers, timeout=30).status_code == 401
        right = {"Authorization": f"Bearer {SECRET}"}
        assert requests.get(f"{url}/weight_info", headers=right, timeout=30).status_code == 200
    said = servers.log.read_text()
    assert said.count("reached from this machine only") == 2 and f"needs the token in {VARIABLE}" in said
    assert SECRET not in said


class Unknown:
    """A weight that vLLM's model does not have, behind all others'."""

    def __init__(self, policy):
        from megatron_dypo.weight_sync.source import Meta, Weights

        self._all, self.version = Weights(policy), 7
        self._extra = "model.layers.0.self_attn.z_proj.weight", torch.ones(8, 8)
        self._meta = Meta(self._extra[0], torch.float32, (8, 8))

    def metadata(self) -> list:
        return [*self._all.metadata(), self._meta]

    def __iter__(self):
        yield from self._all
        yield self._extra


def sample_while_one_is_killed(folder: str, servers: Servers) -> dict:
    """Kill the second server in the middle of a call, let it return, and sync again."""
    from megatron_dypo.weight_sync import transfer
    from megatron_dypo.weight_sync.source import sync_weights

    os.environ[VARIABLE] = SECRET
    transfer.BUCKET_BYTES = 1  # one tensor per bucket: both buckets are refilled many times
    said: list[str] = []
    log = logging.getLogger("megatron_dypo.rollout.router")
    log.addFilter(lambda record: bool(said.append(record.getMessage())) or True)
    config, shape, layout, engine = build("server", MODEL, folder, servers=servers.urls, server_timeout=5.0)
    first, second = (policy_at({}, seed, config, shape, layout) for seed in (1, 2))
    sync_weights(first, engine, 60)
    asked = requests_to_sample() * 12
    alone = compare(first, asked, engine.generate(asked, sampling(40)))
    victim = servers.pids()[1]
    killer = threading.Timer(0.3, os.kill, (victim, signal.SIGKILL))
    killer.start()
    responses = engine.generate(asked, sampling(40))
    killer.join()
    disturbed = compare(first, asked, responses)
    second.version = 1
    sync_weights(second, engine, 60)  # the killed one is left out
    without = compare(second, asked[:48], engine.generate(asked[:48], sampling(40)))
    left_out = list(engine._lost)
    servers.wait()
    unsynced = compare(second, asked[:48], engine.generate(asked[:48], sampling(40)))
    sync_weights(first, engine, 60)
    back = compare(first, asked, engine.generate(asked, sampling(40)))
    labels = [
        requests.get(f"{url}/weight_info", headers={"Authorization": f"Bearer {SECRET}"}, timeout=30).json()
        for url in servers.urls
    ]
    engine._transfer.shutdown()
    engine._transfer = None  # opened for the tensors that there were
    with pytest.raises(TrainingError) as unknown:
        engine.sync(Unknown(first))
    return {
        "unknown": str(unknown.value),
        "same": disturbed["ids"] == alone["ids"] == back["ids"],
        "largest": max(result["largest"] for result in (alone, disturbed, without, unsynced, back)),
        "left out": left_out,
        "lost in the end": engine._lost,
        "labels": labels,
        "said": said,
    }


@pytest.mark.faults
def test_a_server_killed_in_the_middle_loses_no_response_and_is_synced_when_it_is_back(servers, tmp_path):
    found = run_ranks(1, sample_while_one_is_killed, str(tmp_path), servers, seconds=300)[0]
    given_back = re.search(r"rollout server lost, ([1-9]\d*) requests reassigned: (\S+):", "\n".join(found["said"]))
    assert given_back and given_back[2] == servers.urls[1], "it was killed in the middle of a call"
    assert found["same"], "every request was answered once, with the sample that its seed gives"
    assert found["largest"] <= 1e-5, "nothing came from a server with other weights"
    assert found["left out"] == servers.urls[1:] and found["lost in the end"] == {}
    assert found["labels"][0] == found["labels"][1]
    assert all(url in found["unknown"] for url in servers.urls), "every server refuses it"
    assert "no rollout server is left" in found["unknown"] and "layers.0.self_attn.z_proj" in found["unknown"]
    assert "server 1 ended with code 137 and is restarted" in servers.log.read_text()


@pytest.mark.faults
def test_without_any_server_a_run_ends_with_one_line_and_goes_on_from_its_checkpoint(servers, tmp_path):
    config = copy_task(
        tmp_path,
        model__preset="tiny",
        model__shape=MODELS[MODEL],
        data__max_prompt_tokens=200,
        rollout__max_response_tokens=56,
        rollout__engine="server",
        rollout__servers=servers.urls,
        rollout__server_timeout=3.0,
        rollout__async_rollout=1,  # the checkpoint holds a batch sampled by the servers
        rollout__correction="truncate",
        trainer__steps=100_000,
        trainer__eval_every=0,
        trainer__save_every=2,
    )
    command = [sys.executable, "-m", "megatron_dypo", "train", str(config)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with (tmp_path / "log").open("w") as log:
        run = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "metrics.jsonl").is_file() or len(metrics(tmp_path / "run")) < 5:
        assert run.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
        time.sleep(0.2)
    for pid in servers.pids():
        os.kill(pid, signal.SIGKILL)
    assert run.wait(60) == 1
    said = (tmp_path / "log").read_text()
    headline = next(line for line in said.splitlines() if line.startswith("[rank 0] failed in phase"))
    assert "no rollout server is left" in headline and all(url in headline for url in servers.urls)

    done = metrics(tmp_path / "run")[-1]["step"]
    saved = done - done % 2
    overrides = ["rollout.engine=transformers", "rollout.servers=[]", f"trainer.steps={saved + 2}"]
    again = subprocess.run([*command, *overrides], env=environment, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stderr
    assert f"resumes after step {saved}" in again.stdout + again.stderr
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(1, saved + 3))
    stale = [line["rollout/staleness_max"] for line in lines if line.get("rollout/staleness_max") is not None]
    assert set(stale) <= {0, 1}
