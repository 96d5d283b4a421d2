"""Read a folder's tokenizer with the library its file was made for, so that text gets the ids the model was trained
with.

transformers' AutoTokenizer uses the class that ``tokenizer_config.json`` names and puts that class's own splitting
around the file's vocabulary: other ids wherever the two differ (docs/data.md has the counts). ``tokenizer.model`` is
therefore run by sentencepiece itself. The model's control pieces are special tokens, and sentencepiece decodes the text
between them. A tiktoken file (lines of ``base64(token) rank``) is refused: it holds neither the pattern that splits
text nor the special tokens.
"""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

ROLES = ("unk", "bos", "eos", "pad")


class SentencePieceTokenizer(SentencePieceBackend):
    """A sentencepiece model behind transformers' interface: ``from_pretrained(folder)`` reads template and settings.

    What the settings leave open comes from the model: which pieces begin and end a text, and a begin token before every
    prompt that is not a chat. Raises ValueError for ``legacy: false``, which only transformers can tokenize.
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
        """Return the text of the pieces; added tokens stay as text, and each run between them is decoded by itself."""
        runs = itertools.groupby(tokens, key=self.added_tokens_encoder.__contains__)
        return "".join("".join(run) if added else self.sp_model.decode_pieces(list(run)) for added, run in runs)


_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n")


def load_backend(folder: Path, vocab_size: int) -> PreTrainedTokenizerBase:
    """Load the folder's tokenizer with its special tokens and chat template; its own code is never run.

    Read from ``tokenizer.json`` if there is one, else from a SentencePiece model, else from vocab.json and merges.txt.
    Raises ValueError for a tiktoken file or an id beyond the vocabulary, and whatever the libraries raise for foreign
    files.
    """
    settings = _settings(folder / "tokenizer_config.json")
    if (folder / "tokenizer.json").is_file():
        _refuse_code(settings)
        _check_ids(folder / "tokenizer.json", vocab_size)
        return PreTrainedTokenizerFast.from_pretrained(folder)
    model = folder / "tokenizer.model"
    for path in filter(Path.is_file, [*sorted(folder.glob("*.tiktoken")), folder / "tiktoken.model", model]):
        with path.open("rb") as file:
            if path != model or _TIKTOKEN_LINE.fullmatch(file.readline(1000)):
                raise ValueError(f"{path.name} is a tiktoken file: convert it to a tokenizer.json with transformers")
    if model.is_file():
        _refuse_code(settings)
        return SentencePieceTokenizer.from_pretrained(folder)
    # Not None, the default: transformers would then ask on the terminal whether to run the folder's code.
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
    """Raise ValueError if a ``tokenizer.json`` has an id beyond the vocabulary.

    Checked before loading: tokenizers visits every number up to the highest id, so an absurd one takes forever.
    """
    tree = json.loads(path.read_bytes())
    vocab = tree["model"]["vocab"]
    ids = list(range(len(vocab))) if isinstance(vocab, list) else list(vocab.values())
    highest = max([*ids, *(token["id"] for token in tree.get("added_tokens", []))])
    if highest >= vocab_size:
        raise ValueError(f"token id {highest} does not fit the model's vocabulary of {vocab_size}")
