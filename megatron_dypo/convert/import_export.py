"""Run ``convert import`` and ``convert export``, between a Hugging Face folder and a Megatron checkpoint.

Weights are converted one by one: by one process under plain python, shared among the ranks under torchrun. No process
holds more than one weight. The output gets its name once it is whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dypo.checkpoint.catalog import SIDE, listed_files
from megatron_dypo.checkpoint.io import shared_fault, write_index, write_pieces
from megatron_dypo.config import load_config
from megatron_dypo.config.renamed import rename
from megatron_dypo.config.schema import Config, Model, Parallel
from megatron_dypo.convert import hf_weights
from megatron_dypo.convert.hf_files import copy_metadata, set_ends
from megatron_dypo.convert.hf_weights import check_folder, folder_weights
from megatron_dypo.convert.megatron_folder import MegatronFolder, checkpoint_folder, megatron_pieces
from megatron_dypo.data.tokenizer import load_tokenizer
from megatron_dypo.errors import UserError
from megatron_dypo.models.families import hf_shapes, rules
from megatron_dypo.models.hf_config import write_config
from megatron_dypo.models.limits import check_layout
from megatron_dypo.models.shape import POSITIONS, ModelShape, RopeScaling, hf_folder, model_shape
from megatron_dypo.models.sharding import watched
from megatron_dypo.runtime.distributed import all_gather_objects, join
from megatron_dypo.runtime.fs import sync_folder

log = logging.getLogger(__name__)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_SHAPE = "model.shape."  # prefix of the keys that are fields of the model in ``state.json``
METADATA = "hf"  # folder in a checkpoint: config.json, tokenizer etc. that it was imported with


def source_folder(hf: str, key: str = "--hf", critics: bool = False) -> tuple[Path, ModelShape]:
    """Return (Hugging Face folder or local copy of the hub name, its shape). Raises UserError as ``model_shape``."""
    folder = Path(hf_folder(hf, key))
    return folder, model_shape(Model(hf=str(folder)), critics)


def import_folder(hf: str, out: Path, parallel: Parallel, dtype: str | None, allow_bin: bool) -> str:
    """Write the Hugging Face folder's weights as a Megatron checkpoint, which loads at any layout; return what it did.

    ``parallel``: a layout that the model must be divisible by. Raises UserError naming file and tensor, leaving no
    ``out``.
    """
    source, shape = source_folder(hf, critics=True)
    check_layout(parallel, shape, 0, "convert import")
    join()
    check_folder(source, shape, allow_bin)
    read = watched(_in_dtype(folder_weights(source, allow_bin), dtype), source, log.warning)
    with _output(out) as folder:
        rank, world = dist.get_rank(), dist.get_world_size()
        part = None
        if mine := rules(shape)[rank::world]:
            part = write_pieces(folder / f"__{rank}_0.distcp", megatron_pieces(shape, read, mine))
        parts = [part for part in all_gather_objects(part) if part is not None]
        if rank == 0:
            (folder / METADATA).mkdir()
            copy_metadata(source, folder / METADATA, DTYPES.get(dtype) if dtype else None)
            write_index(folder, parts, {"step": 0, "model": dataclasses.asdict(shape)})
    size = sum(part.size for part in parts)
    return f"{out}: {shape.parameters:,} parameters of {source}, {size / 1e9:.2f} GB"


def export_folder(
    checkpoint: Path, out: Path, hf: str | None, dtype: str | None, shard_bytes: int, side: bool = False
) -> str:
    """Write a checkpoint's weights as a Hugging Face folder that transformers and vLLM load; return what it did.

    ``side``: export the run's second model, a critic as token classification. ``hf``: the folder to copy configuration
    and tokenizer from; default: the one the weights came from. Raises UserError naming file and tensor, leaving no
    ``out``.
    """
    join()
    folder = checkpoint_folder(checkpoint)
    check_checkpoint(folder)
    origin = hf or metadata_folder(folder)
    metadata = source_folder(origin, critics=True)[0] if origin else None
    shape = model_of(folder, origin, critics=True)
    shape = side_of(folder, shape) if side else shape
    weights = MegatronFolder(folder, shape, SIDE if side else "")
    shapes = hf_shapes(shape)
    dtypes = {name: DTYPES[dtype] if dtype else weights.dtype(name) for name in shapes}
    sizes = {name: math.prod(size) * dtypes[name].itemsize for name, size in shapes.items()}
    shards = hf_weights.plan_shards(sizes, shard_bytes)
    read = watched(_in_dtype(weights.read, dtype), folder, log.warning)
    with _output(out) as target:
        rank, world = dist.get_rank(), dist.get_world_size()
        for file, names in list(shards.items())[rank::world]:
            tensors = {name: shapes[name] for name in names}
            hf_weights.write_shard(target / file, tensors, dtypes, read)
        dist.barrier()
        if rank == 0:
            _write_metadata(folder, metadata, shape, target, set(dtypes.values()), asked=dtype is not None)
            hf_weights.write_index(target, shards, sum(sizes.values()))
    return f"{out}: {len(shapes)} tensors of {folder}, {sum(sizes.values()) / 1e9:.2f} GB in {len(shards)} files"


def check_checkpoint(folder: Path) -> None:
    """Raise UserError naming the file unless all files are as written; the ranks share them. Collective.

    A checkpoint without our manifest (Megatron-LM's own) is accepted as it is.
    """
    if listed_files(folder) and (fault := shared_fault(folder)):
        raise UserError(fault)


def run_config(folder: Path) -> Config | None:
    """Return the configuration of the run that a checkpoint belongs to."""
    path = folder.parent.parent / "config.yaml"
    return load_config(path, recorded=True) if path.is_file() else None


def metadata_folder(folder: Path) -> str | None:
    """Return the Hugging Face folder that a checkpoint's weights came from; None if random or unknown."""
    if (folder / METADATA / "config.json").is_file():
        return str(folder / METADATA)
    run = run_config(folder)
    return run.model.hf if run else None


def _write_metadata(
    folder: Path, metadata: Path | None, shape: ModelShape, target: Path, dtypes: set[torch.dtype], asked: bool
) -> None:
    """Write the metadata of a checkpoint's weights: copied from their origin, with the run's tokenizer, or generated.

    ``dtypes``: those of the weights written. ``config.json`` states the dtype, because transformers and vLLM load in
    it; an unmodified import keeps its own unless another dtype was ``asked`` for.
    """
    run = run_config(folder)
    dtype = dtypes.pop() if len(dtypes) == 1 and (asked or not metadata or run) else None
    if metadata:
        own = run.model.tokenizer if run else None
        changed = shape if source_folder(str(metadata), critics=True)[1] != shape else None
        copy_metadata(metadata, target, dtype, Path(hf_folder(own, "--hf")) if own else None, changed)
        if own:  # ends of the run's responses
            run.model.hf = str(metadata)
            set_ends(target, load_tokenizer(run, shape).end_ids)
    elif run:
        tokenizer = load_tokenizer(run, shape)
        write_config(shape, target, tokenizer.end_ids, dtype)
        tokenizer.save(target)
    else:
        log.warning("%s: its tokenizer is unknown, so the folder will hold none", folder)
        write_config(shape, target, None, dtype)


def model_of(folder: Path, origin: str | None, critics: bool = False) -> ModelShape:
    """Return the shape of a checkpoint's model: from the folder its weights came from, or from the checkpoint itself.

    A run may have changed ``POSITIONS`` of its initial model.
    """
    if not origin:
        return stored_shape(folder)
    shape = source_folder(origin, critics=critics)[1]
    with contextlib.suppress(UserError):  # Megatron-LM's checkpoints record none
        trained = stored_shape(folder)
        shape = dataclasses.replace(shape, **{name: getattr(trained, name) for name in POSITIONS})
    return shape


def side_of(folder: Path, shape: ModelShape) -> ModelShape:
    """Return the shape of a checkpoint's second model, given that of its policy."""
    with contextlib.suppress(UserError):  # Megatron-LM's checkpoints record none, and hold no second model
        return shape.critic if stored_shape(folder, "side_model").value_head else shape
    return shape


def stored_shape(folder: Path, model: str = "model") -> ModelShape:
    """Return the model's shape, or the ``side_model``'s, from the checkpoint's ``state.json``.

    Raises UserError if it has none.
    """
    path = folder / "state.json"
    try:
        state = json.loads(path.read_text())
        described = state.get(model) or state["model"]
        stored = {f"{_SHAPE}{name}": value for name, value in described.items()}
        fields = {name.removeprefix(_SHAPE): value for name, value in rename(stored).items()}
        scaling = fields.pop("rope_scaling")
        return ModelShape(**fields, rope_scaling=scaling and RopeScaling(**scaling))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: does not describe the model ({error!r}): give --hf, a folder of its shape") from None


def _in_dtype(read: Callable[[str], Tensor], dtype: str | None) -> Callable[[str], Tensor]:
    return read if dtype is None else lambda name: read(name).to(DTYPES[dtype])


@contextlib.contextmanager
def _output(out: Path) -> Iterator[Path]:
    """Yield a folder to write to, the same on all ranks, which is renamed ``out`` at the end of the block. Collective.

    Raises UserError if ``out`` exists already, and for a full disk; what was written is then removed.
    """
    fault, folder = None, out
    if dist.get_rank() == 0:
        folder = out.with_name(f".{out.name}.partial-{uuid.uuid4().hex[:8]}")
        try:
            if out.exists() and (not out.is_dir() or any(out.iterdir())):
                raise FileExistsError(0, "exists already and is not empty")
            folder.mkdir(parents=True)
        except OSError as error:
            fault = f"{out}: {error.strerror}"
    fault, folder = all_gather_objects((fault, folder))[0]
    if fault:
        raise UserError(fault)
    try:
        yield folder
        dist.barrier()
        if dist.get_rank() == 0:
            sync_folder(folder)
            os.replace(folder, out)
            sync_folder(out.parent)
        dist.barrier()
    except OSError as error:
        raise UserError(f"{error.filename or folder}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
