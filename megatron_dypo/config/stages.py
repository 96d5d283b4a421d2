"""Split a run into stages (SFT, then RL): which keys a stage may set, and what a step trains with.

In a loaded configuration ``stages`` holds all keys of each stage. The configuration's own values of those keys are the
first stage's, except for sizes that the engine must accommodate in any stage. A run without stages is one stage.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from pydantic import BaseModel

from megatron_dypo.config.reads import SIDED, lookup
from megatron_dypo.config.schema import Config, walk
from megatron_dypo.config.sections_training import Adam

STEPS = "trainer.steps"
SECTIONS = ("data", "rollout", "objective", "optimizer")  # whose keys a stage may set, ...
OF_THE_RUN = ("data.valid", "data.plain_chat")  # ... except the evaluation's, the tokenizer's and the resumable ones
BESIDES = (STEPS, "trainer.spike_factor", "trainer.max_grad_norm_to_apply", "rollout.max_staleness")
_LARGEST = (
    "data.max_prompt_tokens",
    "rollout.max_response_tokens",
)  # maximum over all stages, for engine and evaluation
Tree = dict[str, Any]


def stage_keys() -> list[str]:
    """Return the keys a stage may set: what it trains on and how, but not model, layout, engine or run."""
    return [
        name
        for name, info in walk()
        if name in BESIDES
        or (
            (name.startswith(tuple(f"{section}." for section in SECTIONS)) and name not in OF_THE_RUN)
            and not info.json_schema_extra["resumable"]
        )
    ]


@dataclass(frozen=True)
class Stage:
    """A stage: its index in the run from 0, the steps ``before`` it, and its configuration.

    ``config.trainer.steps`` counts its own steps; ``named`` is set if the run has stages. Schedules and data order
    start with the stage.
    """

    index: int
    before: int
    config: Config
    named: bool = True

    @property
    def prefix(self) -> str:
        """Return the prefix of its keys; empty in a run without stages."""
        return f"stages.{self.index}." if self.named else ""

    def where(self, source: str) -> str:
        """Return how an error names it: the file, and which stage."""
        return f"{source}: stages.{self.index}" if self.named else source

    @property
    def metrics(self) -> dict[str, float]:
        """Return the metric ``stage``; nothing in a run without stages."""
        return {"stage": self.index} if self.named else {}

    @property
    def title(self) -> str:
        last = self.before + self.config.trainer.steps
        return f"stage {self.index}: steps {self.before + 1} to {last}, {self.config.objective.method}"

    def own(self, step: int) -> int:
        """Return the stage's own step number (from 1) of the run's step ``step``."""
        return step - self.before

    def lr(self, step: int) -> float:
        """Return the learning rate at the run's step ``step``."""
        return learning_rate(self.own(step), self.config.optimizer)


def learning_rate(step: int, optimizer: Adam) -> float:
    """Return the rate at a step (from 1): warm-up to ``lr``, then constant or decay to ``min_lr``."""
    if step <= optimizer.warmup_steps:
        return optimizer.lr * step / optimizer.warmup_steps
    if optimizer.schedule == "constant":
        return optimizer.lr
    assert optimizer.schedule_steps is not None, "needed by a schedule that decays (checks.py)"
    done = min(1.0, (step - optimizer.warmup_steps) / (optimizer.schedule_steps - optimizer.warmup_steps))
    left = 1 - done if optimizer.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return optimizer.min_lr + (optimizer.lr - optimizer.min_lr) * left


def stages_of(config: Config) -> list[Stage]:
    """Return the run's stages in order; they share ``config``'s objects for sections that no stage may set."""
    if config.stages is None:
        return [Stage(0, 0, config, named=False)]
    configs = []
    for tree in config.stages:
        configs.append(_changed(config, tree | {"stages": None}))
    before = accumulate((one.trainer.steps for one in configs), initial=0)
    return [Stage(index, start, one) for index, (start, one) in enumerate(zip(before, configs, strict=False))]


