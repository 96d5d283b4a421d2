"""Reading a Hugging Face folder's weights: safetensors, single or sharded; where asked for, the older ``.bin`` too."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_dypo.convert.mapping import hf_shapes, last_names
from megatron_dypo.convert.rules import HEAD
from megatron_dypo.errors import UserError
from megatron_dypo.policy.shape import ModelShape
from megatron_dypo.runtime.plain_name import is_plain


def folder_weights(folder: str | Path, allow_bin: bool = False) -> Callable[[str], Tensor]:
    """``read(name)`` over the folder's tensors; only the one asked for is loaded.

    ``allow_bin``: read ``pytorch_model*.bin``, a pickle, where there are no safetensors; nothing in it is run. Raises
    UserError naming file and tensor: no weights, missing shard, damaged file, absent tensor.
    """
    folder = Path(folder)
    _, where = _contents(folder, allow_bin)

    def read(name: str) -> Tensor:
        if name not in where:
            raise UserError(f"{folder}: tensor {name} is missing")
        return _open(where[name]).get_tensor(name)

    return read


def check_folder(folder: str | Path, shape: ModelShape, allow_bin: bool = False) -> None:
    """Raise UserError naming file and tensor unless the folder holds exactly the model's tensors, in their shapes.

    Only the files' headers are read. What a checkpoint may hold besides: a tied model's head, and rotary frequencies.
    """
    listing, where = _contents(Path(folder), allow_bin)
    for last in last_names(shape):  # before a number of layers or experts that is none makes a table of their tensors
        if last not in where:
            raise UserError(f"{listing}: tensor {last} is missing")
    expected = hf_shapes(shape)
    opened = {file: _open(file) for file in set(where.values())}
    held = {file: set(shard.keys()) for file, shard in opened.items()}
    for file, names in held.items():
        for name in names:
            if where.get(name, file) != file:
                raise UserError(f"{file}: tensor {name} is also in {where[name]}, which the index names")
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


def _contents(folder: Path, allow_bin: bool) -> tuple[Path, dict[str, Path]]:
    """The file that lists the folder's tensors, and which file holds each; every file can be opened."""
    stem, suffix = "model", "safetensors"
    if not any(folder.glob("*.safetensors*")) and (pickles := sorted(folder.glob("pytorch_model*.bin"))):
        if not allow_bin:
            raise UserError(f"{pickles[0]}: a pickle, and no safetensors beside it; `convert import --bin` reads it")
        stem, suffix = "pytorch_model", "bin"
    index = folder / f"{stem}.{suffix}.index.json"
    if index.exists():
        try:
            shards = json.loads(index.read_text())["weight_map"].items()
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{index}: not an index of {suffix} files: {error!r}") from None
        if strange := [shard for _, shard in shards if not is_plain(shard)]:
            raise UserError(f"{index}: {strange[0]!r:.80} is no file of this folder")
        where = {name: folder / shard for name, shard in shards}
        for shard in set(where.values()):
            _open(shard)
        return index, where
    single = folder / f"{stem}.{suffix}"
    if single.exists():
        return single, dict.fromkeys(_open(single).keys(), single)
    raise UserError(f"{folder}: no model.safetensors and no model.safetensors.index.json")


def _open(path: Path):
    """An open file of safetensors, or what can be asked the same of a ``.bin``."""
    if path.suffix == ".bin":
        return _open_bin(path)
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None


class _Bin:
    """A ``.bin`` as safetensors are asked; torch maps the file, so that tensors take memory when they are read."""

    def __init__(self, path: Path):
        from transformers.modeling_utils import load_state_dict

        self._tensors = load_state_dict(path, weights_only=True)
        if not all(isinstance(tensor, Tensor) for tensor in self._tensors.values()):
            raise ValueError("it holds more than tensors")

    def keys(self) -> list[str]:
        return list(self._tensors)

    def get_tensor(self, name: str) -> Tensor:
        return self._tensors[name].clone()

    def get_slice(self, name: str) -> _BinSlice:
        return _BinSlice(self._tensors[name])


class _BinSlice:
    def __init__(self, tensor: Tensor):
        self._tensor = tensor

    def get_shape(self) -> list[int]:
        return list(self._tensor.shape)


@functools.cache
def _open_bin(path: Path) -> _Bin:
    try:
        return _Bin(path)
    except Exception as error:  # whatever torch raises on a file that is none of its own, or holds more than tensors
        raise UserError(f"{path}: cannot be read: {type(error).__name__}: {error}") from None
