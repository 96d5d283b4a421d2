"""Read a folder's tokenizer with the library that its file is of, so that text gets the ids the model was trained with.

transformers' AutoTokenizer goes by the class that ``tokenizer_config.json`` names and builds that class's own splitting
around the file's vocabulary: other ids wherever the two differ (docs/data.md has the counts). So:

- ``tokenizer.model`` is run by the sentencepiece library itself. The model's control pieces are special tokens, and
  what lies between them is decoded by sentencepiece.
- A tiktoken file (lines of ``base64(token) rank``, as Llama 3's original release and Qwen 1 have it) holds neither the
  pattern that splits text nor the special tokens: both are kept here, for the releases known by their number of ranks.
"""

from __future__ import annotations

import base64
import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor
from tokenizers import normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

ROLES = ("unk", "bos", "eos", "pad")


class SentencePieceTokenizer(SentencePieceBackend):
    """transformers' interface to the model: ``from_pretrained(folder)`` reads the chat template and the settings.

    What the settings leave open is the model's own: which pieces begin and end a text, and a begin token before every
    prompt that is not a chat. Raises ValueError for ``legacy: false``, which no library but transformers tokenizes.
    """

    def __init__(self, **options: Any):
        if options.get("legacy") is False:
            raise ValueError("tokenizer_config.json has legacy: false: save it as a tokenizer.json with transformers")
        model = SentencePieceProcessor(model_file=options["vocab_file"])
        for role in ROLES:
            index = getattr(model, f"{role}_id")()
            if index >= 0:
                options.setdefault(f"{role}_token", model.id_to_piece(index))
        control = [model.id_to_piece(i) for i in range(len(model)) if model.is_control(i)]
        options["extra_special_tokens"] = [*(options.get("extra_special_tokens") or ()), *control]
        begins = options.setdefault("add_bos_token", True) and options.get("bos_token") is not None
        ends = options.setdefault("add_eos_token", False)
        pattern = {(True, True): "bos_eos", (True, False): "bos", (False, True): "eos"}
        super().__init__(**options, special_tokens_pattern=pattern.get((bool(begins), bool(ends)), "none"))

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Text of the pieces; added tokens stand for themselves, and each run between them is a text of its own."""
        runs = itertools.groupby(tokens, key=self.added_tokens_encoder.__contains__)
        return "".join("".join(run) if added else self.sp_model.decode_pieces(list(run)) for added, run in runs)


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
        "<|begin_of_text|>", "<|end_of_text|>",
        *_reserved(0, 4),
        "<|start_header_id|>", "<|end_header_id|>",
        *_reserved(4, 5),
        "<|eot_id|>",
        *_reserved(5, 251),
    ),
    bos="<|begin_of_text|>",
    eos="<|end_of_text|>",
)  # fmt: skip
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
