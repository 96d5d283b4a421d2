"""The run that the fault tests disturb: 20 steps on two ranks, with all that has to be resumed in play."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from tests.faults.job import Job
from tests.launch import copy_task

STEPS, SAVE_EVERY = 20, 3
TASK = {
    "rollout__engine": "transformers",
    "objective__reference": "every:7",
    "trainer__steps": STEPS,
    "trainer__save_every": SAVE_EVERY,
    "trainer__eval_every": 5,
}
LAYOUTS = {
    "data": {},
    "tensor": {"parallel__tensor": 2, "parallel__sequence_parallel": True},
    "pipeline": {"parallel__pipeline": 2},
    "distributed": {"optimizer__distributed": True},
    "experts": {
        "model__preset": "tiny-moe",
        "model__shape": {
            "hidden_size": 64,
            "num_attention_heads": 2,
            "num_query_groups": 2,
            "ffn_hidden_size": 64,
            "num_experts": 4,
        },
        "policy__routing_replay": "rollout",
        "parallel__expert": 2,
        "optimizer__distributed": True,
    },
}


def make_task(folder: Path, layout: str = "data") -> Path:
    """The configuration of such a run in ``folder``, which is to hold its ``run/`` and ``rollouts/``."""
    return copy_task(folder, rollout__record=str(folder / "rollouts"), **TASK, **LAYOUTS[layout])


def reference(root: Path, layout: str = "data") -> Path:
    """The folder below ``root`` of the uninterrupted run; it runs once."""
    return _run_once(root / layout, layout)


@cache
def _run_once(folder: Path, layout: str) -> Path:
    with Job(folder / "launch", make_task(folder, layout)) as job:
        assert job.wait() == [0, 0], job.output()
    return folder
