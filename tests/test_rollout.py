"""The rollout engines against the policy: log-probs agree after a sync of different weights, at every layout."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from megatron_dypo.errors import TrainingError
from megatron_dypo.rollout.vllm_versions import installed
from megatron_dypo.runtime import versions
from tests.agreement import MODELS, agree, agreement, build, check, compare, policy_at, requests, sampling
from tests.planted import GIVEN, STORED, planted
from tests.ranks import run_ranks


@pytest.mark.parametrize(
    "engine, model",
    [
        ("vllm", "llama"), ("vllm", "qwen3"),
        pytest.param("vllm", "mixtral", marks=pytest.mark.faults),
        ("transformers", "llama-tied"), ("transformers", "qwen3_moe"),
    ],
)  # fmt: skip
def test_engine_logprobs_agree_after_a_sync_of_different_weights(engine, model, tmp_path):
    check(run_ranks(2, agreement, engine, model, str(tmp_path), {}, seconds=300), 1e-5)


def proved(model: str, folder: str) -> tuple[list[dict], dict]:
    """Return the agreement while all stored weights are verified, and the answers to planted faults."""
    parts = build("vllm", model, folder, verify_sync="stored", verify_syncs=1)
    return agree(*parts), planted(model, *parts)


@pytest.mark.parametrize("model", ["qwen2-tied", "qwen3_moe"])
def test_what_is_stored_is_what_was_sent_at_every_layout_and_a_fault_is_named_with_its_rank(model, tmp_path):
    """The faults are tensors perturbed by the smallest step, transposed, another expert's, missing or doubled."""
    ranks = run_ranks(2, proved, model, str(tmp_path), seconds=300)
    check([found for found, _ in ranks], 1e-5)
    for rank, (_, said) in enumerate(ranks):
        unseen, turns = said.pop("sent"), said.pop("in turn")
        assert set(unseen.values()) == {""}, "the engine took what was sent: what it stores is another question"
        assert sorted(map(bool, turns.values())) == [False, False, False, True], "each tensor once in four syncs"
        start, end = f"weight sync to vLLM of rank {rank}, worker 0: ", " (rollout.verify_sync)"
        for messages in said.values():
            assert messages.pop("none") == ""
            for fault in GIVEN:
                assert messages.pop(fault) == start + fault + end
            assert len(messages) == len(STORED[model])
            for name, message in messages.items():
                assert message == (f"{start}{name}: is not what the engine has stored{end}" if rank else ""), name


def faulty_syncs(folder: str) -> dict:
    """Sync vLLM with a tied head correctly (after a broken-off sync), and then with one fault after another."""
    from megatron_dypo.weight_sync import transfer
    from megatron_dypo.weight_sync.source import Weights

    config, shape, layout, engine = build("vllm", "qwen2-tied", folder, verify_sync="sent", verify_syncs=1)
    asked, found = requests(), {}

    class Without(Weights):
        """All tensors but one."""

        def __init__(self, policy, name: str):
            super().__init__(policy)
            self._name = name

        def __iter__(self):
            return (pair for pair in super().__iter__() if pair[0] != self._name)

    class Torn(Weights):
        """Ends in the middle of an attention layer."""

        def __iter__(self):
            for name, tensor in super().__iter__():
                if name == "model.layers.1.self_attn.v_proj.weight":
                    raise ConnectionError("the trainer is gone")
                yield name, tensor

    first, second = (policy_at({}, seed, config, shape, layout) for seed in (1, 2))
    engine.sync(Weights(second))
    usual, transfer.BUCKET_BYTES = transfer.BUCKET_BYTES, 1  # splits anywhere
    with pytest.raises(ConnectionError):
        engine.sync(Torn(second))
    transfer.BUCKET_BYTES = usual
    with pytest.raises(ValueError, match=r"named 'layers.0.self_attn.z_proj' in Qwen2Model"):
        engine.sync(Given({"model.layers.0.self_attn.z_proj.weight": torch.ones(8, 8)}))
    engine.sync(Weights(first))
    found["right"] = compare(first, asked, engine.generate(asked, sampling()))["largest"]
    found["in place"] = engine._llm.collective_rpc("in_place_fault")
    for name in ("lm_head.weight", "model.layers.1.mlp.down_proj.weight"):
        with pytest.raises(TrainingError) as refused:
            engine.sync(Without(second, name))
        found[name] = str(refused.value)
    engine._verify = "off"
    engine.sync(Weights(first))
    engine.sync(Without(second, "lm_head.weight"))
    found["no head"] = compare(second, asked, engine.generate(asked, sampling()))["largest"]
    engine.sync(Weights(first))
    engine.generate(asked, sampling())
    engine._llm.reset_prefix_cache = lambda: True
    engine.sync(Weights(second))
    found["stale cache"] = compare(second, asked, engine.generate(asked, sampling()))["largest"]
    return found


