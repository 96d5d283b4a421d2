"""A checkpoint's ``.metadata`` is a pickle, and torch unpickles it without restriction: whoever wrote it would choose
what runs here. So it is unpickled first by this reader, which finds the classes that our index is made of, no others.

The rest of a checkpoint cannot run anything: mcore reads ``common.pt`` and torch the tensors with ``weights_only``.
Objects beside the tensors (``BytesStorageMetadata``) are left off the list on purpose: torch would unpickle them out of
the data files, again without restriction.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_dypo.errors import UserError
from megatron_dypo.runtime.plain_name import is_plain

_METADATA = "torch.distributed.checkpoint.metadata"
_ALLOWED = {
    *((_METADATA, name) for name in ("Metadata", "MetadataIndex", "TensorStorageMetadata", "ChunkStorageMetadata")),
    *((_METADATA, name) for name in ("TensorProperties", "_MEM_FORMAT_ENCODING")),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
}


class _Refused(Exception):
    """A global that is not allowed."""


class _Reader(pickle.Unpickler):
    """Finds allowed globals and torch's dtypes; anything else ends the reading before it is imported."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if (module, name) not in _ALLOWED and not is_dtype:
            raise _Refused(f"{module}.{name}")
        return super().find_class(module, name)


def read_index(path: Path) -> Metadata:
    """The index of a checkpoint's tensors. Raises UserError naming the file unless it is one, of files beside it.

    Names the offending global where the pickle asks for one; nothing of it is run.
    """
    try:
        # From memory: out of a file, a damaged length would first be allocated.
        index = _Reader(io.BytesIO(path.read_bytes())).load()
    except _Refused as refused:
        raise UserError(f"{path}: refused: it asks for {refused}, which no index of a checkpoint holds") from None
    except Exception as error:  # whatever the pickle machine raises on bytes that are none of its own
        raise UserError(f"{path}: cannot be read: {type(error).__name__}: {error}") from None
    if not _is_index(index):
        raise UserError(f"{path}: is no index of a checkpoint's tensors")
    return index


def _is_index(index: Any) -> bool:
    if not isinstance(index, Metadata):
        return False
    tensors, storage = getattr(index, "state_dict_metadata", None), getattr(index, "storage_data", None)
    if not isinstance(tensors, dict) or not isinstance(storage, dict):
        return False
    names = [getattr(place, "relative_path", None) for place in storage.values()]
    return all(isinstance(entry, TensorStorageMetadata) for entry in tensors.values()) and all(map(is_plain, names))
