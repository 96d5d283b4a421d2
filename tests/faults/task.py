"""The runs that the fault tests disturb: 20 steps on two ranks, using everything that a resume has to restore."""

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

NO_REFERENCE = {"objective__kl_coef": 0.0, "objective__reference": "initial"}
REWARD = """def compute(data_source, solution_str, ground_truth, extra_info=None):
    return float(len(solution_str) % 2 == 0)
"""  # mixed groups from the first step on
RECIPES = {  # dypo's own is the recipe of the layouts
    "chord": {  # the schedule bends in mid-run
        "data__experts": "{folder}/train.jsonl",
        "data__experts_per_step": 4,
        "objective__mix": {"warmup": 5, "decay": 8, "peak": 0.9, "valley": 0.1},
        "objective__teachers_per_prompt": 1,
    },
    "grpo": {"objective__teachers_per_prompt": 1, "objective__entropy_coef": 0.01},
    "luffy": {  # the prefetched batch holds draws and rewards of traces
        "rollout__async_rollout": 1,
        "rollout__correction": "truncate",
        "rollout__dynamic_sampling": True,
        "objective__teachers_per_prompt": 1,
    },
    "ppo": {"objective__teachers_per_prompt": 1, "objective__kl_in_reward": 0.05, "side__updates": 3}
    | {"reward__function": "{folder}/reward.py:compute"},
    "prime": {"objective__teachers_per_prompt": 1, "reward__function": "{folder}/reward.py:compute"},
    "relift": {"objective__queue_size": 11, "rollout__async_rollout": 1, "rollout__correction": "truncate"},
    "sft": NO_REFERENCE | {"rollout__samples_per_prompt": 8},
    "srft": NO_REFERENCE | {"objective__tilt_level": "sequence"},
    "switch": {"objective__updates_per_rollout": 2},
}
BLOCKING = LAYOUTS["distributed"] | {"trainer__save_blocking": True}
VARIANTS = (
    LAYOUTS | {"blocking": BLOCKING} | {name: {"objective__method": name} | keys for name, keys in RECIPES.items()}
)


def make_task(folder: Path, variant: str = "data") -> Path:
    """Write such a run's configuration to ``folder``, which will hold its ``run/`` and ``rollouts/``."""
    keys = {"rollout__record": "{folder}/rollouts"} | TASK | VARIANTS[variant]
    values = {name: key.format(folder=folder) if isinstance(key, str) else key for name, key in keys.items()}
    config = copy_task(folder, **values)
    (folder / "reward.py").write_text(REWARD)
    return config


def reference(root: Path, variant: str = "data") -> Path:
    """Return the folder of the uninterrupted run below ``root``; it runs once."""
    return _run_once(root / variant, variant)


@cache
def _run_once(folder: Path, variant: str) -> Path:
    with Job(folder / "launch", make_task(folder, variant)) as job:
        assert job.wait() == [0, 0], job.output()
    return folder
