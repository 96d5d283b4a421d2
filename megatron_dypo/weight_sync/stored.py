"""Read back the weights in a vLLM worker's layers, under Hugging Face names, from where the forward pass takes them.

A weight is normally its layer's parameter. On a CPU, however, a matrix is packed for its kernel (oneDNN): multiplying
unit vectors by the layer recovers it exactly; and experts are packed in place, in an order found by packing indices.
This file does not depend on how weights are loaded. Legend: K inputs and N outputs of a layer, on this worker.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.linear import ColumnParallelLinear, LinearBase, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from megatron_dypo.weight_sync.checksum import checksum

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
ROWS = 256  # unit vectors at a time
AS_LOADED = ("TRITON", "BATCHED_TRITON")  # vLLM backends that keep experts in the order they are loaded in


@dataclass(frozen=True)
class Stored:
    """One tensor of a worker: ``cut`` takes the worker's part of a full tensor, ``read`` returns what it holds.

    ``by_product``: ``read`` goes through a kernel, which does not distinguish the signs of zero and flushes subnormals.
    """

    cut: Callable[[Tensor], Tensor]
    read: Callable[[], Tensor]
    by_product: bool = False

    def checksum(self, tensor: Tensor) -> str:
        """Return the checksum of what is cut or read, as precisely as ``read`` can tell."""
        if self.by_product:
            tensor = tensor.masked_fill(tensor.abs() < torch.finfo(tensor.dtype).tiny, 0)
        return checksum(tensor)


def stored_tensors(model: torch.nn.Module) -> dict[str, Stored]:
    """Return all of this worker's tensors that can be read back, by Hugging Face name."""
    found: dict[str, Stored] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, LinearBase):
            found.update(_linear(prefix, module))
        elif isinstance(module, VocabParallelEmbedding):
            found[f"{prefix}.weight"] = _vocabulary(module)
        elif hasattr(module, "w13_weight"):
            found.update(_experts(prefix, module))
        else:
            for name, _ in module.named_parameters(recurse=False):
                found[f"{prefix}.{name}"] = Stored(lambda full: full, functools.partial(getattr, module, name))
    return found


def packed_layers(model: torch.nn.Module) -> Iterator[str]:
    """Yield the names of the layers whose kernel stores weights in another order than they are loaded in."""
    for prefix, module in model.named_modules():
        if hasattr(module, "cpu_linear") or (hasattr(module, "w13_weight") and _backend(module) not in AS_LOADED):
            yield prefix


def _linear(prefix: str, layer: LinearBase) -> Iterator[tuple[str, Stored]]:
    stem, _, last = prefix.rpartition(".")
    names = [f"{stem}.{name}" for name in FUSED.get(last, (last,))]
    at = 0
    for name, (size, rank) in zip(names, _outputs(layer), strict=True):
        rows = slice(at, at + size)
        keep = functools.partial(_part, dim=0, size=size, rank=rank)
        if isinstance(layer, RowParallelLinear):
            keep = functools.partial(_part, dim=1, size=layer.input_size_per_partition, rank=layer.tp_rank)
        yield f"{name}.weight", Stored(keep, functools.partial(_rows, layer, rows), hasattr(layer, "cpu_linear"))
        if getattr(layer, "bias", None) is not None:
            own = functools.partial(_part, dim=0, size=size, rank=rank)
            yield f"{name}.bias", Stored(own, functools.partial(_bias, layer, rows))
        at += size


def _outputs(layer: LinearBase) -> list[tuple[int, int]]:
    """Return (rows on this worker, index of its share) of each matrix fused in a layer."""
    if isinstance(layer, QKVParallelLinear):
        keys = layer.num_kv_heads * layer.head_size, layer.tp_rank // layer.num_kv_head_replicas
        return [(layer.num_heads * layer.head_size, layer.tp_rank), keys, keys]
    if isinstance(layer, ColumnParallelLinear):
        return [(size, layer.tp_rank) for size in layer.output_partition_sizes]
    return [(layer.output_size, 0)]


def _part(full: Tensor, dim: int, size: int, rank: int) -> Tensor:
    return full.narrow(dim, rank * size, size)


def _bias(layer: Any, rows: slice) -> Tensor:
    return layer.bias[rows]


def _rows(layer: Any, rows: slice) -> Tensor:
    return matrix(layer)[rows]


