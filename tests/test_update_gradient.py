"""A training step's gradient, weight by weight, against the objective as its page states it, by torch's autograd.

It uses nothing of the step but the weights: transformers' model in float64 has the log-probs of all policies and the
entropies, reference_objective.py the loss. Legend: n tokens of a response or trace.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_dypo.models.shape import model_shape
from megatron_dypo.objectives.recipes import RECIPES
from megatron_dypo.records import Group
from tests import reference_objective as page
from tests.batches import for_recipe, make_config, make_experts, make_groups, trace_ids
from tests.ranks import run_ranks
from tests.updates import second_update

OBJECTIVES = {
    "chord": {"entropy_coef": 0.03, "demo_aggregation": "token_mean", "mix": {"warmup": 1, "decay": 4, "peak": 0.9}},
    "dypo": {"entropy_coef": 0.03, "hard_max_solved": 1, "refresh_pair_weights": True},
    "grpo": {"entropy_coef": 0.03, "aggregation": "token_mean", "advantage_std": "sample"},
    "luffy": {"entropy_coef": 0.03, "aggregation": "constant", "advantage_std": "none"},
    "relift": {"entropy_coef": 0.03, "aggregation": "constant", "advantage_std": "none"},
    "sft": {"entropy_coef": 0.03, "demo_aggregation": "token_mean"},
    "srft": {"entropy_coef": 0.03, "aggregation": "constant", "demo_aggregation": "token_mean", "shape": "luffy"},
    "switch": {"entropy_coef": 0.03, "aggregation": "constant", "normalize": "active", "gate": "advantage"},
}
TEMPERATURE = 0.8  # of rollouts, as in tests/batches.py


class Model:
    """transformers' Llama with these weights, in float64."""

    def __init__(self, shape, weights: dict) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        fields = shape.to_hf_config()
        config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        self.model = AutoModelForCausalLM.from_config(config, dtype=torch.float64)
        self.model.load_state_dict({name: torch.from_numpy(x).double() for name, x in weights.items()})

    def __call__(self, group: Group, ids, temperature: float) -> tuple[Tensor, Tensor]:
        """Return (log-probs, entropies) [n] of ``ids`` after the group's prompt."""
        prompt, tail_n = torch.from_numpy(group.prompt_ids).long(), torch.from_numpy(ids).long()
        logits = self.model(torch.cat([prompt, tail_n])[None]).logits[0, len(prompt) - 1 : -1] / temperature
        logp_nV = logits.log_softmax(-1)
        return logp_nV.gather(1, tail_n[:, None])[:, 0], -(logp_nV.exp() * logp_nV).sum(-1)


def question(group: Group, models: dict[str, Model]) -> page.Question:
    rollouts = []
    for response in group.responses:
        now_n, entropy_n = models["now"](group, response.ids, TEMPERATURE)
        with torch.no_grad():
            old_n, reference_n = (models[name](group, response.ids, TEMPERATURE)[0] for name in ("old", "reference"))
        engine_n = torch.from_numpy(response.logprobs).double()
        rollouts.append(page.Rollout(response.reward, now_n, old_n, reference_n, engine_n, entropy_n))
    traces = [page.Trace(*models["now"](group, trace_ids(group, i), 1.0)) for i in group.teacher_indices or ()]
    for trace, reward in zip(traces, group.teacher_rewards, strict=False):
        trace.reward = reward
    return page.Question(rollouts, traces)


@pytest.mark.parametrize("method", OBJECTIVES)
def test_a_step_s_gradient_is_that_of_the_objective_s_page(method):
    assert OBJECTIVES.keys() == {name for name, recipe in RECIPES.items() if not recipe.side}
    sections = {"objective": {"method": method} | OBJECTIVES[method]}
    rows = 5 if RECIPES[method].imitates_experts else 0
    first, second = (make_groups(8, seed=seed) + make_experts(rows, seed) for seed in (5, 6))
    (found,) = run_ranks(1, second_update, sections, first, second)
    config = make_config("llama", **sections)
    models = {name: Model(model_shape(config.model), weights) for name, weights in found["weights"].items()}
    if any(term.has_ratio for term in RECIPES[method].terms):
        assert min(found["metrics"][name] for name in ("loss/kl", "policy/clip_frac")) > 1e-3
    groups = for_recipe(second, config.objective)
    questions = [question(group, models) for group in groups if not group.expert]
    experts = [page.Trace(*models["now"](group, trace_ids(group, 0), 1.0)) for group in groups if group.expert]
    longest = config.rollout.max_response_tokens
    terms = page.dypo(questions, config.objective, longest=longest, experts=experts, step=2)
    loss = terms.summands().sum()
    loss.backward()
    assert found["metrics"]["loss/total"] == pytest.approx(loss.item(), rel=1e-5, abs=1e-7)
    expected = {name: parameter.grad for name, parameter in models["now"].model.named_parameters()}
    assert found["gradients"].keys() == expected.keys()
    for name, gradient in expected.items():
        gap = (torch.from_numpy(found["gradients"][name]).double() - gradient).norm()
        assert gap <= 1e-5 * gradient.norm(), name
