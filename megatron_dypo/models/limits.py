"""Check what a model supports: the layouts that divide it, and the options that apply to it."""

from __future__ import annotations

import math
from collections.abc import Iterator

from megatron_dypo.config.schema import Config, Parallel, PolicyOptions
from megatron_dypo.errors import UserError
from megatron_dypo.models.shape import ModelShape


def check_layout(parallel: Parallel, shape: ModelShape, world_size: int, source: str) -> None:
    """Raise UserError if the layout does not divide the model or the ranks (0: not known yet)."""
    heads, query_groups, layers = shape.num_attention_heads, shape.num_query_groups, shape.num_layers
    tensor, pipeline, virtual = parallel.tensor, parallel.pipeline, parallel.virtual_pipeline
    replica = {"tensor": tensor, "pipeline": pipeline} | ({"context": parallel.context} if parallel.context > 1 else {})
    ranks = math.prod(replica.values())
    width = shape.shared_expert_ffn_hidden_size if shape.num_experts else shape.ffn_hidden_size
    product = " x ".join(f"parallel.{name}" for name in replica) + " = " + " x ".join(map(str, replica.values()))
    for broken, message in (
        (world_size % ranks, f"{product} does not divide the {world_size} ranks"),
        (virtual > 1 and pipeline == 1, "parallel.virtual_pipeline: needs parallel.pipeline > 1"),
        (heads % tensor, f"parallel.tensor: {tensor} does not divide the model's {heads} attention heads"),
        (
            query_groups % tensor,
            f"parallel.tensor: {tensor} does not divide the model's {query_groups} key/value heads",
        ),
        (
            width % tensor,
            f"parallel.tensor: {tensor} does not divide the model's MLP width {width}",
        ),
        *_expert_faults(parallel, shape, world_size),
        (layers % pipeline, f"parallel.pipeline: {pipeline} does not divide the model's {layers} layers"),
        (
            layers % (pipeline * virtual),
            f"parallel.pipeline x parallel.virtual_pipeline = {pipeline} x {virtual} does not divide "
            f"the model's {layers} layers",
        ),
        (
            8 % tensor,
            f"parallel.tensor: {tensor} must divide 8 (the vocabulary is padded to a multiple of 1024 and cut in 8)",
        ),
    ):
        if broken:
            raise UserError(f"{source}: {message}")


def check_policy(policy: PolicyOptions, shape: ModelShape, source: str) -> None:
    """Raise UserError if a key of mixtures of experts is set for a dense model."""
    for name, info in PolicyOptions.model_fields.items():
        if not shape.num_experts and getattr(policy, name) != info.default:
            raise UserError(f"{source}: policy.{name}: {getattr(policy, name)}, but the model has no experts")


def check_window(config: Config, shape: ModelShape, source: str) -> None:
    """Raise UserError if the longest prompt and response do not fit into the model."""
    if config.window > shape.max_position:
        raise UserError(
            f"{source}: data.max_prompt_tokens + the longer of rollout.max_response_tokens and "
            f"evaluation.max_response_tokens = {config.window} exceeds the model's limit of {shape.max_position}"
        )


def _expert_faults(parallel: Parallel, shape: ModelShape, world_size: int) -> Iterator[tuple[object, str]]:
    """Yield (broken, message) for each rule of a layout's experts, as ``check_layout`` reads them."""
    expert, cut = parallel.expert, parallel.expert_tensor
    if not shape.num_experts:
        for name, value in (("expert", expert), ("expert_tensor", cut)):
            yield value > 1, f"parallel.{name}: {value}, but the model has no experts"
        return
    ranks = expert * cut * parallel.pipeline
    yield (
        shape.num_experts % expert,
        f"parallel.expert: {expert} does not divide the model's {shape.num_experts} experts",
    )
    yield (
        shape.ffn_hidden_size % cut,
        f"parallel.expert_tensor: {cut} does not divide the width of an expert: {shape.ffn_hidden_size}",
    )
    yield (
        world_size % ranks,
        f"parallel.expert x parallel.expert_tensor x parallel.pipeline = {expert} x {cut} x {parallel.pipeline} "
        f"does not divide the {world_size} ranks",
    )
    yield (
        parallel.tensor > 1 and not parallel.sequence_parallel,
        "parallel.sequence_parallel: a mixture of experts needs it with parallel.tensor > 1 (the ranks share out the "
        "tokens that they route)",
    )