@functools.lru_cache(maxsize=1)
def matrix(layer: Any) -> Tensor:
    """Return the weight [N, K] of a layer's product. It is cached for the other tensors fused in it: clear the cache
    before loading.
    """
    product = getattr(layer, "cpu_linear", None)
    if product is None:
        return layer.weight
    sizes = (getattr(layer, name, None) for name in ("input_size_per_partition", "input_size", "embedding_dim"))
    inputs = next(size for size in sizes if size)
    units_KK = torch.eye(inputs, dtype=layer.weight.dtype)
    return torch.cat([product(units, layer.weight, None) for units in units_KK.split(ROWS)]).t()


def _vocabulary(layer: Any) -> Stored:
    """Return this worker's rows without padding. A head is read by a product; an embedding's rows are looked up."""
    shard = layer.shard_indices
    rows = slice(0, shard.num_org_elements)
    keep = slice(shard.org_vocab_start_index, shard.org_vocab_end_index)
    if isinstance(layer, ParallelLMHead):
        return Stored(lambda full: full[keep], functools.partial(_rows, layer, rows), hasattr(layer, "cpu_linear"))
    return Stored(lambda full: full[keep], lambda: layer.weight[rows])


def _experts(prefix: str, layer: Any) -> Iterator[tuple[str, Stored]]:
    """Yield all experts; those on other workers are empty. Yield nothing if the kernel's order is not known."""
    order = _order(layer)
    if order is None:
        return
    stem = prefix.partition(".experts")[0] + ".experts"
    rank, size = layer.moe_config.tp_rank, layer.moe_config.tp_size
    width = layer.moe_config.intermediate_size_per_partition
    numbers = range(layer.global_num_experts) if layer.expert_map is None else layer.expert_map.tolist()
    for expert, local in enumerate(numbers):
        for name, fused, half, dim in (
            (layer.ckpt_gate_proj_name, "w13_weight", 0, 0),
            (layer.ckpt_up_proj_name, "w13_weight", 1, 0),
            (layer.ckpt_down_proj_name, "w2_weight", None, 1),
        ):
            keep = functools.partial(_share, dim=dim, size=size, rank=rank)
            read = functools.partial(_expert, layer, fused, local, half, width, order)
            stored = Stored(keep, read) if local >= 0 else Stored(lambda full: full[:0], lambda: torch.empty(0))
            yield f"{stem}.{expert}.{name}.weight", stored


def _share(full: Tensor, dim: int, size: int, rank: int) -> Tensor:
    return full.chunk(size, dim)[rank]


def _expert(
    layer: Any, fused: str, local: int, half: int | None, width: int, order: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return one expert's matrix without the kernel's padding."""
    packed = getattr(layer, fused)[local]
    plain = packed.flatten()[order(packed)].view(packed.shape)
    if half is None:
        return plain[:, :width]
    padded = len(plain) // 2
    return plain[half * padded : half * padded + width]


def _backend(layer: Any) -> str:
    """Return vLLM's name of the kernel backend of an expert layer; empty if it has none."""
    return getattr(getattr(layer.quant_method, "unquantized_backend", None), "name", "")


def _order(layer: Any) -> Callable[[Tensor], Tensor] | None:
    """Return a function from an expert's packed matrix to the index of each plain element; None if it is not known."""
    backend = _backend(layer)
    if backend in AS_LOADED:
        return lambda packed: torch.arange(packed.numel(), device=packed.device)
    kernel: Any = getattr(getattr(layer.quant_method, "moe_kernel", None), "fused_experts", None)
    if backend == "CPU" and hasattr(kernel, "isa") and not kernel._use_zentorch:
        return lambda packed: _packed_order(tuple(packed.shape), packed.dtype, kernel.isa)
    return None


@functools.lru_cache(maxsize=8)
def _packed_order(shape: tuple[int, int], dtype: torch.dtype, isa: str) -> Tensor:
    """Return where vLLM's packing puts each element, by packing indices, one byte at a time: any dtype holds a byte."""
    from vllm._custom_ops import cpu_prepack_moe_weight

    number = torch.arange(shape[0] * shape[1])
    came_from = torch.zeros_like(number)
    for bit in range(0, len(number).bit_length(), 8):
        digit = (number >> bit & 255).to(dtype).view(1, *shape)
        came_from += cpu_prepack_moe_weight(digit, isa).flatten().long() << bit
    order = torch.empty_like(number)
    order[came_from] = number
    return order
