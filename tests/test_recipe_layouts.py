"""Every recipe at every kind of parallelism: each term's loss, the gradient and the weights equal one rank's.

DYPO's own recipe is at more layouts in test_layouts.py. Here ``make test`` has one recipe for each function of a token,
one of them with an entropy bonus; ``make faults`` has all.
"""

from __future__ import annotations

import functools

import pytest

from megatron_dypo.objectives.recipes import RECIPES
from tests.ranks import run_ranks
from tests.test_layouts import CP2, DISTRIBUTED, PP2, SP, assert_same, train_steps

EP2 = {"expert": 2}
LAYOUTS = {  # (model, parallel, optimizer), two ranks each
    "tensor": ("deep", SP, {}),
    "pipeline": ("deep", PP2, {}),
    "context": ("deep", CP2, {}),
    "distributed": ("deep", {}, DISTRIBUTED),
    "experts": ("qwen3_moe", EP2, {}),
}
OBJECTIVES = {  # in three updates, all with KL and clipped tokens if the recipe has a ratio
    "chord": {"entropy_coef": 0.03, "aggregation": "token_mean", "demo_aggregation": "token_mean", "shape": "phi"},
    "dypo": {"entropy_coef": 0.03},
    "grpo": {"entropy_coef": 0.03, "aggregation": "token_mean"},
    "ppo": {"entropy_coef": 0.03, "aggregation": "token_mean", "kl_in_reward": 0.1, "gae_lambda": 0.9}
    | {"value_clip": 0.05},
    "prime": {"entropy_coef": 0.03, "aggregation": "token_mean"},
    "luffy": {"entropy_coef": 0.03, "aggregation": "token_mean", "advantage_std": "none"},
    "relift": {"entropy_coef": 0.03, "demo_aggregation": "token_mean"},
    "sft": {"entropy_coef": 0.03, "demo_aggregation": "token_mean"},
    "srft": {"entropy_coef": 0.03, "tilt_level": "sequence", "demo_aggregation": "token_mean", "weight_right": 1.0},
    "switch": {
        "entropy_coef": 0.03,
        "aggregation": "constant",
        "normalize": "active",
        "demo_aggregation": "token_mean",
    },
}
SIDES = {"ppo": {"lr": 1e-3, "updates": 4}}  # not the policy's 3: its responses are cut and shared out otherwise
BRIEFLY = {"luffy": tuple(LAYOUTS), "chord": ("pipeline", "distributed"), "ppo": ("context",)}
MATRIX = [
    pytest.param(method, layout, marks=[] if layout in BRIEFLY.get(method, ()) else pytest.mark.faults)
    for method in RECIPES
    for layout in LAYOUTS
]


def train(world: int, method: str, shape: str, budget: int, **sections: dict) -> list[dict]:
    objective = {"method": method, "updates_per_rollout": 3} | OBJECTIVES[method]
    own = {"objective": objective, "side": SIDES.get(method, {})}
    return run_ranks(world, train_steps, shape, budget, 1, own | sections)


@functools.cache
def alone(method: str, shape: str) -> dict:
    return train(1, method, shape, 100_000)[0]


@pytest.mark.parametrize(("method", "layout"), MATRIX)
def test_every_recipe_has_the_losses_gradient_and_weights_of_one_rank(method, layout):
    """A rank has only its share of a distributed optimizer's gradient sums: compare norm and weights instead."""
    shape, parallel, optimizer = LAYOUTS[layout]
    one = alone(method, shape)
    (metrics,) = one["history"]
    for term in RECIPES[method].terms:
        assert abs(metrics[f"loss/{term.name}"]) > 1e-4 and metrics[f"grad_share/{term.name}"] > 1e-3
    assert abs(metrics["loss/entropy"]) > 1e-3
    for result in train(2, method, shape, 150, parallel=parallel, optimizer=optimizer):
        assert_same(result, one, ["weights"] if optimizer else ["gradients", "weights"])
        assert result["history"][0]["train/grad_norm"] == pytest.approx(metrics["train/grad_norm"], rel=1e-5)


def test_every_recipe_is_in_the_matrix():
    assert OBJECTIVES.keys() == RECIPES.keys()