def stage_index(lengths: Sequence[int], step: int) -> int:
    """Return the stage index (from 0) of the run's step ``step`` (from 1); past the end, the last stage."""
    ends = list(accumulate(lengths))
    return next((index for index, end in enumerate(ends) if step <= end), len(ends) - 1)


def stage_at(stages: Sequence[Stage], step: int) -> Stage:
    """Return the stage of the run's step ``step``, as ``stage_index``."""
    return stages[stage_index([stage.config.trainer.steps for stage in stages], step)]


# --- from a file's tree to the configuration of a run


def parts(tree: Tree) -> Iterator[tuple[str, Tree]]:
    """Yield (key prefix, sections) of a file's tree without its stages, then of each stage that is a mapping."""
    yield "", {name: value for name, value in tree.items() if name != "stages"}
    stages = tree.get("stages")
    for index, stage in enumerate(stages if isinstance(stages, list) else ()):
        if isinstance(stage, dict):
            yield f"stages.{index}.", stage


def leaves(tree: Tree) -> set[str]:
    """Return the schema's keys that a tree sets."""
    return {name for name, _ in walk() if has(tree, name)}


def merged(base: Tree, stage: Tree) -> Tree:
    """Return ``base`` updated with the stage's values."""
    found = dict(base)
    for name, value in stage.items():
        both = isinstance(value, dict) and isinstance(found.get(name), dict)
        found[name] = merged(found[name], value) if both else value
    return found


def joined(configs: Sequence[Config]) -> Config:
    """Join the configurations of the stages into one for the run."""
    tree: Tree = {"stages": [tree_of(one, stage_keys()) for one in configs]}
    for name in _LARGEST:
        _put(tree, name, max(lookup(one, name) for one in configs))
    _put(tree, STEPS, sum(one.trainer.steps for one in configs))
    run = _changed(configs[0], tree)
    written: Tree = {}
    for index, one in enumerate(configs):
        for name, value in one.written.items():
            written[f"stages.{index}.{name}" if name in stage_keys() else name] = value
    run.written.clear()
    run.written.update(written)
    return run


def faults(tree: Tree) -> Iterator[str]:
    """Yield what is wrong with the form of ``stages`` in a file's tree, before their values are checked."""
    stages, known, allowed = tree["stages"], {name for name, _ in walk()}, set(stage_keys())
    if not isinstance(stages, list) or not stages:
        yield "stages: must be a list of at least one stage"
        return
    if has(tree, STEPS) and tree["trainer"]["steps"] is not None:
        yield f"{STEPS}: not beside stages, each of which has its own (stages.0.{STEPS})"
    for index, stage in enumerate(stages):
        if not isinstance(stage, dict):
            yield f"stages.{index}: must be a mapping of sections"
            continue
        for name in sorted(leaves(stage) & known - allowed):
            yield f"stages.{index}.{name}: cannot change between stages; give it once, outside of them"
        objective = merged(tree, stage).get("objective")
        method = objective.get("method") if isinstance(objective, dict) else None
        if method in SIDED:
            yield f"stages.{index}.objective.method: {method} has a second model, and cannot be a stage"
        if not has(stage, STEPS):
            yield f"stages.{index}.{STEPS}: required key is missing"


def has(tree: Any, dotted: str) -> bool:
    for part in dotted.split("."):
        if not isinstance(tree, dict) or part not in tree:
            return False
        tree = tree[part]
    return True


def tree_of(config: Config, names: Iterable[str]) -> Tree:
    """Return these keys with their values as a nested tree, as in a file."""
    tree: Tree = {}
    for name in names:
        _put(tree, name, lookup(config, name))
    return tree


def _put(tree: Tree, dotted: str, value: Any) -> None:
    *sections, leaf = dotted.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
    tree[leaf] = value


def _changed(section: BaseModel, tree: Tree) -> Any:
    """Return a copy updated with a tree's values; sections that the tree does not touch are shared."""
    update = {}
    for name, value in tree.items():
        here = getattr(section, name)
        update[name] = _changed(here, value) if isinstance(here, BaseModel) else value
    return section.model_copy(update=update)
