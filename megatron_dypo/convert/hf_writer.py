"""Writing a Hugging Face folder's weights: safetensors in shards, one tensor in memory at a time.

The format: the header's length (8 bytes, little-endian), the header (JSON: name -> dtype, shape, place), the tensors.
Sizes are known beforehand, so nothing has to be held back until a shard is whole.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

INDEX = "model.safetensors.index.json"
CODES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def plan_shards(sizes: Mapping[str, int], limit: int) -> dict[str, list[str]]:
    """File name -> names of its tensors, in the order of ``sizes`` (bytes): at most ``limit`` bytes, or one tensor."""
    shards: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not shards or size > room:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= size
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": names for i, names in enumerate(shards, start=1)}


def write_shard(
    path: Path, shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, torch.dtype], read: Callable[[str], Tensor]
) -> None:
    """Write the tensors of ``shapes`` down to the disk; ``read(name)`` gives each in its dtype. Raises OSError."""
    header: dict = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * dtypes[name].itemsize
        header[name] = {"dtype": CODES[dtypes[name]], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in shapes:
            stream.write(read(name).contiguous().flatten().view(torch.uint8).numpy().data)
        stream.flush()
        os.fsync(stream.fileno())


def write_index(folder: Path, shards: Mapping[str, list[str]], total: int) -> None:
    """``model.safetensors.index.json``, where there is more than one shard. Raises OSError."""
    if len(shards) > 1:
        where = {name: file for file, names in shards.items() for name in names}
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2))
