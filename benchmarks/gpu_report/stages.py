"""List the stages: part, deadline, what each needs, and the function that measures.

A stage is a function of one ``Record``; it runs in its own process (``child.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

PARTS = {"trainer": 300, "engine": 300, "many": 600}  # seconds that a part may take, whatever its stages need


@dataclass(frozen=True)
class Stage:
    """A stage. ``seconds``: its deadline. ``run``: the module's function. ``needs``: packages, by import name.

    ``options`` are passed to the function; ``gpus`` is how many it needs.
    """

    name: str
    part: str
    seconds: int
    run: str
    title: str
    needs: tuple[str, ...] = ()
    gpus: int = 1
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def function(self) -> Callable:
        module, name = self.run.split(":")
        return getattr(import_module(f"benchmarks.gpu_report.{module}"), name)


_POLICY = ("megatron.core",)
_VLLM = (*_POLICY, "vllm")
_TASK = (*_POLICY, "transformers", "reasoning_gym", "math_verify")  # the quickstart's
_RUN = (*_TASK, "vllm")
STAGES = {
    stage.name: stage
    for stage in (
        Stage("environment", "trainer", 60, "environment:environment", "What is installed", ("rich",)),
        Stage("attention", "trainer", 45, "attention:attention", "Flash attention against SDPA", _POLICY),
        Stage("head", "trainer", 120, "head:head", "The output head against its peers"),
        Stage(
            "update_1.5b",
            "trainer",
            120,
            "update:update",
            "Policy updates at Qwen2.5-1.5B's shape",
            _POLICY,
            options={"model": "qwen2.5-1.5b", "budget": 16384, "updates": 10, "turns": True},
        ),
        Stage(
            "update_4b",
            "trainer",
            120,
            "update:update",
            "Policy updates at Qwen3-4B's shape",
            _POLICY,
            # `engine` has this model's turns; with 16384 tokens a micro-batch it takes all of an H200
            options={"model": "qwen3-4b", "budget": 12288, "updates": 3, "turns": False},
        ),
        # last: it takes what the figures leave of the part's time
        Stage("tests", "trainer", 100, "environment:tests", "`make test-gpu`", ("pytest",)),
        Stage("engine", "engine", 150, "engine:engine", "vLLM in turns with a policy of Qwen3-4B's shape", _VLLM),
        *(
            Stage(
                f"agreement_{dtype}",
                "engine",
                90,
                "engine:agreement",
                f"vLLM's log-probs against the policy's, its head in {said}",
                _VLLM,
                options={"head_dtype": dtype},
            )
            for dtype, said in (("model", "the model's dtype"), ("float32", "fp32"))
        ),
        Stage("quickstart", "engine", 120, "runs:quickstart", "30 steps of the quickstart, in turns with vLLM", _RUN),
        Stage(
            "deterministic",
            "engine",
            90,
            "runs:deterministic",
            "Deterministic mode: stopped, resumed, the same bits",
            _TASK,
        ),
        Stage("layouts", "many", 400, "many:layouts", "Losses on two GPUs against one GPU's", _POLICY, gpus=2),
        *(
            Stage(
                f"server_{way}",
                "many",
                180,
                "many:server",
                f"A server on a second GPU, weights by {way}",
                _RUN,
                gpus=2,
                options={"way": way, "ranks": ranks},
            )
            for way, ranks in (("nccl", 1), ("sparse_nccl", 1), ("ipc", 2))
        ),
    )
}
