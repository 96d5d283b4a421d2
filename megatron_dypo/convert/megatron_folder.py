"""Read and write a Megatron checkpoint on disk, one weight at a time, without building a model or choosing a layout.

The format is mcore's ``torch_dist``, in which a weight is the whole model's whatever layout wrote it: layers stacked
along a first axis, experts along a second, q, k and v in groups, gate above up. So a weight folds and unfolds as at TP
1.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem

from megatron_dypo.checkpoint.catalog import complete_steps, step_folder
from megatron_dypo.checkpoint.io import TensorPiece, read_index
from megatron_dypo.config.reads import SIDED
from megatron_dypo.errors import UserError
from megatron_dypo.models.families import rules, stored_norms
from megatron_dypo.models.rules import WeightRule
from megatron_dypo.models.shape import ModelShape

_LAYERS = "decoder.layers."
_NO_WEIGHT = "._extra_state"  # what Transformer Engine stores next to weights (FP8 scales)
_WEIGHTS = ("decoder", "embedding", "output_layer")  # prefixes of weight names; optimizer state has others


def checkpoint_folder(path: Path) -> Path:
    """Return the checkpoint at ``path``, or a run folder's newest complete one. Raises UserError if there is none.

    A legacy checkpoint of Megatron-LM is refused by name: it is a pickle of arbitrary objects, cut for one layout.
    """
    if steps := complete_steps(path):
        return step_folder(path, steps[-1])
    if (path / ".metadata").is_file():
        return path
    for pattern in ("mp_rank_*", "iter_*/mp_rank_*"):
        if legacy := next(path.glob(pattern), None):
            raise UserError(
                f"{legacy}: a legacy checkpoint of Megatron-LM; rewrite it with Megatron-LM's own "
                "tools/checkpoint/convert.py --saver core (or train on with --ckpt-format torch_dist), and give that"
            )
    raise UserError(f"{path}: holds no checkpoint: neither .metadata nor a complete checkpoints/step_N")


class MegatronFolder:
    """Give the Hugging Face tensors of a checkpoint: ``read(name)`` returns one, whole, and holds one weight in memory.

    ``model`` is the prefix of its tensor names: ``SIDE`` for a second model. Raises UserError naming file and tensor:
    no index, no such model, absent weight, wrong shape.
    """

    def __init__(self, folder: Path, shape: ModelShape, model: str = ""):
        self.folder, self.shape = folder, shape
        index = read_index(folder / ".metadata")
        self._entries = {
            name.removeprefix(model): entry
            for name, entry in index.state_dict_metadata.items()
            if name.startswith(model)
        }
        if not self._entries:
            raise UserError(f"{folder}: holds no second model (objective.method: {' or '.join(SIDED)} trains one)")
        self._stored = {
            (at.fqn.removeprefix(model), tuple(at.offset)): at
            for at in index.storage_data
            if at.offset is not None and at.fqn.startswith(model)
        }
        self._files = {at: place.relative_path for at, place in index.storage_data.items()}
        self._reader = FileSystemReader(folder)
        self._reader.set_up_storage_reader(index, is_coordinator=True)
        table = rules(shape)
        self._pieces: dict[tuple[str, tuple[int, ...]], list] = defaultdict(list)  # by name and position in the stack
        stacked = {key: len(at) for key, at in (_key(rule, shape) for rule in table)}
        for name, entry in self._entries.items():
            for chunk in entry.chunks if name in stacked else ():
                self._pieces[name, tuple(chunk.offsets[: stacked[name]])].append(chunk)
        self._rule_of = {name: rule for rule in table for name in rule.names}
        self._last: tuple[WeightRule | None, dict[str, Tensor]] = (None, {})
        for rule in table:
            self._check(rule)
        for name in self._entries:
            is_weight = name.split(".")[0] in _WEIGHTS and _NO_WEIGHT not in name
            if is_weight and name not in stacked:
                raise UserError(f"{folder}: tensor {name} has no place in a model of family {shape.family}")

    def dtype(self, name: str) -> torch.dtype:
        return self._entries[_key(self._rule_of[name], self.shape)[0]].properties.dtype

    def read(self, name: str) -> Tensor:
        rule = self._rule_of[name]
        if self._last[0] != rule:
            self._last = (None, {})  # free the previous one first
            folded = rule.folded_shard(self._whole(rule), self.shape, tp=1)
            self._last = (rule, dict(zip(rule.names, rule.unfold(folded, self.shape), strict=True)))
        return self._last[1][name]

    def _check(self, rule: WeightRule) -> None:
        (key, at), index = _key(rule, self.shape), self.folder / ".metadata"
        parts = [torch.empty(size, device="meta") for size in rule.sizes(self.shape)]
        size = tuple(rule.as_megatron(rule.fold(parts, self.shape)).shape)
        stacked = (*_stack(rule, self.shape), *size)
        if key not in self._entries:
            raise UserError(f"{index}: tensor {key} is missing")
        found = tuple(self._entries[key].size)
        if found != stacked:
            raise UserError(f"{index}: tensor {key} has shape {list(found)}, the model's is {list(stacked)}")
        places = ", ".join(f"{axis} {i}" for axis, i in zip(("layer", "expert"), at, strict=False))
        where = f"{key} of {places}" if places else key
        elements = sum(math.prod(piece.sizes) for piece in self._pieces[key, at])
        if elements != math.prod(size):
            raise UserError(f"{index}: tensor {where} has {elements} of {math.prod(size)} elements")
        for piece in self._pieces[key, at]:
            if (key, tuple(piece.offsets)) not in self._stored:
                raise UserError(f"{index}: does not say where {where} at {tuple(piece.offsets)} lies")

    def _whole(self, rule: WeightRule) -> Tensor:
        key, at = _key(rule, self.shape)
        entry, items, first = self._entries[key], [], (0,) * len(at)
        whole = torch.empty((*(1 for _ in at), *entry.size[len(at) :]), dtype=entry.properties.dtype)
        for piece in self._pieces[key, at]:
            corner = torch.Size((*first, *piece.offsets[len(at) :]))
            stored, zeros = self._stored[key, tuple(piece.offsets)], torch.Size([0] * len(piece.offsets))
            here = MetadataIndex(key, corner)
            items.append(ReadItem(LoadItemType.TENSOR, here, corner, stored, zeros, piece.sizes))
        for item in items:
            try:
                self._reader.read_data(LoadPlan([item]), _Into(whole)).wait()
            except Exception as error:  # whatever torch's reader raises for foreign bytes
                path = self.folder / self._files[item.storage_index]
                raise UserError(f"{path}: tensor {key} cannot be read: {type(error).__name__}: {error}") from None
        return whole[first]


class _Into:
    """The planner that torch's reader asks where in a tensor a piece belongs."""

    def __init__(self, whole: Tensor):
        self._whole = whole

    def resolve_tensor(self, item: ReadItem) -> Tensor:
        corner = zip(item.dest_offsets, item.lengths, strict=True)
        return self._whole[tuple(slice(start, start + length) for start, length in corner)]

    def commit_tensor(self, item: ReadItem, tensor: Tensor) -> None: ...


