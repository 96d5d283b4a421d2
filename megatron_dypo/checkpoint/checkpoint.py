"""Loading: the newest checkpoint whose files are what was written."""

from __future__ import annotations

import json
import logging
from dataclasses import fields
from pathlib import Path

import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint.api import CheckpointException

from megatron_dypo.checkpoint.counters import Counters
from megatron_dypo.checkpoint.files import shared_fault
from megatron_dypo.checkpoint.folders import none_left, step_folder
from megatron_dypo.checkpoint.safe_pickle import read_index
from megatron_dypo.checkpoint.state import restore
from megatron_dypo.errors import TrainingError
from megatron_dypo.policy.policy import Policy

log = logging.getLogger(__name__)


def load_newest(run_dir: Path, steps: list[int], policy: Policy) -> Counters:
    """Load the newest of the checkpoints ``steps`` that is undamaged; warn of each damaged one. Collective.

    Raises TrainingError where none is left: training from the start in their place is for the user to decide.
    """
    for step in reversed(steps):
        folder = step_folder(run_dir, step)
        fault = shared_fault(folder)
        if fault is None:
            return _load(folder, policy)
        if dist.get_rank() == 0:
            log.warning("%s; falling back to the checkpoint before", fault)
    raise TrainingError(none_left(run_dir))


def _load(folder: Path, policy: Policy) -> Counters:
    """Restore weights, optimizer and reference exactly, at any layout; collective.

    Raises TrainingError where mcore cannot read them, UserError where ``.metadata`` holds more than plain data.
    """
    state = json.loads((folder / "state.json").read_text())
    counters = Counters(**{field.name: state[field.name] for field in fields(Counters)})
    read_index(folder / ".metadata")
    policy.version = counters.weight_version
    try:
        restore(policy, folder)
    except (CheckpointException, CheckpointingException) as error:  # the first is no Exception: reports would miss it
        raise TrainingError(f"{folder}: {error}") from error
    return counters
