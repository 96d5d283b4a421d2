"""An engine's log-probs against the policy's, after syncs of different weights at different layouts (forked ranks)."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from tests.batches import make_config

LAYOUTS = ({"tensor": 2}, {"pipeline": 2})
EXPERT_LAYOUTS = ({"expert": 2}, {"tensor": 2, "sequence_parallel": True, "expert_tensor": 2})
SEEDS = (1, 2)
PROMPT_LENGTHS = (200, 3, 11, 2, 5, 7, 4, 9, 6, 10, 8, 2)  # the first fills blocks of vLLM's prefix cache
MODELS = {  # differences from the preset `tiny`
    "llama": {},
    "llama-tied": {"tied_embeddings": True},
    "qwen2-tied": {"family": "qwen2", "tied_embeddings": True},
    "qwen3": {"family": "qwen3"},
    "qwen3_moe": {"family": "qwen3_moe", "ffn_hidden_size": 96, "num_experts": 8, "router_topk": 2},
    "mixtral": {"family": "mixtral", "ffn_hidden_size": 96, "num_experts": 4, "router_topk": 2},
}
SAMPLES = 4
TEMPERATURE = 0.8
ENDS = (1, 40)  # of a response


def build(name: str, model: str, folder: str, **rollout: object):
    """Return (configuration, shape, layout, engine) of this rank."""
    from megatron_dypo.data.tokenizer import load_tokenizer
    from megatron_dypo.models.shape import PRESETS
    from megatron_dypo.rollout.engines import build_engine
    from megatron_dypo.runtime import distributed

    config = make_config(rollout={"engine": name, **rollout})
    shape = dataclasses.replace(PRESETS["tiny"], **MODELS[model])
    layout = distributed.init()
    tokenizer = load_tokenizer(config, shape)
    return config, shape, layout, build_engine(config, shape, tokenizer, Path(folder) / f"rank_{layout.rank}", layout)


def policy_at(parallel: dict[str, int], seed: int, config, shape, layout):
    """Build a policy with other weights, sharded differently."""
    from megatron.core import parallel_state as mpu

    from megatron_dypo.config.schema import Parallel
    from megatron_dypo.models.sharding import random_weights
    from megatron_dypo.policy.policy import Policy

    config.parallel = Parallel(**parallel)
    tp, pp, ep, etp = (parallel.get(name, 1) for name in ("tensor", "pipeline", "expert", "expert_tensor"))
    mpu.destroy_model_parallel()
    mpu.initialize_model_parallel(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp,
    )
    ranks = {
        "ep_rank": mpu.get_expert_model_parallel_rank(),
        "etp_rank": mpu.get_expert_tensor_parallel_rank(),
        "tp_rank": mpu.get_tensor_model_parallel_rank(),
        "pp_rank": mpu.get_pipeline_model_parallel_rank(),
        "dp_rank": mpu.get_data_parallel_rank(),
    }
    layout = dataclasses.replace(layout, tp=tp, pp=pp, ep=ep, etp=etp, dp=layout.world // (tp * pp), **ranks)
    return Policy(config, shape, layout, random_weights(shape, seed))


def requests(vocabulary: int = 104) -> list:
    """Return the requests, the same on every rank."""
    from megatron_dypo.rollout.engine import Request

    random = np.random.default_rng(0)
    prompts = [random.integers(3, vocabulary, length).astype(np.int32) for length in PROMPT_LENGTHS]
    return [Request(prompt, 100 * q + i) for q, prompt in enumerate(prompts) for i in range(SAMPLES)]


def sampling(tokens: int = 24):
    from megatron_dypo.rollout.engine import Sampling

    return Sampling(temperature=TEMPERATURE, top_p=1.0, max_tokens=tokens, eos_id=ENDS)


def compare(policy, asked: list, responses: list) -> dict:
    """Return the largest difference of a token's two log-probs (nats; None if this rank has none), and the samples."""
    from megatron_dypo.policy.micro_batch import MicroBatch
    from megatron_dypo.records import Kind, Sequence

    sequences = [
        Sequence(np.concatenate([request.prompt_ids, answer.ids]), len(request.prompt_ids), Kind.ROLLOUT, 0, i)
        for i, (request, answer) in enumerate(zip(asked, responses, strict=True))
    ]
    batch = MicroBatch.pack(sequences, list(range(len(sequences))), TEMPERATURE, **policy.layout.packing)
    ours = policy.logprobs([batch])
    theirs = np.concatenate([response.logprobs for response in responses])
    return {
        "largest": float(np.abs(ours[0].numpy() - theirs).max()) if ours else None,
        "ids": [response.ids.tolist() for response in responses],
        "finish": [response.finish_reason for response in responses],
        "versions": {response.weight_version for response in responses},
    }


def agreement(name: str, model: str, folder: str, rollout: dict) -> list[dict]:
    """Run ``agree`` with an engine built for it."""
    return agree(*build(name, model, folder, **rollout))


def agree(config, shape, layout, engine) -> list[dict]:
    """Compare per layout and weights, then sample the last again in another order, then greedily."""
    from megatron_dypo.rollout.engine import Request
    from megatron_dypo.weight_sync.source import sync_weights

    asked, found = requests(), []
    layouts = EXPERT_LAYOUTS if shape.num_experts else LAYOUTS
    for version, (parallel, seed) in enumerate((parallel, seed) for parallel in layouts for seed in SEEDS):
        policy = policy_at(parallel, seed, config, shape, layout)
        policy.version = version
        sync_weights(policy, engine, 60)
        found.append(compare(policy, asked, engine.generate(asked, sampling())))
    again = engine.generate(asked[::-1][:20], sampling())
    found.append({"ids": [response.ids.tolist() for response in again]})
    greedy = engine.generate([Request(asked[0].prompt_ids, None)] * 2, sampling())
    return [*found, {"ids": [response.ids.tolist() for response in greedy]}]


def check(ranks: list[list[dict]], limit: float) -> None:
    """Check what any engine must satisfy; ``limit`` in nats."""
    for found in ranks:
        compared, again, greedy = found[:-2], found[-2], found[-1]
        largest = [result["largest"] for result in compared if result["largest"] is not None]
        assert largest and max(largest) <= limit, largest
        assert compared[0]["ids"] != compared[1]["ids"], "other weights, other samples"
        assert compared[0]["ids"] == compared[2]["ids"], "the training layout does not change what is sampled"
        assert [result["versions"] for result in compared] == [{0}, {1}, {2}, {3}]
        assert again["ids"] == compared[3]["ids"][::-1][:20], "a request's seed alone decides its sample"
        assert greedy["ids"][0] == greedy["ids"][1]
        for ids, finish in zip(compared[0]["ids"], compared[0]["finish"], strict=True):
            ends = "any of the end tokens ends a response and is part of it"
            assert (ids[-1] in ENDS) == (finish == "stop") and not set(ENDS) & set(ids[:-1]), ends
        assert {ids[-1] for ids in compared[0]["ids"]} >= set(ENDS)
    assert ranks[0][0]["ids"] == ranks[1][0]["ids"]
