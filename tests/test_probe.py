"""A run starts from a folder only as transformers reads it: the log-prob probe, and NaN weights."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from megatron_dypo.models.shape import RopeScaling
from tests.launch import copy_task
from tests.ranks import run_ranks
from tests.test_convert import FAMILY_SHAPES, hf_model

LLAMA3 = RopeScaling("llama3", 8.0, 1.0, 4.0, 64)
WIDE = {"num_layers": 4, "vocab_size": 259, "max_position": 512, "init_std": 0.2}
DAMAGED = "model.layers.1.mlp.down_proj.weight"
TRANSFORMERS = ["rollout.engine=transformers", "trainer.steps=1", "trainer.save_every=1", "trainer.eval_every=0"]


def byte_tokenizer(folder: Path) -> None:
    """Write a tokenizer with a token per byte, and an end token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    library = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    ends = {"eos_token": "<eos>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=library, **ends).save_pretrained(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    made = {}
    for family, rope in (("llama", LLAMA3), ("qwen3_moe", None)):
        made[family] = tmp_path_factory.mktemp("hf") / family
        shape = dataclasses.replace(FAMILY_SHAPES[family], rope_scaling=rope, **WIDE)
        hf_model(shape).save_pretrained(made[family])
        byte_tokenizer(made[family])
    return made


@contextlib.contextmanager
def heard():
    """Collect the project's log lines, from info on."""
    stream, logger = io.StringIO(), logging.getLogger("megatron_dypo")
    handler, level = logging.StreamHandler(stream), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield stream
    logger.removeHandler(handler)
    logger.setLevel(level)


def probed(folder: str, parallel: dict, changes: list[tuple[str, float]]) -> list[str]:
    """Return the probe's results for a policy at a layout: unchanged, and with one part scaled, by ``changes``."""
    from megatron_dypo.config.schema import Model
    from megatron_dypo.convert.hf_weights import folder_weights
    from megatron_dypo.data.tokenizer import load_tokenizer
    from megatron_dypo.errors import UserError
    from megatron_dypo.models.shape import model_shape
    from megatron_dypo.policy import hf_probe
    from megatron_dypo.policy.policy import Policy
    from megatron_dypo.runtime import distributed
    from tests.batches import make_config

    config = make_config(parallel=parallel)
    config.model = Model(hf=folder)
    layout, shape = distributed.init(config.parallel), model_shape(config.model)
    policy, tokenizer = Policy(config, shape, layout, folder_weights(folder)), load_tokenizer(config, shape)
    asked, said = hf_probe._reference, []
    known = asked(config.model, Path(folder), tokenizer, 100.0, shape.max_position) if layout.is_main else None
    hf_probe._reference = lambda *_: known  # transformers' part is the same each time
    for part, factor in [("", 1.0), *changes]:
        for chunk in policy.chunks:
            for name, values in [*chunk.module.named_buffers(), *chunk.module.named_parameters()]:
                if part and name.endswith(part):
                    values.data.mul_(factor)
        if part == "rope":
            policy._frequencies *= factor
        with heard() as stream:
            try:
                hf_probe.probe(policy, Path(folder), tokenizer, 200.0)
                said.append(stream.getvalue())
            except UserError as error:
                said.append(str(error))
    return said


LAYOUTS = [
    ("llama", 4, {"tensor": 2, "sequence_parallel": True, "pipeline": 2}),
    ("qwen3_moe", 2, {"expert": 2}),
]


@pytest.mark.parametrize(("family", "ranks", "parallel"), LAYOUTS, ids=str)
def test_the_probe_agrees_at_every_layout_and_refuses_a_part_that_is_off(folders, family, ranks, parallel):
    changes = [("rope", 1.01), ("final_layernorm.weight", 1.01)]
    results = run_ranks(ranks, probed, str(folders[family]), parallel, changes, seconds=200)
    assert all("log-probs of a text match transformers' up to " in result[0] for result in results)
    for said in results[0][1:]:
        assert said.startswith(f"model.hf: {folders[family]}: the policy's log-probs are ")
        assert "from transformers', more than 0.001 at most: " in said and "(token " in said
    assert all(result[1:] == results[0][1:] for result in results)  # every rank stops, with the same line


def start(folder: Path, hf: Path, **overrides: object) -> Path:
    """Return a configuration that trains from the folder; ``overrides`` as for ``copy_task``."""
    path = copy_task(folder, data__max_prompt_tokens=32, data__max_tokens_per_microbatch=512, **overrides)
    config = yaml.safe_load(path.read_text())
    config["model"] = {"hf": str(hf)} | {name: value for name, value in config["model"].items() if name == "probe"}
    path.write_text(yaml.safe_dump(config))
    return path


def trained(config: str, overrides: list[str], fault: str) -> tuple[int, str]:
    """Return (exit code, output) of ``train`` with a planted fault."""
    from megatron_dypo import trainer
    from megatron_dypo.cli import main
    from megatron_dypo.models import shape
    from megatron_dypo.policy import hf_probe

    if fault == "rope base":  # as if we misread the field
        read = shape.read_shape
        shape.read_shape = lambda path: read(path) | {"rope_base": 700.0}
    elif fault == "no memory":
        hf_probe.free_host_memory = lambda: 1000
    elif fault == "slow":
        hf_probe.SECONDS = 0.01
    elif fault == "never asked":
        trainer.probe = None
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed), heard() as stream:
        code = main(["train", config, *TRANSFORMERS, *overrides])
    return code, printed.getvalue() + stream.getvalue()


