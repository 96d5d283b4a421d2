"""Tokenizer folders of every kind: ids and texts are those of the library that defines each file."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from pathlib import Path

import pytest

from megatron_dypo.convert.hf_files import copy_tokenizer
from megatron_dypo.data.tokenizer import Tokenizer, load_tokenizer
from megatron_dypo.errors import UserError
from megatron_dypo.models.shape import PRESETS
from megatron_dypo.records import Prompt
from tests.batches import make_config

PIECES = (
    "Hello", " world", "a", " ", "  ", "    return", "\n", "\n\n", "\t", "\r\n", "1", "123", " 4567", " 3.14159",
    "don't", " I'LL", "é", "e\u0301", "ﬁ", "Ⅷ", "½", "²", "١٢٣", "０１２", "中文字符", "日本語", "한국어", "العربية",
    "Ελληνικά", "кириллица", "ẞ", "ǅ", "🙂", "👩‍👩‍👧", "\u200b", "\u00a0", "\u3000", "\ufeff", "\x00", "\x7f", "…",
    "\\boxed{42}", "x^2+y_1", "if (a==b) {", "==>", "--", "▁", " ▁x", "Ġ", "<0x0A>", "a" * 40, "𝔘𝔫𝔦",
)  # fmt: skip
CHAT = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}{{ eos_token }}{% endfor %}"


def strings() -> list[str]:
    """Return some hundred texts made of awkward parts, and the parts themselves."""
    choice = random.Random(0)
    return [*PIECES, *("".join(choice.choices(PIECES, k=choice.randint(2, 12))) for _ in range(300))]


def load(folder: Path, vocab_size: int = 200_000) -> Tokenizer:
    shape = dataclasses.replace(PRESETS["tiny"], vocab_size=vocab_size)
    return load_tokenizer(make_config(model={"tokenizer": str(folder)}), shape)


def check(tokenizer: Tokenizer, encode, decode, bos: list[int]) -> None:
    """Check that a trace is ``encode``'s ids and the end token, a prompt begins with ``bos``, and texts round-trip."""
    for text in strings():
        ids = encode(text)
        assert tokenizer.encode_trace(text).tolist() == [*ids, tokenizer.eos_id], repr(text)
        assert tokenizer.encode_prompt(Prompt("p", "", (), text=text)).tolist() == [*bos, *ids], repr(text)
        assert tokenizer.decode(tokenizer.encode_trace(text)) == decode(ids), repr(text)


def text_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode_prompt(Prompt("p", "", (), text=text)).tolist()


def chat_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode_prompt(Prompt("p", "", (), messages=({"role": "user", "content": text},))).tolist()


# --- tokenizer.json


