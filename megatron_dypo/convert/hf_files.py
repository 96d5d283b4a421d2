"""Copy what a Hugging Face folder holds besides weights: configuration, generation defaults, tokenizer, template."""

from __future__ import annotations

import copy
import json
import logging
import shutil
from pathlib import Path

import torch

from megatron_dypo.models.hf_config import dtype_name
from megatron_dypo.models.shape import CRITIC_FIELDS, ModelShape

log = logging.getLogger(__name__)

PATTERNS = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "tiktoken.model", "*.tiktoken",
    "chat_template.jinja", "chat_template.json", "tekken.json",
)  # fmt: skip


def tokenizer_files(folder: Path) -> list[Path]:
    return sorted({path for pattern in PATTERNS for path in folder.glob(pattern) if path.is_file()})


def copy_tokenizer(source: Path, target: Path) -> list[str]:
    """Copy the tokenizer's files; return their names, or none if ``source`` has no tokenizer."""
    found = tokenizer_files(source)
    for path in found:
        shutil.copyfile(path, target / path.name)
    return [path.name for path in found]


def set_ends(folder: Path, end_ids: tuple[int, ...]) -> None:
    """Set the end tokens in ``generation_config.json``, replacing what it held."""
    path = folder / "generation_config.json"
    settings = json.loads(path.read_bytes()) if path.is_file() else {}
    path.write_text(json.dumps(settings | {"eos_token_id": list(end_ids)}, indent=2))


def copy_metadata(
    source: Path,
    target: Path,
    dtype: torch.dtype | None,
    tokenizer: Path | None = None,
    changed: ModelShape | None = None,
) -> None:
    """Copy the metadata from one folder to another; log a warning if there is no tokenizer.

    ``dtype``: set it in config.json. ``tokenizer``: the folder of the tokenizer, if not the source. ``changed``: the
    shape, if a run has changed the number of positions or RoPE, or the model has a value head instead.
    """
    before = json.loads((source / "config.json").read_text())
    config = copy.deepcopy(before)
    if dtype is not None and dtype_name(dtype) != (config.get("dtype") or config.get("torch_dtype")):
        config.pop("torch_dtype", None)
        config["dtype"] = dtype_name(dtype)
    if changed:
        config["max_position_embeddings"] = changed.max_position
        nested = config.get("rope_scaling") or config.get("rope_parameters") or {}  # of both, the first counts
        (nested if "rope_theta" in nested else config)["rope_theta"] = changed.rope_base
        if changed.rope_scaling and changed.rope_scaling.rope_type == "llama3":  # if absent, it is the old max_position
            name = "original_max_position_embeddings"
            nested.setdefault(name, changed.rope_scaling.original_max_position_embeddings)
        if changed.value_head:
            config = {name: value for name, value in config.items() if name not in ("id2label", "label2id")}
            config |= CRITIC_FIELDS | {"architectures": [changed.architecture], "tie_word_embeddings": False}
    if config != before:
        (target / "config.json").write_text(json.dumps(config, indent=2))
    else:
        shutil.copyfile(source / "config.json", target / "config.json")
    if (source / "generation_config.json").is_file():
        shutil.copyfile(source / "generation_config.json", target / "generation_config.json")
    if not copy_tokenizer(tokenizer or source, target):
        log.warning("%s: holds no tokenizer, so the converted folder will hold none", tokenizer or source)
