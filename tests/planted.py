"""Faults planted in what a vLLM engine receives, and in what its layers store; and the sync's message for each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from megatron_dypo.errors import TrainingError
from tests.agreement import EXPERT_LAYOUTS, LAYOUTS, policy_at

VALUE, OUTPUT = "model.layers.1.self_attn.v_proj.weight", "model.layers.0.self_attn.o_proj.weight"
KEY = "model.layers.1.self_attn.k_proj.weight"  # vLLM counts elements: sent twice, it is taken for the values


def nudged(weight: Tensor) -> Tensor:
    """Change its last element by the smallest step."""
    weight = weight.clone()
    last = weight.view(-1)[-1]
    last.copy_(torch.nextafter(last, torch.tensor(torch.inf)))
    return weight


def packed_anew(layer: str, change: Callable[[Tensor], Tensor], model: torch.nn.Module) -> None:
    """Change what a layer's product uses; its ``weight`` stays, like that of a head tied to another."""
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    from megatron_dypo.weight_sync.stored import matrix

    module = model.get_submodule(layer)
    kept, weight = module.weight, change(matrix(module).contiguous())
    matrix.cache_clear()
    module.weight = torch.nn.Parameter(weight, requires_grad=False)
    dispatch_cpu_unquantized_gemm(module, remove_weight=False)
    module.weight = kept


def in_place(layer: str, name: str, model: torch.nn.Module) -> None:
    tensor = getattr(model.get_submodule(layer), name).data
    tensor.copy_(nudged(tensor))


def other_expert(model: torch.nn.Module) -> None:
    weight = model.get_submodule("model.layers.0.mlp.experts.routed_experts").w2_weight.data
    weight[2] = weight[3]


def nudged_expert(model: torch.nn.Module) -> None:
    weight = model.get_submodule("model.layers.1.mlp.experts.routed_experts").w13_weight.data
    weight[-1] = nudged(weight[-1])  # the plain matrix's last element is in its last row, wherever packing puts it


STORED = {
    "qwen2-tied": {
        VALUE: partial(packed_anew, "model.layers.1.self_attn.qkv_proj", nudged),
        OUTPUT: partial(packed_anew, "model.layers.0.self_attn.o_proj", lambda weight: weight.t().contiguous()),
        "model.layers.0.mlp.up_proj.weight": partial(packed_anew, "model.layers.0.mlp.gate_up_proj", nudged),
        "lm_head.weight": partial(packed_anew, "lm_head", nudged),
        "model.embed_tokens.weight": partial(in_place, "model.embed_tokens", "weight"),
        "model.layers.1.self_attn.v_proj.bias": partial(in_place, "model.layers.1.self_attn.qkv_proj", "bias"),
    },
    "qwen3_moe": {
        "model.layers.1.mlp.experts.7.up_proj.weight": nudged_expert,
        "model.layers.0.mlp.experts.2.down_proj.weight": other_expert,
        "model.layers.0.mlp.gate.weight": partial(packed_anew, "model.layers.0.mlp.gate", nudged),
        "model.layers.1.self_attn.q_norm.weight": partial(in_place, "model.layers.1.self_attn.q_norm", "weight"),
    },
}


@contextmanager
def before_the_report(plant: Callable[[torch.nn.Module], None]) -> Iterator[None]:
    """Change the engine's model after it has loaded."""
    from megatron_dypo.weight_sync.worker import Proof

    plain = Proof.report

    def report(self) -> dict:
        plant(self._model)
        return plain(self)

    Proof.report = report
    try:
        yield
    finally:
        Proof.report = plain


def said(engine, weights) -> str:
    """Return a sync's error message, or ""."""
    try:
        engine.sync(weights)
    except TrainingError as error:
        return str(error)
    return ""


class Altered:
    """A policy's weights, each replaced by the pairs from ``change(name, tensor)``."""

    def __init__(self, policy, change: Callable[[str, Tensor], list[tuple[str, Tensor]]]):
        from megatron_dypo.weight_sync.source import Weights

        self._weights, self._change = Weights(policy), change
        self.version, self.metadata = policy.version, self._weights.metadata

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self._weights:
            yield from self._change(name, tensor)


GIVEN = {  # the sync's message, and how the weights are altered on their way
    f"{OUTPUT}: was not received": lambda name, tensor: [] if name == OUTPUT else [(name, tensor)],
    f"{KEY}: was received 2 times": lambda name, tensor: [(name, tensor)] * (1 + (name == KEY)),
}


def planted(model: str, config, shape, layout, engine) -> dict[str, dict[str, str]]:
    """Return by layout and fault this rank's sync message; only rank 1's layers are changed.

    The engine verifies all tensors at every sync.
    """
    from megatron_dypo.weight_sync.source import Weights

    found: dict[str, dict[str, str]] = {}
    for parallel in EXPERT_LAYOUTS if shape.num_experts else LAYOUTS:
        policy = policy_at(parallel, 3, config, shape, layout)
        here = found[str(parallel)] = {}
        for name, plant in STORED[model].items():
            with before_the_report(plant if layout.rank == 1 else lambda model: None):
                here[name] = said(engine, Weights(policy))
        here |= {fault: said(engine, Altered(policy, change)) for fault, change in GIVEN.items()}
        here["none"] = said(engine, Weights(policy))
    name, plant = next(iter(STORED[model].items()))
    with before_the_report(plant):
        engine._verify = "sent"
        found["sent"] = {name: said(engine, Weights(policy))}
        engine._verify, engine._verify_syncs = "stored", 4
        found["in turn"] = {}
        for turn in range(4):
            engine._syncs = turn  # a sync that stops the run is not counted
            found["in turn"][str(turn)] = said(engine, Weights(policy))
    return found
