"""Made-up graded batches and small configurations, the same in every process."""

from __future__ import annotations

import numpy as np

from megatron_dypo.config.schema import (
    Config,
    Data,
    Model,
    Objective,
    Optimizer,
    Parallel,
    PolicyOptions,
    Rollout,
    Shape,
    Side,
    Trainer,
)
from megatron_dypo.objectives.recipes import recipe
from megatron_dypo.records import Group, Prompt, Regime, Response, Teacher
from megatron_dypo.training.minibatch import draw_teachers, grade_groups

SHAPES = {
    "llama": Shape(num_query_groups=2),
    "deep": Shape(num_layers=4, num_attention_heads=8, head_dim=16, num_query_groups=4),
    "llama-tied": Shape(tied_embeddings=True, num_layers=4),
    "qwen2-tied": Shape(family="qwen2", tied_embeddings=True, num_query_groups=2),
    "qwen3": Shape(family="qwen3", num_query_groups=2),
    "qwen3_moe": Shape(family="qwen3_moe", num_layers=4, ffn_hidden_size=96, num_experts=8, router_topk=2),
    "mixtral": Shape(family="mixtral", ffn_hidden_size=96, num_experts=4, router_topk=2, num_query_groups=2),
    "qwen2_moe": Shape(
        family="qwen2_moe",
        ffn_hidden_size=96,
        num_experts=4,
        router_topk=2,
        norm_topk_prob=False,
        shared_expert_ffn_hidden_size=64,
    ),
}


def make_config(shape: str = "llama", budget: int = 200, **sections) -> Config:
    """Return a tiny model's configuration; ``sections`` are dicts of overrides by section name."""
    objective = {"kl_coef": 0.1, "teachers_per_prompt": 2, "clip_low": 0.1, "clip_high": 0.15}
    return Config(
        model=Model(preset="tiny", shape=SHAPES[shape], **sections.get("model", {})),
        data=Data(train="none", prompts_per_step=12, max_tokens_per_microbatch=budget),
        policy=PolicyOptions(**sections.get("policy", {})),
        parallel=Parallel(**sections.get("parallel", {})),
        rollout=Rollout(
            **{"samples_per_prompt": 4, "max_response_tokens": 40, "temperature": 0.8} | sections.get("rollout", {})
        ),
        objective=Objective(**objective | sections.get("objective", {})),
        optimizer=Optimizer(**{"lr": 1e-3, "clip_grad": 0.0, "eps": 1e-4} | sections.get("optimizer", {})),
        side=Side(**{"lr": 1e-2, "clip_grad": 0.0, "eps": 1e-4} | sections.get("side", {})),
        trainer=Trainer(**{"steps": 1, "run_dir": "none"} | sections.get("trainer", {})),
    )


def make_groups(prompts: int = 12, k: int = 4, seed: int = 0, vocabulary: int = 128) -> list[Group]:
    """Return groups of mixed lengths in all three regimes, several of them Mid, with made-up engine log-probs."""
    random = np.random.default_rng(seed)
    groups = []
    for q in range(prompts):
        regime = (Regime.MID, Regime.HARD, Regime.MID, Regime.EASY)[q % 4]
        solved = {Regime.EASY: k, Regime.HARD: 0, Regime.MID: 1 + q % (k - 1)}[regime]
        prompt_ids = random.integers(3, vocabulary, random.integers(2, 12)).astype(np.int32)
        responses = [
            Response(
                ids := random.integers(3, vocabulary, random.integers(1, 40)).astype(np.int32),
                random.normal(-4.8, 0.3, len(ids)).astype(np.float32),
                "stop",
                float(i < solved),
            )
            for i in range(k)
        ]
        draw = (0, 1) if regime == Regime.HARD else None
        teachers = (Teacher("a", "first"), Teacher("b", "second trace"))
        groups.append(Group(Prompt(f"p{q}", "1", teachers), prompt_ids, responses, regime, draw))
    return groups


def make_experts(count: int, seed: int = 0, vocabulary: int = 128) -> list[Group]:
    """Return rows of an expert data set."""
    random = np.random.default_rng(1000 + seed)
    prompts = [Prompt(f"x{seed}-{i}", "", (Teacher("a", "a trace"),)) for i in range(count)]
    ids = [random.integers(3, vocabulary, random.integers(2, 12)).astype(np.int32) for _ in prompts]
    return [Group(*each, teacher_indices=(0,), expert=True) for each in zip(prompts, ids, strict=True)]


def for_recipe(groups: list[Group], objective: Objective) -> list[Group]:
    """Return the groups with what the objective's recipe needs.

    That is the drawn teachers, the rewards of their traces if it scores them, and half as many experts as prompts if it
    trains on experts and there are none yet.
    """
    prompts, experts = ([group for group in groups if group.expert == expert] for expert in (False, True))
    for group in prompts:
        if recipe(objective).scores_traces and not group.teacher_rewards:
            draw_teachers(group, [0, 1], 0, 1, objective.teachers_per_prompt)
            group.teacher_rewards = (1.0, 0.25)[: objective.teachers_per_prompt]
    grade_groups(prompts, objective, 0, 1, lambda group: [0, 1])
    if recipe(objective).imitates_experts and not experts:
        experts = make_experts(len(prompts) // 2)
    return prompts + experts


def route(groups: list[Group], layers: int, k: int, experts: int, seed: int = 0) -> list[Group]:
    """Return the groups with made-up routing of a rollout engine: distinct experts for each token and layer."""
    random = np.random.default_rng(seed)
    for group in groups:
        for response in group.responses:
            tokens = len(group.prompt_ids) + len(response.ids) - 1
            scores = random.random((tokens, layers, experts))
            response.experts = scores.argsort(-1)[..., :k].astype(np.uint8)
    return groups


def trace_ids(group: Group, teacher: int) -> np.ndarray:
    """Return the ids of a made-up teacher trace."""
    seed = sum(map(ord, group.prompt.id)) + 1000 * teacher
    return np.random.default_rng(seed).integers(3, 128, 5 + seed % 20).astype(np.int32)
