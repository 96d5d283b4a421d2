"""Hugging Face folders in and out of a sharded policy: log-probs equal transformers', tensors come back bit for bit."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_dypo.convert.hf_weights import check_folder, folder_weights
from megatron_dypo.errors import UserError
from megatron_dypo.models.families import FAMILIES, hf_shapes, rules
from megatron_dypo.models.shape import PRESETS, ModelShape
from tests.ranks import run_ranks

# head_dim differs from hidden / heads, groups from heads, and the vocabulary from any multiple of 1024
SHAPE = dataclasses.replace(
    PRESETS["tiny"],
    hidden_size=48,
    ffn_hidden_size=80,
    num_query_groups=2,
    head_dim=16,
    vocab_size=131,
    rope_base=500.0,
)
MIXTURE = {"num_experts": 4, "router_topk": 2}
FAMILY_SHAPES = {
    family: dataclasses.replace(SHAPE, family=family, **(MIXTURE if FAMILIES[family].has_experts else {}))
    for family in FAMILIES
}
FAMILY_SHAPES["qwen2_moe"] = dataclasses.replace(
    FAMILY_SHAPES["qwen2_moe"], norm_topk_prob=False, shared_expert_ffn_hidden_size=56
)
SEQUENCE = {"tensor": 2, "sequence_parallel": True}
LAYOUTS = [  # family, tied, ranks, layout; a mixture's embedding and head are the dense families'
    (family, tied, ranks, parallel)
    for family in FAMILIES
    for tied, ranks, parallel in (
        [(False, 2, {"expert": 2}), (True, 4, SEQUENCE | {"expert": 2, "expert_tensor": 2})]
        if FAMILIES[family].has_experts
        else [(t, r, p) for t in (False, True) for r, p in ((1, {}), (2, SEQUENCE), (2, {"pipeline": 2}))]
    )
]


def hf_model(shape: ModelShape):
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = shape.to_hf_config()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(fields.pop("model_type"), **fields), dtype=torch.float32
    )
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):  # ones and zeros would hide a mix-up
            torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.2)
    return model.eval()


def saved_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return the tensors in a Hugging Face folder's files."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        held = load_file(file)
        assert not held.keys() & found.keys()
        found |= held
    return found


def round_trip(folder: str, parallel: dict) -> dict:
    """Load the folder at a layout; return log-probs of two sequences (last stage), and the gathered tensors."""
    import numpy as np

    from megatron_dypo.config.schema import Model
    from megatron_dypo.convert.hf_weights import folder_weights
    from megatron_dypo.models.export import hf_tensors
    from megatron_dypo.models.shape import model_shape
    from megatron_dypo.policy.micro_batch import MicroBatch
    from megatron_dypo.policy.policy import Policy
    from megatron_dypo.records import Kind, Sequence
    from megatron_dypo.runtime import distributed
    from tests.batches import make_config

    config = make_config(parallel=parallel)
    config.model = Model(hf=folder)
    layout = distributed.init(config.parallel)
    shape = model_shape(config.model)
    policy = Policy(config, shape, layout, folder_weights(folder))
    sequences = [
        Sequence(np.arange(2, 2 + n, dtype=np.int32) % 131, 1, Kind.TEACHER, i, 0) for i, n in enumerate((9, 40))
    ]
    logp = policy.logprobs([MicroBatch.pack(sequences, [0, 1], 1.0, tensor=2)])  # the same for every replica
    tensors = {name: tensor.numpy().copy() for name, tensor in hf_tensors(policy.parameters, shape, layout)}
    return {"logp": [values.numpy() for values in logp], "tensors": tensors}


@pytest.mark.parametrize(("family", "tied", "ranks", "parallel"), LAYOUTS, ids=str)
def test_hf_folder_round_trip(family, tied, ranks, parallel, tmp_path):
    model = hf_model(dataclasses.replace(FAMILY_SHAPES[family], tied_embeddings=tied))
    model.save_pretrained(tmp_path, max_shard_size="60KB")  # several shards and an index
    assert (tmp_path / "model.safetensors.index.json").exists()
    expected = []
    for n in (9, 40):
        ids = torch.arange(2, 2 + n)[None] % 131
        with torch.no_grad():
            logp = model(ids).logits[0, :-1].log_softmax(-1)
        expected.append(logp.gather(1, ids[0, 1:, None]).squeeze(1))
    expected = torch.cat(expected)
    saved = saved_tensors(tmp_path)  # transformers has one tensor of a layer's experts, and writes one each
    for result in run_ranks(ranks, round_trip, str(tmp_path), parallel):
        for values in result["logp"]:
            assert (torch.from_numpy(values) - expected).abs().max() < 1e-5
        assert result["tensors"].keys() == saved.keys()
        for name, tensor in saved.items():
            assert torch.equal(torch.from_numpy(result["tensors"][name]), tensor), name


@pytest.mark.parametrize("family", ["qwen2", "qwen2_moe"])
def test_fold_and_unfold_are_inverse_for_every_rule(family):
    shape = FAMILY_SHAPES[family]
    shapes = hf_shapes(shape)
    for rule in rules(shape):
        parts = [torch.randn(shapes[name]) for name in rule.names]
        back = rule.unfold(rule.fold(parts, shape), shape)
        assert all(torch.equal(a, b) for a, b in zip(parts, back, strict=True)), rule.mcore


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_number_of_parameters_is_the_sum_of_all_tensors(family):
    shape = FAMILY_SHAPES[family]
    assert shape.parameters == sum(torch.Size(size).numel() for size in hf_shapes(shape).values())


def test_damaged_folders_are_named(tmp_path):
    model = hf_model(SHAPE)
    model.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    with pytest.raises(UserError, match=r"tensor model\.nonsense is missing"):
        folder_weights(tmp_path)("model.nonsense")
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"model\.safetensors: cannot be read"):
        folder_weights(tmp_path)
    weights.unlink()
    with pytest.raises(UserError, match=r"no model\.safetensors"):
        folder_weights(Path(tmp_path))


def test_what_lies_beside_the_weights_and_is_not_read_is_said(tmp_path, caplog):
    model = hf_model(SHAPE)
    model.save_pretrained(tmp_path)
    check_folder(tmp_path, SHAPE)
    assert caplog.text == ""
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    check_folder(tmp_path, SHAPE)
    assert "adapter_config.json is not read" in caplog.text


def drawn(cores: int, block: int) -> dict:
    import os

    from megatron_dypo.models import sharding

    os.sched_getaffinity = lambda process: range(cores)
    sharding.BLOCK = block
    read = sharding.random_weights(SHAPE, seed=7)
    return {name: read(name).numpy() for name in hf_shapes(SHAPE)}


def test_initial_weights_do_not_depend_on_the_number_of_threads_and_their_blocks_are_independent():
    from megatron_dypo.runtime.determinism import generator

    name = "model.embed_tokens.weight"
    alone, together, whole = (run_ranks(1, drawn, *each)[0] for each in ((1, 1000), (5, 1000), (5, 2**20)))
    assert alone.keys() == together.keys() and all((alone[each] == together[each]).all() for each in alone)
    blocks = torch.from_numpy(alone[name]).view(-1)[:6000].view(6, 1000)
    gram = blocks @ blocks.T / SHAPE.init_std**2 / 1000
    assert (gram - torch.eye(6)).abs().max() < 0.2, "of unit variance, and no two alike"
    drawn_at_once = torch.randn(SHAPE.vocab_size, SHAPE.hidden_size, generator=generator(7, "weights", name))
    assert torch.equal(torch.from_numpy(whole[name]), drawn_at_once * SHAPE.init_std)
