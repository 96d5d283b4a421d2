"""Declare the whole configuration; type, default, bounds and documentation of a key are in its section's class."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field, PrivateAttr

from megatron_dypo.config.section import Section, key
from megatron_dypo.config.sections_model import Model, Parallel, PolicyOptions, Shape
from megatron_dypo.config.sections_rollout import Data, Reward, Rollout
from megatron_dypo.config.sections_training import Evaluation, Logging, Mix, Objective, Optimizer, Side, Trainer

__all__ = [
    "Config",
    "Data",
    "Evaluation",
    "Logging",
    "Mix",
    "Model",
    "Objective",
    "Optimizer",
    "Parallel",
    "PolicyOptions",
    "Reward",
    "Rollout",
    "Section",
    "Shape",
    "Side",
    "Trainer",
    "walk",
]


class Config(Section):
    """The configuration of a run."""

    model: Model = Field(description="The policy network.")
    policy: PolicyOptions = Field(default=PolicyOptions(), description="How a mixture of experts is trained.")
    parallel: Parallel = Field(default=Parallel(), description="The layout.")
    data: Data = Field(description="Prompts, answers and teacher traces.")
    rollout: Rollout = Field(default=Rollout(), description="Sampling from the policy.")
    reward: Reward = Field(default=Reward(), description="How responses are scored.")
    objective: Objective = Field(default=Objective(), description="What is optimised.")
    optimizer: Optimizer = Field(default=Optimizer(), description="Adam.")
    side: Side = Field(default=Side(), description="The second model of some recipes.")
    trainer: Trainer = Field(description="The loop.")
    evaluation: Evaluation = Field(default=Evaluation(), description="Evaluation suites.")
    logging: Logging = Field(default=Logging(), description="Where metrics are logged.")
    stages: list[dict[str, Any]] | None = key(
        None,
        "Stages of the run: each gives its own `trainer.steps` and the keys in which it differs from the file.",
        resumable=True,
    )

    _written: dict[str, Any] = PrivateAttr(default_factory=dict)

    @property
    def written(self) -> dict[str, Any]:
        """Return the file's values of the keys this run does not read; the keys themselves hold their defaults."""
        return self._written

    @property
    def window(self) -> int:
        """Return the tokens of the longest prompt and response, which the engine makes room for."""
        responses = self.rollout.max_response_tokens, self.evaluation.max_response_tokens or 0
        return self.data.max_prompt_tokens + max(responses)


def walk(section: type[BaseModel] = Config, prefix: str = ""):
    """Yield (dotted key, field) for every leaf key, in the order of declaration."""
    for name, info in section.model_fields.items():
        dotted = f"{prefix}{name}"
        nested = info.annotation
        if isinstance(nested, type) and issubclass(nested, BaseModel):
            yield from walk(nested, dotted + ".")
        else:
            yield dotted, info
