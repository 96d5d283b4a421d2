"""A tokenizer's files, from one folder to another, byte for byte."""

from __future__ import annotations

import shutil
from pathlib import Path

PATTERNS = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "tiktoken.model", "*.tiktoken"),
    *("chat_template.jinja", "chat_template.json", "tekken.json"),
)


def tokenizer_files(folder: Path) -> list[Path]:
    return sorted({path for pattern in PATTERNS for path in folder.glob(pattern) if path.is_file()})


def copy_tokenizer(source: Path, target: Path) -> list[str]:
    """Copy them; returns their names, none where ``source`` has no tokenizer."""
    found = tokenizer_files(source)
    for path in found:
        shutil.copyfile(path, target / path.name)
    return [path.name for path in found]