def megatron_pieces(
    shape: ModelShape, read: Callable[[str], Tensor], chosen: list[WeightRule]
) -> Iterator[tuple[TensorPiece, Tensor]]:
    """Yield the pieces of the ``chosen`` weights, whole, from Hugging Face tensors; one is in memory at a time."""
    for rule in chosen:
        key, at = _key(rule, shape)
        parts = [read(name) for name in rule.names]
        weight = rule.as_megatron(rule.fold(parts, shape))
        del parts
        size, zeros, ones = tuple(weight.shape), (0,) * weight.dim(), (1,) * len(at)
        yield TensorPiece(key, (*_stack(rule, shape), *size), (*at, *zeros), (*ones, *size), weight.dtype), weight
        del weight


def _key(rule: WeightRule, shape: ModelShape) -> tuple[str, tuple[int, ...]]:
    """Return (name of the weight in a checkpoint, its position in the stack there: layer and expert, if any)."""
    if not rule.mcore.startswith(_LAYERS):
        return rule.mcore, ()
    layer, _, rest = rule.mcore.removeprefix(_LAYERS).partition(".")
    module, _, parameter = rest.partition(".")
    if stored := stored_norms(shape).get(module):
        rest = f"{stored}_{parameter}"
    if rule.expert is None:
        return _LAYERS + rest, (int(layer),)
    return _LAYERS + rest.replace(f".{rule.expert}.", ".experts."), (int(layer), rule.expert)


def _stack(rule: WeightRule, shape: ModelShape) -> tuple[int, ...]:
    """Return the sizes of the axes along which such weights are stacked."""
    return (shape.num_layers, shape.num_experts)[: len(_key(rule, shape)[1])]
