"""Which library reads a folder's tokenizer, so that text gets the ids the model was trained with.

transformers' AutoTokenizer goes by the class that ``tokenizer_config.json`` names and builds that class's own splitting
around the file's vocabulary: other ids wherever the two differ (docs/data.md has the counts). So each file is read by
the library that it is of.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from megatron_dypo.data.sentencepiece_tokenizer import SentencePieceTokenizer
from megatron_dypo.data.tiktoken_tokenizer import TiktokenTokenizer

_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n")


def load_backend(folder: Path, vocab_size: int) -> PreTrainedTokenizerBase:
    """The folder's tokenizer, its special tokens and chat template included; its own code is never run.

    ``tokenizer.json`` where there is one, else a tiktoken file, a SentencePiece model, or vocab.json and merges.txt.
    Raises whatever the libraries raise on files that are not theirs, and ValueError for an id beyond the vocabulary.
    """
    settings = _settings(folder / "tokenizer_config.json")
    if (folder / "tokenizer.json").is_file():
        _refuse_code(settings)
        _check_ids(folder / "tokenizer.json", vocab_size)
        return PreTrainedTokenizerFast.from_pretrained(folder)
    models = [*sorted(folder.glob("*.tiktoken")), folder / "tiktoken.model", folder / "tokenizer.model"]
    for path in filter(Path.is_file, models):
        with path.open("rb") as file:
            if _TIKTOKEN_LINE.fullmatch(file.readline(1000)):
                return TiktokenTokenizer.from_tiktoken(folder, path, settings)
        _refuse_code(settings)
        return SentencePieceTokenizer.from_pretrained(folder)
    # Not None, its default: transformers would then ask on the terminal whether to run the folder's code.
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def _settings(path: Path) -> dict[str, Any]:
    tree = json.loads(path.read_bytes()) if path.is_file() else {}
    if not isinstance(tree, dict):
        raise ValueError(f"{path.name} holds no settings")
    return tree


def _refuse_code(settings: dict[str, Any]) -> None:
    if "auto_map" in settings:
        raise ValueError("tokenizer_config.json asks for code of its own (auto_map), which is never run")


def _check_ids(path: Path, vocab_size: int) -> None:
    """Raise ValueError where a ``tokenizer.json`` has an id beyond the vocabulary.

    Before it is loaded: tokenizers goes through every number below the highest id, and a wild one takes it forever.
    """
    tree = json.loads(path.read_bytes())
    vocab = tree["model"]["vocab"]
    ids = list(range(len(vocab))) if isinstance(vocab, list) else list(vocab.values())
    highest = max([*ids, *(token["id"] for token in tree.get("added_tokens", []))])
    if highest >= vocab_size:
        raise ValueError(f"token id {highest} does not fit the model's vocabulary of {vocab_size}")
