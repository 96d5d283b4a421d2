"""A ``config.json`` means the same here as in transformers, or is refused by the name of the field that differs."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import dataclass, replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from megatron_dypo.convert.hf_files import copy_metadata
from megatron_dypo.errors import UserError
from megatron_dypo.models.families import FAMILIES
from megatron_dypo.models.shape import ModelShape, folder_shape
from megatron_dypo.policy.attention import frequencies

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "initializer_range": 0.5,  # so that each token clearly sees what it attends to
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
PLAIN = {"rope_type": "default", "rope_theta": 300.0}
# For each group of fields, the ways in which files have them; {} is absent.
MATRIX: dict[str, list[dict]] = {
    "rope": [
        {},
        {"rope_theta": 500.0},
        {"rope_theta": 500},
        {"rope_theta": None},
        {"rope_theta": 500.0, "rope_scaling": None},
        {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_theta": 500.0, "rope_scaling": LLAMA3 | {"original_max_position_embeddings": 16}},
        {"rope_scaling": LLAMA3},
        {"rope_theta": 500.0, "rope_scaling": YARN},
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        {"rope_parameters": PLAIN},
        {"rope_parameters": PLAIN, "rope_theta": 500.0},
        {"rope_parameters": None, "rope_theta": 500.0},
        {"rope_parameters": {}, "rope_theta": 500.0},
        {"rope_parameters": {"rope_type": "linear", "factor": 3.0}, "rope_theta": 500.0},
        {"rope_parameters": PLAIN, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"rope_parameters": PLAIN, "rope_scaling": {"rope_type": "linear", "factor": 2.0, "rope_theta": 700.0}},
        {"rope_parameters": PLAIN, "rope_scaling": LLAMA3},
        {"rope_parameters": PLAIN, "rope_scaling": YARN | {"rope_theta": 300.0}},
        {"rope_parameters": YARN | {"rope_theta": 9.0}, "rope_scaling": {"rope_type": "default"}},
        {"rope_scaling": {"type": "yarn", "rope_type": "default", "factor": 4.0}},
        {"rope_scaling": {"type": "linear", "rope_type": "llama3", **LLAMA3}},
    ],
    "rms_norm_eps": [{}, {"rms_norm_eps": 1e-4}, {"rms_norm_eps": None}],
    "head_dim": [{}, {"head_dim": 8}, {"head_dim": 12}, {"head_dim": None}],
    "heads": [{}, {"num_key_value_heads": None}, {"num_key_value_heads": 2}],
    "tie": [{}, {"tie_word_embeddings": True}, {"tie_word_embeddings": False}, {"tie_word_embeddings": None}],
    "window": [
        {},
        {"sliding_window": None},
        {"sliding_window": 4},
        {"sliding_window": 4, "use_sliding_window": False},
        {"sliding_window": 4, "use_sliding_window": True},
        {"sliding_window": None, "use_sliding_window": True},
        {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 0},
        {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 1},
        {"sliding_window": 4, "use_sliding_window": True, "layer_types": ["full_attention"]},
        {"sliding_window": 4, "use_sliding_window": True, "layer_types": ["sliding_attention"]},
        {"layer_types": ["sliding_attention"]},
        {"layer_types": None},
    ],
    "dtype": [
        {},
        {"torch_dtype": "bfloat16"},
        {"dtype": "bfloat16"},
        {"dtype": "float16", "torch_dtype": "bfloat16"},
        {"dtype": None, "torch_dtype": None},
    ],
}
WINDOWED = ("mistral",)  # families that slide unless the file says otherwise
COMBINED = 20  # random combinations per family, besides each way alone


@dataclass
class Reading:
    """What a model does, as far as ``config.json`` determines it."""

    inv_freq: torch.Tensor
    norm_eps: float
    head_dim: int
    num_query_groups: int
    tied: bool
    experts: tuple[int, int]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Reading):
            return False
        mine, theirs = vars(self).copy(), vars(other).copy()
        same = torch.allclose(mine.pop("inv_freq"), theirs.pop("inv_freq"), rtol=1e-6, atol=0)
        return same and mine == theirs


def ours(folder) -> Reading | str:
    """Return our reading, or the line that refuses the folder."""
    try:
        shape: ModelShape = folder_shape(folder)
    except UserError as error:
        assert "\n" not in str(error)
        return str(error)
    sizes = (shape.norm_eps, shape.head_dim, shape.num_query_groups, shape.tied_embeddings)
    return Reading(frequencies(shape), *sizes, (shape.num_experts, shape.router_topk))


def theirs(folder) -> tuple[Reading, bool] | None:
    """Return transformers' reading, and whether we support that kind; None if it builds no model."""
    try:
        config = AutoConfig.from_pretrained(folder)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        ids = torch.arange(12)[None]
        with torch.no_grad():
            last = [model(row).logits[0, -1] for row in (ids, ids.index_fill(1, torch.tensor([0]), 20))]
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError):
        return None
    except Exception as error:
        assert type(error).__name__.startswith("StrictDataclass"), error
        return None
    attention, rope = model.model.layers[0].self_attn, model.model.rotary_emb
    gate = getattr(model.model.layers[0].mlp, "gate", None)
    experts = (gate.weight.shape[0], gate.top_k) if hasattr(gate, "top_k") else (0, 0)
    reading = Reading(
        rope.inv_freq,
        model.model.norm.variance_epsilon,
        attention.head_dim,
        attention.k_proj.out_features // attention.head_dim,
        model.lm_head.weight is model.model.embed_tokens.weight,
        experts,
    )
    slides = torch.allclose(*last, rtol=1e-4, atol=1e-4)  # the last token sees nothing of the first
    slides |= "sliding_attention" in (getattr(config, "layer_types", None) or ())
    slides |= config.model_type in WINDOWED and config.sliding_window is not None  # of a longer text
    known = rope.rope_type in ("default", "linear", "llama3") and config.model_type in FAMILIES and not slides
    return reading, known


