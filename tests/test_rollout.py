"""The rollout engines against the policy: log-probs agree after a sync of different weights, at every layout."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ranks import run_ranks

ENGINES = ["vllm", "transformers"]


def agreement(engine_name: str, tied: bool, folder: str) -> list[dict]:
    """For TP 1 and TP 2 and two sets of weights: sync, sample, and compare each token's log-prob with the policy's."""
    import dataclasses
    from pathlib import Path

    from megatron.core import parallel_state as mpu

    from megatron_dypo.batching.micro_batch import MicroBatch
    from megatron_dypo.convert.stream import random_weights
    from megatron_dypo.policy.policy import Policy
    from megatron_dypo.policy.shape import PRESETS
    from megatron_dypo.records import Kind, Sequence
    from megatron_dypo.rollout.engine import Request, Sampling, build_engine
    from megatron_dypo.runtime import distributed
    from megatron_dypo.sync.sync import sync_weights
    from tests.batches import make_config

    config = make_config(rollout={"engine": engine_name})
    shape = dataclasses.replace(PRESETS["tiny"], tied_embeddings=tied, family="qwen2" if tied else "llama")
    random = np.random.default_rng(0)
    lengths = [
        200,
        *random.integers(2, 12, 11),
    ]  # the first fills blocks of vLLM's prefix cache, which syncs must clear
    prompts = [random.integers(3, 104, length).astype(np.int32) for length in lengths]
    requests = [Request(prompt, 100 * q + i) for q, prompt in enumerate(prompts) for i in range(4)]
    sampling = Sampling(temperature=0.8, top_p=1.0, max_tokens=24, eos_id=1)
    layout = distributed.init()
    engine = build_engine(config, shape, 1, Path(folder) / f"rank_{layout.rank}")
    found = []
    for tensor in (1, 2):
        config.parallel.tensor = tensor
        mpu.destroy_model_parallel()
        mpu.initialize_model_parallel(tensor_model_parallel_size=tensor)
        layout = dataclasses.replace(layout, tp=tensor, dp=2 // tensor)
        layout = dataclasses.replace(layout, tp_rank=layout.rank % tensor, dp_rank=layout.rank // tensor)
        for seed in (1, 2):
            policy = Policy(config, shape, layout, random_weights(shape, seed))
            sync_weights(policy, engine, 60)
            responses = engine.generate(requests, sampling)
            sequences = [
                Sequence(np.concatenate([r.prompt_ids, a.ids]), len(r.prompt_ids), Kind.ROLLOUT, 0, i)
                for i, (r, a) in enumerate(zip(requests, responses, strict=True))
            ]
            batch = MicroBatch.pack(sequences, list(range(len(sequences))), 0.8, tensor=tensor)
            ours = policy.logprobs([batch])[0].numpy()
            theirs = np.concatenate([response.logprobs for response in responses])
            found.append(
                {
                    "largest": float(np.abs(ours - theirs).max()),
                    "ids": [response.ids.tolist() for response in responses],
                    "finish": [response.finish_reason for response in responses],
                    "tokens": len(theirs),
                }
            )
    # the same requests again, in another order and company: seeds alone decide
    again = engine.generate(requests[::-1][:20], sampling)
    found.append({"ids": [response.ids.tolist() for response in again]})
    greedy = engine.generate([Request(prompts[0], None)] * 2, sampling)
    found.append({"ids": [response.ids.tolist() for response in greedy]})
    return found


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("engine", ENGINES)
def test_engine_logprobs_agree_after_a_sync_of_different_weights(engine, tied, tmp_path):
    ranks = run_ranks(2, agreement, engine, tied, str(tmp_path), seconds=240)
    for found in ranks:
        compared, again, greedy = found[:4], found[4], found[5]
        assert all(result["largest"] < 1e-4 for result in compared), [result["largest"] for result in compared]
        assert compared[0]["ids"] != compared[1]["ids"], "other weights, other samples"
        assert compared[0]["ids"] == compared[2]["ids"], "the training layout does not change what is sampled"
        assert again["ids"] == compared[3]["ids"][::-1][:20], "a request's seed alone decides its sample"
        assert greedy["ids"][0] == greedy["ids"][1]
        for ids, finish in zip(compared[0]["ids"], compared[0]["finish"], strict=True):
            assert (ids[-1] == 1) == (finish == "stop") and 1 not in ids[:-1], (
                "the end token ends a response and is part of it"
            )
    assert ranks[0][0]["ids"] == ranks[1][0]["ids"]


def test_samples_differ_between_seeds(tmp_path):
    """Eight samples of one prompt under hashed seeds are not copies of each other."""
    distinct = run_ranks(1, sample_one_prompt, str(tmp_path))[0]
    assert distinct > 6


def sample_one_prompt(folder: str) -> int:
    from pathlib import Path

    from megatron_dypo.policy.shape import PRESETS
    from megatron_dypo.records import Group, Prompt
    from megatron_dypo.rollout.collect import sample
    from megatron_dypo.rollout.engine import build_engine
    from megatron_dypo.runtime import distributed
    from tests.batches import make_config

    layout = distributed.init()
    config = make_config(rollout={"engine": "transformers"})
    config.rollout.samples_per_prompt = 8
    engine = build_engine(config, PRESETS["tiny"], 1, Path(folder))
    groups = sample([Group(Prompt("p", "1", ()), np.arange(3, 9, dtype=np.int32))], engine, config, 1, 1, layout)
    return len({tuple(response.ids.tolist()) for response in groups[0].responses})
