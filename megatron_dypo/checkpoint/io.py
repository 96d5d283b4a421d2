"""Read and write checkpoint files in torch's distributed format, which Megatron-Core reads (``torch_dist``).

Each rank writes one data file, and an index records which part of which tensor lies where. Planning needs no
collective: every rank knows what it holds. (mcore's own writer gathers plans, starts a manager that runs ``__main__``
again and forks writers alongside the threads of vLLM and OpenMP; see benchmarks/checkpoints.py.)

The index, ``.metadata``, is a pickle, and torch unpickles it without restriction: its author could run any code here.
So ``read_index`` unpickles it first and allows only the classes of our own index. The rest of a checkpoint cannot run
code: mcore reads ``common.pt`` and torch the tensors with ``weights_only``. Objects stored with the tensors
(``BytesStorageMetadata``) are not allowed, on purpose: torch would unpickle them from the data files, again without
restriction.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import pickle
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_dypo.checkpoint.catalog import MANIFEST, find_fault, listed_files
from megatron_dypo.errors import UserError
from megatron_dypo.runtime.distributed import all_gather_objects
from megatron_dypo.runtime.fs import is_safe_name, new_file, sync_folder

_METADATA = "torch.distributed.checkpoint.metadata"
_ALLOWED = {
    (_METADATA, "Metadata"),
    (_METADATA, "MetadataIndex"),
    (_METADATA, "TensorStorageMetadata"),
    (_METADATA, "ChunkStorageMetadata"),
    (_METADATA, "TensorProperties"),
    (_METADATA, "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
}


class _Refused(Exception):
    """Raised for a global that is not allowed."""


class _IndexUnpickler(pickle.Unpickler):
    """Resolves allowed globals and torch's dtypes; stops at anything else before importing it."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if (module, name) not in _ALLOWED and not is_dtype:
            raise _Refused(f"{module}.{name}")
        return super().find_class(module, name)


def read_index(path: Path) -> Metadata:
    """Return the index of a checkpoint's tensors; raise UserError naming the file if it is not a valid one.

    The error names the offending global if the pickle asks for one; none of it is run.
    """
    try:
        # From memory: read from a file, a damaged length would be allocated first.
        index = _IndexUnpickler(io.BytesIO(path.read_bytes())).load()
    except _Refused as refused:
        raise UserError(
            f"{path}: refused: it asks for {refused}, which does not belong in a checkpoint index"
        ) from None
    except Exception as error:  # pickle raises anything on foreign bytes
        raise UserError(f"{path}: cannot be read: {type(error).__name__}: {error}") from None
    if not _is_index(index):
        raise UserError(f"{path}: is not an index of a checkpoint's tensors")
    return index


def _is_index(index: Any) -> bool:
    if not isinstance(index, Metadata):
        return False
    tensors, storage = getattr(index, "state_dict_metadata", None), getattr(index, "storage_data", None)
    if not isinstance(tensors, dict) or not isinstance(storage, dict):
        return False
    names = [getattr(place, "relative_path", None) for place in storage.values()]
    return all(isinstance(entry, TensorStorageMetadata) for entry in tensors.values()) and all(map(is_safe_name, names))


@dataclass(frozen=True)
class TensorPiece:
    """Position of a piece of a tensor: ``sizes`` elements from ``offsets`` on in the tensor ``key`` of ``shape``."""

    key: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class WrittenFile:
    """A finished file: its size in bytes, its checksum, and (position, offset, length) of each piece in it."""

    file: str
    size: int
    sha256: str
    pieces: list[tuple[TensorPiece, int, int]]


def write_pieces(path: Path, pieces: Iterable[tuple[TensorPiece, Tensor]]) -> WrittenFile:
    """Write this rank's pieces (host tensors) to ``path``, flushed to the disk, without a copy. Raises OSError."""
    places = []
    with new_file(path) as file:
        stream: Any = _Hashed(file)  # torch only calls `write`
        for place, tensor in pieces:
            start = stream.size
            try:
                torch.save(tensor.view(place.sizes), stream)
            except RuntimeError as error:  # torch's writer closes the archive and hides the cause
                raise stream.fault or error from None
            places.append((place, start, stream.size - start))
    return WrittenFile(path.name, stream.size, stream.digest.hexdigest(), places)


class _Hashed(io.RawIOBase):
    """A stream for torch that counts and hashes the bytes it writes; not seekable."""

    def __init__(self, file: BinaryIO):
        self._file, self.digest, self.size = file, hashlib.sha256(), 0
        self.fault: OSError | None = None  # why a write failed

    def writable(self) -> bool:
        return True

    def write(self, content: Any) -> int:
        try:
            self._file.write(content)
        except OSError as error:
            self.fault = error
            raise
        self.digest.update(content)
        self.size += len(content)
        return len(content)


def write_file(path: Path, content: bytes) -> WrittenFile:
    """Write a file that holds no tensor, flushed to the disk. Raises OSError."""
    _write(path, content)
    return WrittenFile(path.name, len(content), hashlib.sha256(content).hexdigest(), [])


def write_index(folder: Path, parts: list[WrittenFile], state: dict) -> None:
    """Complete a folder: mcore's index and, last, the manifest of all files' sizes and checksums. Raises OSError.

    ``state``, which includes the step, is saved as ``state.json``. Raises ValueError if the pieces do not cover whole
    tensors.
    """
    tensors: dict[str, TensorStorageMetadata] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    covered: dict[str, int] = defaultdict(int)
    for part in parts:
        for place, offset, length in part.pieces:
            properties = TensorProperties(dtype=place.dtype)
            entry = tensors.setdefault(place.key, TensorStorageMetadata(properties, torch.Size(place.shape), []))
            entry.chunks.append(ChunkStorageMetadata(torch.Size(place.offsets), torch.Size(place.sizes)))
            storage[MetadataIndex(place.key, place.offsets)] = _StorageInfo(part.file, offset, length)
            covered[place.key] += math.prod(place.sizes)
    for key, entry in tensors.items():
        if covered[key] != math.prod(entry.size):
            raise ValueError(f"{key}: {covered[key]} of {math.prod(entry.size)} elements are in the checkpoint")
    common = io.BytesIO()
    torch.save({"iteration": state["step"]}, common)
    contents = {
        ".metadata": pickle.dumps(Metadata(tensors, storage_data=storage)),
        "common.pt": common.getvalue(),
        "metadata.json": _json({"sharded_backend": "torch_dist", "sharded_backend_version": 1}),
        "state.json": _json(state),
    }
    files = {part.file: {"bytes": part.size, "sha256": part.sha256} for part in parts}
    for name, content in contents.items():
        _write(folder / name, content)
        files[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    _write(folder / MANIFEST, _json({"files": files}))
    sync_folder(folder)


def shared_fault(folder: Path) -> str | None:
    """Return the first fault that any rank found, or None; the ranks divide the files among them. Collective."""
    mine = listed_files(folder)[dist.get_rank() :: dist.get_world_size()]
    faults = [fault for fault in all_gather_objects(find_fault(folder, mine)) if fault]
    return faults[0] if faults else None


def _json(value: object) -> bytes:
    return json.dumps(value, indent=2).encode()


def _write(path: Path, content: bytes) -> None:
    with new_file(path) as stream:
        stream.write(content)
