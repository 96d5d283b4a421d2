"""Reading a Hugging Face folder's safetensors, single or sharded; writing the config folder an engine starts from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_dypo.errors import UserError
from megatron_dypo.policy.shape import ModelShape


def folder_weights(folder: str | Path) -> Callable[[str], Tensor]:
    """``read(name)`` over the folder's safetensors; only the tensor asked for is loaded.

    Raises UserError naming file and tensor: no safetensors, missing shard, damaged file, absent tensor.
    """
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            where = {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index}: not an index of safetensors: {error!r}") from None
        for shard in set(where.values()):
            _open(shard)
    elif (folder / "model.safetensors").exists():
        single = folder / "model.safetensors"
        where = dict.fromkeys(_open(single).keys(), single)
    else:
        raise UserError(f"{folder}: no model.safetensors and no model.safetensors.index.json")

    def read(name: str) -> Tensor:
        if name not in where:
            raise UserError(f"{folder}: tensor {name} is missing")
        return _open(where[name]).get_tensor(name)

    return read


def _open(path: Path):
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None


def write_config(shape: ModelShape, folder: Path, eos_id: int) -> None:
    """``config.json`` and ``generation_config.json`` of the shape, without weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(shape.to_hf_config() | {"eos_token_id": eos_id}, indent=2))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos_id}, indent=2))
