"""Real runs for tests: a task learnt in a few steps, and torchrun as a user calls it."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import yaml

WORDS = ("first ", " then ", "last ", " back ", "a", "b")
IGNORED = ("time/", "perf/")


def copy_task(folder: Path, **overrides: object) -> Path:
    """Return a configuration whose policy learns to box the digit it sees; ``overrides``: keys, ``__`` for the dot."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "id": f"{i}-{digit}",
            "prompt": f"{word}{digit}=",
            "ground_truth": str(digit),
            "teachers": [
                {"name": "a", "trace": f" \\boxed{{{digit}}}"},
                {"name": "b", "trace": f"{digit} \\boxed{{{digit}}}"},
            ],
        }
        for i, word in enumerate(WORDS)
        for digit in range(10)
    ]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows[:-6])))
    (folder / "valid.jsonl").write_text("\n".join(map(json.dumps, rows[-6:])))
    config: dict = {
        "model": {"preset": "tiny", "shape": {"hidden_size": 64, "num_attention_heads": 2, "num_query_groups": 2}},
        "data": {
            "train": str(folder / "train.jsonl"),
            "valid": str(folder / "valid.jsonl"),
            "prompts_per_step": 8,
            "max_prompt_tokens": 8,
            "max_tokens_per_microbatch": 128,
        },
        "rollout": {"samples_per_prompt": 4, "max_response_tokens": 8, "engine_memory": 0.25},
        "objective": {"kl_coef": 0.01, "teachers_per_prompt": 2},
        "optimizer": {"lr": 4e-3},
        "trainer": {"steps": 24, "save_every": 12, "eval_every": 12, "run_dir": str(folder / "run")},
    }
    for name, value in overrides.items():
        section, key = name.split("__")
        config.setdefault(section, {})[key] = value
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def torchrun(ranks: int, *arguments: str, seconds: float = 240, **environment: str) -> subprocess.CompletedProcess:
    """Run ``torchrun -m megatron_dypo ARGUMENTS`` on this machine."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return subprocess.run(
        [*launcher, "-m", "megatron_dypo", *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=seconds,
    )


def train_here(config: str, overrides: list[str]) -> None:
    """Run ``train`` on a forked rank."""
    from megatron_dypo.config import load_config
    from megatron_dypo.preflight import check_inputs
    from megatron_dypo.trainer import train

    loaded = load_config(config, overrides)
    train(loaded, check_inputs(loaded, config))


def metrics(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def without_times(lines: list[dict]) -> list[dict]:
    return [{name: value for name, value in line.items() if not name.startswith(IGNORED)} for line in lines]


def checkpoint_digests(folder: str) -> dict[str, str]:
    """Return the digest of every tensor in a checkpoint, with moments and reference; for a forked rank."""
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = dcp.FileSystemReader(folder)
    wanted = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(wanted, storage_reader=reader, no_dist=True)
    return {name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in wanted.items()}