def test_a_dropped_tensor_a_missing_head_and_a_stale_prefix_cache_are_noticed(tmp_path):
    found = run_ranks(1, faulty_syncs, str(tmp_path), seconds=200)[0]
    assert found["right"] < 1e-5, "a sync that broke off leaves nothing behind"
    for name in ("lm_head.weight", "model.layers.1.mlp.down_proj.weight"):
        assert f"vLLM of rank 0, worker 0: {name}: was not received (rollout.verify_sync)" in found[name]
    assert found["stale cache"] > 0.1, "log-probs show it"
    packed = "model.embed_tokens keeps its weights in the order of a kernel"
    assert found["in place"][0].startswith(packed), "so that sparse_nccl is refused by name"
    if versions.release(installed().version) >= (0, 28):  # before, vLLM ties a head again by itself
        assert found["no head"] > 0.1, "log-probs show it without verify_sync, too"


class Given(dict):
    """Weights by name, in the form that a sync takes."""

    version = 1

    def metadata(self) -> list:
        from megatron_dypo.weight_sync.source import Meta

        return [Meta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self.items()]

    def __iter__(self):
        return iter(self.items())


def test_a_dropped_expert_and_a_weight_of_another_shape_are_noticed_by_transformers():
    from megatron_dypo.models.shape import PRESETS
    from megatron_dypo.rollout.hf_engine import HfEngine
    from megatron_dypo.weight_sync.source import sent_shapes

    shape = dataclasses.replace(PRESETS["tiny"], **MODELS["mixtral"])
    engine, expert = HfEngine(shape), "model.layers.1.block_sparse_moe.experts.3.w3.weight"
    weights = Given((name, torch.zeros(size)) for name, size in sent_shapes(shape).items())
    engine.sync(weights)
    weights[expert] = torch.ones(1)
    with pytest.raises(RuntimeError, match=f"{expert}: \\[1\\], not"):
        engine.sync(weights)
    del weights[expert]
    with pytest.raises(RuntimeError, match=r"missing \['model.layers.1.mlp.experts.gate_up_proj'\]"):
        engine.sync(weights)


def test_samples_differ_between_seeds(tmp_path):
    """Eight samples of one prompt under hashed seeds are not copies of each other."""
    distinct = run_ranks(1, sample_one_prompt, str(tmp_path))[0]
    assert distinct > 6


def sample_one_prompt(folder: str) -> int:
    from pathlib import Path

    from megatron_dypo.data.tokenizer import load_tokenizer
    from megatron_dypo.models.shape import PRESETS
    from megatron_dypo.records import Group, Prompt
    from megatron_dypo.rollout.engines import build_engine
    from megatron_dypo.rollout.sampling import sample
    from megatron_dypo.runtime import distributed
    from tests.batches import make_config

    layout = distributed.init()
    config = make_config(rollout={"engine": "transformers"})
    config.rollout.samples_per_prompt = 8
    engine = build_engine(config, PRESETS["tiny"], load_tokenizer(config, PRESETS["tiny"]), Path(folder), layout)
    group = Group(Prompt("p", "1", ()), np.arange(3, 9, dtype=np.int32))
    sample([group], engine, config, 1, 1)
    return len({tuple(response.ids.tolist()) for response in group.responses})