def cases(family: str) -> list[dict]:
    """Return fields of ``config.json`` besides ``SIZES``: each way alone, and some combined."""
    base = {"sliding_window": None} if family in WINDOWED else {}
    chosen = random.Random(family)
    alone = [base | way for way in itertools.chain(*MATRIX.values())]
    combined = [
        base | {name: value for ways in MATRIX.values() for name, value in chosen.choice(ways).items()}
        for _ in range(COMBINED)
    ]
    return [*alone, *combined, {}]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_reads_config_json_as_transformers_does(family, tmp_path):
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    read, refused = 0, 0  # files
    for fields in cases(family):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": family} | SIZES | fields))
        mine, model = ours(tmp_path), theirs(tmp_path)
        if model is None or not model[1]:
            assert isinstance(mine, str), (fields, mine, model)
            named = (*fields, "sliding_window", "rope type")  # a default or a part of a block may be what is refused
            assert any(name in mine for name in named), mine
            refused += 1
        else:
            assert model[0] == mine, (fields, mine, model[0])
            read += 1
    logging.set_verbosity(verbosity)
    assert read > 25 and refused > 10, (read, refused)


REFUSED = ("yarn", "dynamic", "'rope_theta': None")
FOLLOWED = [rope for rope in MATRIX["rope"] if not any(word in str(rope) for word in REFUSED)]


@pytest.mark.parametrize("rope", FOLLOWED, ids=str)
def test_what_a_run_changed_is_what_transformers_reads_in_the_exported_config_json(rope, tmp_path):
    fields = {"model_type": "llama"} | SIZES | rope | {"dtype": "float16", "torch_dtype": "bfloat16"}
    for name in ("hf", "back"):
        (tmp_path / name).mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps(fields))
    changed = replace(folder_shape(tmp_path / "hf"), rope_base=900.0, max_position=128)
    copy_metadata(tmp_path / "hf", tmp_path / "back", torch.float32, changed=changed)
    theirs = AutoConfig.from_pretrained(tmp_path / "back")
    assert theirs.rope_parameters["rope_theta"] == 900.0 and theirs.dtype == torch.float32
    assert folder_shape(tmp_path / "back") == changed
