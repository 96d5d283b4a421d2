"""Reading a Hugging Face folder's safetensors, single or sharded; writing the config folder an engine starts from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_dypo.convert.mapping import hf_shapes
from megatron_dypo.convert.rules import HEAD
from megatron_dypo.errors import UserError
from megatron_dypo.policy.shape import ModelShape
from megatron_dypo.runtime.plain_name import is_plain


def folder_weights(folder: str | Path) -> Callable[[str], Tensor]:
    """``read(name)`` over the folder's safetensors; only the tensor asked for is loaded.

    Raises UserError naming file and tensor: no safetensors, missing shard, damaged file, absent tensor.
    """
    folder = Path(folder)
    _, where = _contents(folder)

    def read(name: str) -> Tensor:
        if name not in where:
            raise UserError(f"{folder}: tensor {name} is missing")
        return _open(where[name]).get_tensor(name)

    return read


def check_folder(folder: str | Path, shape: ModelShape) -> None:
    """Raise UserError naming file and tensor unless the folder holds exactly the model's tensors, in their shapes.

    Only the files' headers are read. What a checkpoint may hold besides: a tied model's head, and rotary frequencies.
    """
    listing, where = _contents(Path(folder))
    last = f"model.layers.{shape.num_layers - 1}.input_layernorm.weight"
    if last not in where:  # before a number of layers that is none makes a table of their tensors
        raise UserError(f"{listing}: tensor {last} is missing")
    expected = hf_shapes(shape)
    opened = {file: _open(file) for file in set(where.values())}
    held = {file: set(shard.keys()) for file, shard in opened.items()}
    for name, size in expected.items():
        file = where.get(name, listing)
        if name not in held.get(file, ()):
            raise UserError(f"{file}: tensor {name} is missing")
        found = opened[file].get_slice(name).get_shape()
        if tuple(found) != size:
            raise UserError(f"{file}: tensor {name} has shape {found}, but config.json makes it {list(size)}")
    for name, file in where.items():
        spare = name.endswith(".rotary_emb.inv_freq") or (shape.tied_embeddings and name == HEAD)
        if name not in expected and not spare:
            raise UserError(f"{file}: tensor {name} has no place in a model of family {shape.family}")


def _contents(folder: Path) -> tuple[Path, dict[str, Path]]:
    """The file that lists the folder's tensors, and which file holds each; every file can be opened."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            shards = json.loads(index.read_text())["weight_map"].items()
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{index}: not an index of safetensors: {error!r}") from None
        if strange := [shard for _, shard in shards if not is_plain(shard)]:
            raise UserError(f"{index}: {strange[0]!r:.80} is no file of this folder")
        where = {name: folder / shard for name, shard in shards}
        for shard in set(where.values()):
            _open(shard)
        return index, where
    single = folder / "model.safetensors"
    if single.exists():
        return single, dict.fromkeys(_open(single).keys(), single)
    raise UserError(f"{folder}: no model.safetensors and no model.safetensors.index.json")


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