@pytest.fixture(scope="module")
def tokenizer_json(tmp_path_factory) -> Path:
    """Byte-level BPE that splits digits and begins texts with a token, as SmolLM2 and Llama 3 do."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<end>", "<begin>"]
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=special, initial_alphabet=alphabet)
    library.train_from_iterator(strings(), trainer)
    library.post_processor = processors.TemplateProcessing(single="<begin> $A", special_tokens=[("<begin>", 1)])
    folder = tmp_path_factory.mktemp("tokenizer_json")
    library.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("named", ["LlamaTokenizerFast", "GPT2Tokenizer", "Qwen2Tokenizer", "PreTrainedTokenizerFast"])
def test_tokenizer_json_is_read_as_it_is_whatever_class_is_named(tokenizer_json, named, model_type, tmp_path):
    from tokenizers import Tokenizer as Library

    shutil.copy(tokenizer_json / "tokenizer.json", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    settings = {"tokenizer_class": named, "eos_token": "<end>", "bos_token": "<begin>", "chat_template": CHAT}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    library = Library.from_file(str(tmp_path / "tokenizer.json"))

    tokenizer = load(tmp_path)
    assert tokenizer.eos_id == 0
    check(tokenizer, lambda text: library.encode(text, add_special_tokens=False).ids, library.decode, [1])
    assert chat_ids(tokenizer, "hi") == [*library.encode("user: hi", add_special_tokens=False).ids, 0]


# --- SentencePiece


def sentencepiece_file(version: str) -> Path:
    """Return a real model of 32k pieces, which ships with mistral-common."""
    data = Path(
        pytest.importorskip("mistral_common", reason="mistral-common, which has the model, is not here").__file__
    )
    found = list((data.parent / "data").glob(f"*.model.{version}"))
    if not found:
        pytest.skip(f"this mistral-common has no SentencePiece model {version}")
    return found[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        None,
        {"tokenizer_class": "LlamaTokenizer", "chat_template": CHAT},
        {"tokenizer_class": "LlamaTokenizer", "legacy": True, "bos_token": "<s>", "eos_token": "</s>"},
    ],
    ids=["model only", "LlamaTokenizer", "legacy"],
)
@pytest.mark.parametrize("version", ["v1", "v3"])
def test_sentencepiece_ids_and_texts_are_the_librarys(version, settings, tmp_path):
    from sentencepiece import SentencePieceProcessor

    shutil.copy(sentencepiece_file(version), tmp_path / "tokenizer.model")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mistral"}))
    if settings:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    library = SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))

    tokenizer = load(tmp_path, library.vocab_size())
    assert (tokenizer.eos_id, tokenizer.size) == (library.eos_id(), library.vocab_size())
    check(tokenizer, library.encode, library.decode, [library.bos_id()])
    # the library never makes a special token from text; a chat needs them, with a text of its own between two
    end = library.eos_id()
    assert text_ids(tokenizer, "one</s>two")[1:] == [*library.encode("one"), end, *library.encode("two")]
    assert tokenizer._backend.decode([*library.encode("one\n"), end, *library.encode(" two")]) == "one\n</s> two"
    if settings and "chat_template" in settings:
        assert chat_ids(tokenizer, "hi  there") == [*library.encode("user: hi  there"), end]


def test_control_pieces_of_a_sentencepiece_model_are_special_tokens(tmp_path):
    from sentencepiece import SentencePieceProcessor

    shutil.copy(sentencepiece_file("v3"), tmp_path / "tokenizer.model")
    template = "{{ bos_token }}{% for message in messages %}[INST]{{ message['content'] }}[/INST]{% endfor %}"
    (tmp_path / "chat_template.jinja").write_text(template)
    library = SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))

    begin, opens, closes = (library.piece_to_id(piece) for piece in ("<s>", "[INST]", "[/INST]"))
    assert chat_ids(load(tmp_path), "hi") == [begin, opens, *library.encode("hi"), closes]


# --- errors, each in one line


def refusal(folder: Path, vocab_size: int = 200_000) -> str:
    with pytest.raises(UserError) as caught:
        load(folder, vocab_size)
    line = str(caught.value)
    assert line.startswith(f"model.tokenizer: {folder}: ") and "\n" not in line
    return line


def test_more_tokens_than_the_model_has_are_refused(tokenizer_json, tmp_path):
    last = len(json.loads((tokenizer_json / "tokenizer.json").read_text())["model"]["vocab"]) - 1
    assert f"token id {last} does not fit the model's vocabulary of {last}" in refusal(tokenizer_json, last)
    shutil.copy(sentencepiece_file("v1"), tmp_path / "tokenizer.model")
    assert "has 32000 tokens, more than the model's vocabulary of 31999" in refusal(tmp_path, 31_999)


@pytest.mark.parametrize(
    "name, content, about",
    [
        ("tokenizer.model", b"\x00\x01 not a model", "cannot be loaded: "),
        ("tokenizer.model", b"", "cannot be loaded: "),
        ("tokenizer.json", b"{", "cannot be loaded: JSONDecodeError"),
        ("nothing.txt", b"", "cannot be loaded: "),
    ],
)
def test_damaged_tokenizer_files_are_refused(tmp_path, name, content, about):
    (tmp_path / name).write_bytes(content)
    assert about in refusal(tmp_path)


@pytest.mark.parametrize("name", ["qwen.tiktoken", "tiktoken.model", "tokenizer.model"])
def test_a_tiktoken_file_is_refused_by_name_unless_there_is_a_tokenizer_json(tokenizer_json, tmp_path, name):
    (tmp_path / name).write_bytes(b"AA== 0\nAQ== 1\n")
    assert f"{name} is a tiktoken file: convert it to a tokenizer.json with transformers" in refusal(tmp_path)
    shutil.copy(tokenizer_json / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    load(tmp_path)


@pytest.mark.parametrize(
    "settings, about",
    [
        ({"legacy": False}, "tokenizer_config.json has legacy: false"),
        ({"auto_map": {"AutoTokenizer": ["mine.Mine", None]}}, "tokenizer_config.json asks for code of its own"),
        ({"eos_token": None}, "has no end-of-sequence token"),
    ],
)
def test_settings_that_cannot_be_followed_are_refused(tmp_path, settings, about):
    shutil.copy(sentencepiece_file("v1"), tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert about in refusal(tmp_path)


# --- copies


def test_all_tokenizer_files_are_copied_byte_for_byte(tmp_path):
    names = ["added_tokens.json", "chat_template.jinja", "merges.txt", "qwen.tiktoken", "special_tokens_map.json"]
    names += ["tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json"]
    source, target = tmp_path / "source", tmp_path / "target"
    for folder in (source, target):
        folder.mkdir()
    for name in [*names, "config.json", "model.safetensors", "mine.py"]:
        (source / name).write_bytes(name.encode() + b"\x00\r\n\xff")
    (source / "tokenizer.json").rename(tmp_path / "blob")  # as in a hub's cache, a link
    (source / "tokenizer.json").symlink_to(tmp_path / "blob")

    assert copy_tokenizer(source, target) == names
    assert sorted(path.name for path in target.iterdir()) == names
    for name in names:
        assert (target / name).read_bytes() == (source / name).read_bytes() and not (target / name).is_symlink()


def test_a_folder_without_a_tokenizer_has_no_files_to_copy(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert copy_tokenizer(tmp_path, tmp_path) == []
