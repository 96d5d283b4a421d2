"""What a Hugging Face folder holds beside its weights: configuration, generation defaults, tokenizer, chat template."""

from __future__ import annotations

import copy
import json
import logging
import shutil
from pathlib import Path

import torch

from megatron_dypo.convert.tokenizer_files import copy_tokenizer
from megatron_dypo.policy.shape import ModelShape

log = logging.getLogger(__name__)


def write_config(
    shape: ModelShape, folder: Path, eos_id: int | tuple[int, ...] | None, dtype: torch.dtype | None = None
) -> None:
    """``config.json`` and ``generation_config.json`` of the shape, without weights.

    ``eos_id``: one or several; ``dtype``: that of the weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    alone = isinstance(eos_id, tuple) and len(eos_id) == 1
    end = {} if eos_id is None else {"eos_token_id": eos_id[0] if alone else eos_id}
    named = {"torch_dtype": _name(dtype)} if dtype else {}
    (folder / "config.json").write_text(json.dumps(shape.to_hf_config() | end | named, indent=2))
    (folder / "generation_config.json").write_text(json.dumps(end, indent=2))


def set_ends(folder: Path, end_ids: tuple[int, ...]) -> None:
    """Name the end tokens in ``generation_config.json``, whatever it held of them."""
    path = folder / "generation_config.json"
    settings = json.loads(path.read_bytes()) if path.is_file() else {}
    path.write_text(json.dumps(settings | {"eos_token_id": list(end_ids)}, indent=2))


def copy_metadata(
    source: Path,
    target: Path,
    dtype: torch.dtype | None,
    tokenizer: Path | None = None,
    extended: ModelShape | None = None,
) -> None:
    """Copy it from one folder to another; a missing tokenizer is a warning.

    ``dtype`` is named where it is another. ``tokenizer``: the folder of another one than the source's own.
    ``extended``: the shape, where a run has changed how many positions it has, or its RoPE.
    """
    before = json.loads((source / "config.json").read_text())
    config = copy.deepcopy(before)
    if dtype is not None and _name(dtype) != (config.get("dtype") or config.get("torch_dtype")):
        config.pop("torch_dtype", None)
        config["dtype"] = _name(dtype)
    if extended:
        config["max_position_embeddings"] = extended.max_position
        nested = config.get("rope_scaling") or config.get("rope_parameters") or {}  # of both, the first counts
        (nested if "rope_theta" in nested else config)["rope_theta"] = extended.rope_base
        if extended.rope_scaling and extended.rope_scaling.rope_type == "llama3":  # absent, it is the old max_position
            name = "original_max_position_embeddings"
            nested.setdefault(name, extended.rope_scaling.original_max_position_embeddings)
    if config != before:
        (target / "config.json").write_text(json.dumps(config, indent=2))
    else:
        shutil.copyfile(source / "config.json", target / "config.json")
    if (source / "generation_config.json").is_file():
        shutil.copyfile(source / "generation_config.json", target / "generation_config.json")
    if not copy_tokenizer(tokenizer or source, target):
        log.warning("%s: holds no tokenizer, so neither will what is converted from it", tokenizer or source)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