def test_a_wrong_reading_of_config_json_ends_the_run_before_its_first_step(folders, tmp_path):
    config = start(tmp_path, folders["llama"])
    ((code, printed),) = run_ranks(1, trained, str(config), [], "rope base", seconds=200)
    assert code == 2 and "the policy's log-probs are " in printed, printed
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("fault", "override", "code", "line"),
    [
        ("no memory", "auto", 0, "GiB are more than a quarter of "),
        ("slow", "auto", 0, "transformers did not finish within 0.01 s"),
        ("never asked", "off", 0, ""),
    ],
)
def test_the_probe_costs_no_more_than_it_may(folders, tmp_path, fault, override, code, line):
    config = start(tmp_path, folders["llama"])
    ((found, printed),) = run_ranks(1, trained, str(config), [f"model.probe={override}"], fault)
    assert found == code and line in printed, printed


def test_a_resumed_run_is_not_probed(folders, tmp_path):
    config = start(tmp_path, folders["llama"])
    assert run_ranks(1, trained, str(config), ["model.probe=off"], "")[0][0] == 0
    ((code, printed),) = run_ranks(1, trained, str(config), ["trainer.steps=2"], "never asked")
    assert code == 0, printed


def damaged(hf: Path, folder: Path, name: str = DAMAGED, value: float = float("nan")) -> Path:
    """Return a copy of the Hugging Face folder with one element of a tensor replaced."""
    folder.mkdir()
    for file in hf.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(hf / "model.safetensors")
    tensors[name].view(-1)[5] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_run_does_not_start_from_weights_with_nan_and_names_the_tensor(folders, tmp_path):
    hf = damaged(folders["llama"], tmp_path / "hf", "model.layers.2.self_attn.k_proj.weight", float("inf"))
    ((code, printed),) = run_ranks(1, trained, str(start(tmp_path, hf)), [], "")
    assert code == 2, printed
    assert f"model.hf: {hf}: NaN or infinite: model.layers.2.self_attn.k_proj.weight: this model " in printed


def converted(hf: str, out: str) -> list[tuple[int, str]]:
    from megatron_dypo.cli import main

    results = []
    for arguments in (["import", "--hf", hf, "--out", out], ["verify", "--hf", hf, "--checkpoint", out]):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed), heard() as stream:
            code = main(["convert", *arguments])
        results.append((code, printed.getvalue() + stream.getvalue()))
    return results


def test_a_bit_equal_copy_with_nan_is_verified_with_a_warning_that_names_the_tensor(folders, tmp_path):
    hf = damaged(folders["llama"], tmp_path / "hf")
    (imported, verified) = run_ranks(1, converted, str(hf), str(tmp_path / "checkpoint"))[0]
    marked = f"tensor {DAMAGED}: 1 of {48 * 80:,} elements are NaN or infinite"
    assert imported[0] == 0 and f"{hf}: {marked}" in imported[1]
    assert verified[0] == 0 and f"WARNING: {marked}" in verified[1]
    assert "are equal, bit for bit" in verified[1] and "verified: the same model" in verified[1]


def test_a_nan_in_only_one_of_two_models_is_a_difference(folders, tmp_path):
    hf = damaged(folders["llama"], tmp_path / "hf")
    run_ranks(1, converted, str(hf), str(tmp_path / "checkpoint"))
    from tests.test_import_export import run

    code, printed = run(1, "verify", "--hf", folders["llama"], "--checkpoint", tmp_path / "checkpoint")
    assert code == 1 and f"differs: {DAMAGED}: 1 of {48 * 80} elements" in printed, printed
