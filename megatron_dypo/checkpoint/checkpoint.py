"""Save and load a run's state: weights, optimizer, reference weights, and the few counters that are not hashes.

``checkpoints/step_N/`` holds mcore's files, ``state.json`` and, last, ``manifest.json`` with every file's size. It is
written under another name and renamed when complete, so a folder called ``step_N`` with a manifest is whole.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding
from torch.distributed.checkpoint.api import CheckpointException

from megatron_dypo.checkpoint.counters import Counters
from megatron_dypo.checkpoint.folders import complete_steps, step_folder
from megatron_dypo.checkpoint.writer import in_process_writer
from megatron_dypo.errors import TrainingError
from megatron_dypo.policy.policy import Policy
from megatron_dypo.runtime import cpu_shim

_METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}  # moments load at any layout, not over DP alone


def save(run_dir: Path, policy: Policy, counters: Counters, keep: int) -> Path:
    """Write ``step_N`` and drop the oldest beyond ``keep``; collective. Returns the folder.

    Raises TrainingError where mcore cannot write.
    """
    final = step_folder(run_dir, counters.step)
    partial = final.with_name(f".partial-{final.name}")
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    with in_process_writer(), cpu_shim.cuda_type_names(), _as_training_error(partial):
        strategy = TorchDistSaveShardedStrategy("torch_dist", 1)
        dist_checkpointing.save(_state(policy, is_loading=False), str(partial), sharded_strategy=strategy)
    if dist.get_rank() == 0:
        _write_json(partial / "state.json", asdict(counters))
        sizes = {file.name: file.stat().st_size for file in sorted(partial.iterdir())}
        _write_json(partial / "manifest.json", sizes)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        for step in complete_steps(run_dir)[:-keep]:
            shutil.rmtree(step_folder(run_dir, step))
    dist.barrier()
    return final


def load(folder: Path, policy: Policy) -> Counters:
    """Restore weights, optimizer and reference exactly; collective. Raises TrainingError where mcore cannot read."""
    counters = Counters(**json.loads((folder / "state.json").read_text()))
    policy.version = counters.weight_version
    with cpu_shim.cuda_type_names(), _as_training_error(folder):
        loaded = dist_checkpointing.load(_state(policy, is_loading=True), str(folder))
        policy.gpt.load_state_dict(loaded["model"])
        if "optimizer" in loaded:
            policy.optimizer.load_state_dict(loaded["optimizer"])
    for name, kept in (policy.reference or {}).items():
        kept.copy_(loaded["reference"][name])
    return counters


def _state(policy: Policy, is_loading: bool) -> dict:
    """What mcore is to save or load. Adam has no state before the first applied update."""
    model = policy.gpt.sharded_state_dict(metadata=_METADATA)
    state = {"model": model}
    if policy.version > 0:
        state["optimizer"] = policy.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=_METADATA)
    if policy.reference is not None:
        state["reference"] = _reference_state(policy)
    return state


def _reference_state(policy: Policy) -> dict:
    """The kept reference, cut and keyed as mcore cuts the model's weights, under a prefix: it loads at any layout."""
    state = policy.gpt.sharded_state_dict(metadata=_METADATA)
    for name, kept in policy.reference.items():
        state[name].data = kept
    add_prefix_for_sharding(state, "reference.")
    return state


@contextmanager
def _as_training_error(folder: Path) -> Iterator[None]:
    """torch's CheckpointException is no Exception: it would pass by everything that reports errors."""
    try:
        yield
    except CheckpointException as error:
        raise TrainingError(f"{folder}: {error}") from error


def _write_json(path: Path, value: object) -> None:
    with path.open("w", encoding="utf-8") as stream:
        json.dump(value, stream, indent=2)
        stream.flush()
        os.fsync(stream.fileno())
