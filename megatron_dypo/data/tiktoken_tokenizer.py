"""A folder's tiktoken file: lines of ``base64(token) rank``, as Llama 3's original release and Qwen 1 have it.

Such a file holds neither the pattern that splits text nor the special tokens: both are in the release's code, and are
kept here for the releases known by the number of their ranks.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import normalizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Release:
    """What a release's code adds to its file; ``special`` are the tokens behind the last rank, in order."""

    pattern: str
    special: tuple[str, ...]
    eos: str
    bos: str | None = None
    nfc: bool = False  # text is brought into Unicode's composed form first


def _reserved(first: int, end: int) -> list[str]:
    return [f"<|reserved_special_token_{i}|>" for i in range(first, end)]


LLAMA_3 = Release(
    pattern=_SPLIT.replace("DIGITS", r"\p{N}{1,3}"),
    special=(
        *("<|begin_of_text|>", "<|end_of_text|>"),
        *_reserved(0, 4),
        *("<|start_header_id|>", "<|end_header_id|>"),
        *_reserved(4, 5),
        "<|eot_id|>",
        *_reserved(5, 251),
    ),
    bos="<|begin_of_text|>",
    eos="<|end_of_text|>",
)
QWEN = Release(
    pattern=_SPLIT.replace("DIGITS", r"\p{N}"),
    special=("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205))),
    eos="<|endoftext|>",
    nfc=True,
)
RELEASES = {128000: LLAMA_3, 151643: QWEN}


def read_ranks(path: str | Path) -> dict[bytes, int]:
    """The file's tokens and their ranks. Raises ValueError where it is not such a file.

    (tiktoken's own reader keeps a copy in a shared temporary folder, and would go on reading that.)
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(Path(path).read_bytes().splitlines(), start=1):
        token, _, rank = line.partition(b" ")
        if not rank.isdigit():
            raise ValueError(f"{path}:{number}: not a line of a tiktoken file")
        ranks[base64.b64decode(token, validate=True)] = int(rank)
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(f"{path}: ranks are not the numbers from 0 to {len(ranks) - 1}, each once")
    return ranks


class _Converter(TikTokenConverter):
    load_tiktoken_bpe = staticmethod(read_ranks)


class TiktokenTokenizer(PreTrainedTokenizerFast):
    """transformers' interface to such a file: ``from_tiktoken(folder, ...)``."""

    @classmethod
    def convert_to_native_format(cls, **options: Any) -> dict[str, Any]:
        """Nothing to convert: ``tokenizer_object`` is given."""
        return options

    @classmethod
    def from_tiktoken(cls, folder: Path, path: Path, settings: Mapping[str, Any]) -> TiktokenTokenizer:
        """The tokenizer of ``path`` with the folder's chat template; ``settings`` are its ``tokenizer_config.json``.

        Raises ValueError where the file is damaged, or of a release that is not known.
        """
        ranks = len(read_ranks(path))
        if ranks not in RELEASES:
            known = " and ".join(map(str, RELEASES))
            raise ValueError(f"{path.name} has {ranks} ranks; only files with {known} say how to split text")
        release = RELEASES[ranks]
        # Later releases gave reserved tokens other names.
        named = {int(index): token["content"] for index, token in settings.get("added_tokens_decoder", {}).items()}
        special = dict(enumerate(release.special, start=ranks)) | named
        if max(special) + 1 - ranks != len(special):
            raise ValueError(f"special tokens of tokenizer_config.json are not the ids from {ranks} on")
        converter = _Converter(str(path), release.pattern, extra_special_tokens=[special[i] for i in sorted(special)])
        backend = converter.converted()
        backend.normalizer = normalizers.NFC() if release.nfc else None
        tokenizer = cls.from_pretrained(folder, tokenizer_object=backend)
        tokenizer.eos_token = tokenizer.eos_token or release.eos
        tokenizer.bos_token = tokenizer.bos_token or release.bos
        tokenizer.add_bos_token = settings.get("add_bos_token", tokenizer.bos_token is not None)
        return tokenizer
