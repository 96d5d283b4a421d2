"""Read and write a Hugging Face folder's weights: safetensors, single or sharded; on request also the older ``.bin``.

Writing holds one tensor in memory at a time. The format: the header's length (8 bytes, little-endian), the header
(JSON: name -> dtype, shape, offsets), the tensors. Sizes are known beforehand, so no shard has to be buffered.
"""

from __future__ import annotations

import functools
import json
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_dypo.errors import UserError
from megatron_dypo.models.families import hf_shapes, last_names
from megatron_dypo.models.rules import EMBEDDING, HEAD
from megatron_dypo.models.shape import ModelShape
from megatron_dypo.runtime.distributed import launch_rank
from megatron_dypo.runtime.fs import is_safe_name, new_file

# File names of a folder's weights; if there are several, transformers loads the first.
LAYOUTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
ADAPTER = "adapter_config.json"  # PEFT's; transformers applies it to the weights if PEFT is installed
ROWS = 2048  # rows of head and embedding compared at a time

log = logging.getLogger(__name__)


def folder_weights(folder: str | Path, allow_bin: bool = False) -> Callable[[str], Tensor]:
    """Return ``read(name)`` over the folder's tensors; it loads only the tensor asked for.

    ``allow_bin``: read ``pytorch_model*.bin``, a pickle, if there are no safetensors; its code is never run. Raises
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

    Only file headers are read, except for a tied model's head. A checkpoint may also hold that head, if it equals the
    embedding, and rotary frequencies.
    """
    listing, where = _contents(Path(folder), allow_bin)
    if launch_rank() == 0:
        _warn_of_a_second_set(Path(folder))
    for last in last_names(shape):  # before an absurd number of layers or experts becomes a table of their tensors
        if last not in where:
            raise UserError(f"{listing}: tensor {last} is missing")
    expected = hf_shapes(shape)
    opened = {file: _open(file) for file in set(where.values())}
    for name, size in expected.items():
        if name not in where:
            raise UserError(f"{listing}: tensor {name} is missing")
        tensor = opened[where[name]].get_slice(name)
        if tuple(tensor.get_shape()) != size:
            found = f"tensor {name} has shape {tensor.get_shape()}, but config.json makes it {list(size)}"
            raise UserError(f"{where[name]}: {found}")
        if tensor.get_dtype() not in CODES.values():
            known = ", ".join(CODES.values())
            raise UserError(f"{where[name]}: tensor {name} is {tensor.get_dtype()}, which is not read; known: {known}")
    for name, file in where.items():
        spare = name.endswith(".rotary_emb.inv_freq") or (shape.tied_embeddings and name == HEAD)
        if name not in expected and not spare:
            raise UserError(f"{file}: tensor {name} has no place in a model of family {shape.family}")
    if shape.tied_embeddings and HEAD in where:
        pair = [opened[where[name]].get_slice(name) for name in (HEAD, EMBEDDING)]
        if not _equal(*pair):
            raise UserError(
                f"{where[HEAD]}: tensor {HEAD} is not the embedding, though config.json says tie_word_embeddings: "
                "set that to false to keep this head, as transformers does, or remove the tensor"
            )


def _equal(head, embedding) -> bool:
    """Return whether two tensors, as slices of their files, are equal; reads some rows at a time."""
    rows = head.get_shape()[0]
    return head.get_shape() == embedding.get_shape() and all(
        torch.equal(head[at : at + ROWS].float(), embedding[at : at + ROWS].float()) for at in range(0, rows, ROWS)
    )


def _contents(folder: Path, allow_bin: bool) -> tuple[Path, dict[str, Path]]:
    """Return the file that lists the folder's tensors, and the file of each tensor; every file can be opened.

    Of several sets of weights, it is the one that transformers loads.
    """
    there = [folder / name for name in LAYOUTS if (folder / name).is_file()]
    if not there:
        raise UserError(f"{folder}: no model.safetensors and no model.safetensors.index.json")
    listing = there[0]
    if listing.name.startswith("pytorch_model") and not allow_bin:
        kind = "a pickle" if listing.suffix == ".bin" else "an index of pickles"
        raise UserError(f"{listing}: {kind}, and there are no safetensors; `convert import --bin` reads it")
    if listing.suffix != ".json":
        return listing, dict.fromkeys(_open(listing).keys(), listing)
    named = _weight_map(listing)
    where: dict[str, Path] = {}
    for file in sorted(set(named.values())):
        for name in _open(file).keys():  # noqa: SIM118 - no mapping
            if (first := where.setdefault(name, file)) != file:
                raise UserError(f"{file}: tensor {name} is also in {first}")
    for name, file in named.items():
        if where.get(name) != file:
            raise UserError(f"{file}: tensor {name} is missing")
    return listing, where


def _weight_map(index: Path) -> dict[str, Path]:
    """Return tensor -> file from an index of shards."""
    try:
        shards = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{index}: not an index of shards: {error!r}") from None
    if strange := [shard for shard in shards.values() if not is_safe_name(shard)]:
        raise UserError(f"{index}: {strange[0]!r:.80} is not a file of this folder")
    return {name: index.parent / shard for name, shard in shards.items()}


def _warn_of_a_second_set(folder: Path) -> None:
    """Log a warning if a folder holds two full sets of safetensors, of which one is ignored, or an adapter."""
    if (folder / ADAPTER).is_file():
        log.warning("%s: %s is not read: unless merged into the weights, its adapter is left out", folder, ADAPTER)
    single, index = (folder / name for name in LAYOUTS[:2])
    if single.is_file() and index.is_file() and all(file.is_file() for file in set(_weight_map(index).values())):
        log.warning(
            "%s: holds two sets of weights: %s is read, as transformers does, not the shards of %s; remove the old one",
            folder,
            single.name,
            index.name,
        )


def _open(path: Path):
    """Open a file of safetensors, or a ``.bin`` behind the same interface."""
    if path.suffix == ".bin":
        return _open_bin(path)
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None


class _Bin:
    """A ``.bin`` with the interface of safetensors; torch maps the file, so tensors take memory only when read."""

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

    def get_dtype(self) -> str:
        return CODES.get(self._tensor.dtype, str(self._tensor.dtype))

    def __getitem__(self, rows: slice) -> Tensor:
        return self._tensor[rows]


@functools.cache
def _open_bin(path: Path) -> _Bin:
    try:
        return _Bin(path)
    except Exception as error:  # whatever torch raises for a foreign file, or one with more than tensors
        raise UserError(f"{path}: cannot be read: {type(error).__name__}: {error}") from None


INDEX = "model.safetensors.index.json"
CODES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def plan_shards(sizes: Mapping[str, int], limit: int) -> dict[str, list[str]]:
    """Return file name -> tensor names, in the order of ``sizes`` (bytes): at most ``limit`` bytes, or one tensor."""
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
    """Write the tensors of ``shapes`` and sync to disk; ``read(name)`` gives each in its dtype. Raises OSError."""
    header: dict = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * dtypes[name].itemsize
        header[name] = {"dtype": CODES[dtypes[name]], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with new_file(path) as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in shapes:
            stream.write(read(name).contiguous().flatten().view(torch.uint8).numpy().data)


def write_index(folder: Path, shards: Mapping[str, list[str]], total: int) -> None:
    """Write ``model.safetensors.index.json``, if there is more than one shard. Raises OSError."""
    if len(shards) > 1:
        where = {name: file for file, names in shards.items() for name in names}
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2))
