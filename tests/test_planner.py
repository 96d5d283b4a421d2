"""The planner: counted bytes on real ranks, published step times, layouts that fit, and true reasons."""

from __future__ import annotations

import dataclasses
import itertools
import re
import shlex
import subprocess
from collections.abc import Callable

import pytest

from megatron_dypo.cli import main
from megatron_dypo.config import load_config
from megatron_dypo.config.schema import Parallel
from megatron_dypo.errors import UserError
from megatron_dypo.models.limits import check_layout
from megatron_dypo.models.shape import PRESETS, ModelShape
from megatron_dypo.objectives.recipes import RECIPES
from megatron_dypo.planner.cluster import RELEASED, Candidate, Cluster, StepWorkload, gpu, planned_shape
from megatron_dypo.planner.launch import commands, nodes_of
from megatron_dypo.planner.memory import GIB, UNEVEN, activation_bytes, host_need, policy_need, rank_parameters
from megatron_dypo.planner.placement import place_reference, require_room
from megatron_dypo.planner.search import plan
from megatron_dypo.planner.steptime import step_seconds
from megatron_dypo.planner.sync import syncs
from megatron_dypo.runtime.distributed import Layout
from tests.batches import make_config
from tests.ranks import run_ranks

SHAPE = dataclasses.replace(
    PRESETS["tiny"], family="qwen3", num_layers=8, num_query_groups=2, vocab_size=5000, max_position=1024
)
WORK = StepWorkload(
    prompts=64, samples=8, prompt_tokens=200, response_tokens=1000, longest=4096, teacher_tokens=1000, budget=8192,
    mid=0.5, hard=0.25,
)  # fmt: skip
PLACED = {"virtual": 1, "context": 1, "recompute": "none", "placement": "beside"}
LAYOUTS = [  # (layout, ranks, distributed optimizer, tied embedding)
    ({}, 1, False, True),
    ({"tensor": 2, "sequence_parallel": True}, 2, False, False),
    ({"pipeline": 2}, 4, True, True),
    ({"pipeline": 2, "virtual_pipeline": 2}, 2, False, False),
    ({"tensor": 2, "sequence_parallel": True, "pipeline": 2}, 4, True, False),
    ({"tensor": 2, "sequence_parallel": True, "context": 2}, 4, True, True),
]
MIXTURE = dataclasses.replace(
    SHAPE, family="qwen2_moe", num_layers=4, ffn_hidden_size=96, num_experts=8, router_topk=2,
    shared_expert_ffn_hidden_size=64,
)  # fmt: skip
EXPERT_LAYOUTS = [  # (layout, ranks): in each of them experts and the rest are sharded over different numbers of ranks
    ({"expert": 2}, 4),
    ({"expert": 2, "pipeline": 2}, 4),
    ({"expert": 2, "expert_tensor": 2, "tensor": 2, "sequence_parallel": True}, 4),
]


def counted(shape: ModelShape, parallel: dict, distributed: bool, method: str = "dypo") -> tuple[int, int, int, int]:
    """Return bytes of this rank's weights, gradients and optimizer state, and its parameters, of all models trained.

    For a forked rank.
    """
    from megatron_dypo.models.sharding import random_weights
    from megatron_dypo.policy.optimizer import adam_parts
    from megatron_dypo.policy.policy import Policy
    from megatron_dypo.runtime import distributed as runtime
    from megatron_dypo.training.sides import build_side
    from tests.batches import make_config

    sections = {"optimizer": {"distributed": distributed}, "model": {"dtype": "bf16"}, "objective": {"method": method}}
    config = make_config(parallel=parallel, **sections)
    layout, read = runtime.init(config.parallel), random_weights(shape, 0)
    policy, side = Policy(config, shape, layout, read), build_side(config, shape, layout, read)
    totals = [0, 0, 0, 0]
    for model in (policy, side.policy) if side else (policy,):
        model.zero_gradients()
        model.step(1e-3)  # Adam makes its moments at the first update
        parts = adam_parts(model.optimizer, model.parameters).values()
        buffers = [b for chunk in model.chunks for b in chunk.buffers + chunk.expert_parallel_buffers]
        totals[0] += sum(p.nbytes for p in model.parameters.values())
        totals[1] += sum(buffer.grad_data.nbytes for buffer in buffers)
        totals[2] += sum(part.flat(name).nbytes for part in parts for name in part.names)
        totals[3] += sum(p.numel() for p in model.parameters.values())
    return tuple(totals)


@pytest.mark.parametrize(("parallel", "ranks", "distributed", "tied"), LAYOUTS, ids=[str(each[0]) for each in LAYOUTS])
def test_weights_gradients_and_optimizer_are_what_ranks_hold(parallel, ranks, distributed, tied):
    """Compare with the busiest of real ranks, in bf16 as in the planner: weights exactly, the padded rest within 5%."""
    shape = dataclasses.replace(SHAPE, tied_embeddings=tied)
    compare(shape, parallel, ranks, distributed)


@pytest.mark.parametrize(("parallel", "ranks"), EXPERT_LAYOUTS, ids=[str(each[0]) for each in EXPERT_LAYOUTS])
def test_experts_are_what_ranks_hold(parallel, ranks):
    compare(MIXTURE, parallel, ranks, distributed=True)


@pytest.mark.parametrize(
    ("method", "parallel"), [("ppo", {"pipeline": 2}), ("ppo", {"tensor": 2, "sequence_parallel": True}), ("prime", {})]
)
def test_a_second_model_is_counted_and_a_critic_s_head_is_one_row(method, parallel):
    compare(SHAPE, parallel, 2, distributed=True, method=method)


def test_two_models_that_a_gpu_cannot_hold_are_refused_with_the_plan_s_figure():
    shape = dataclasses.replace(SHAPE, num_layers=64, hidden_size=2048, ffn_hidden_size=8192)
    configs = {
        method: make_config(model={"dtype": "bf16"}, objective={"method": method, "teachers_per_prompt": 1})
        for method in ("ppo", "prime", "grpo")
    }
    work = dataclasses.replace(WORK, side="critic")
    static = policy_need(shape, Candidate(tensor=1, pipeline=1, data=1, **PLACED), work).static
    for memory in (None, static + 1):
        require_room(configs["ppo"], shape, Layout(), memory)
    require_room(configs["grpo"], shape, Layout(), 1)
    figure = f"of both are {static / GIB:.0f} GiB a rank at this layout, and a GPU has {(static - 1) / GIB:.0f}"
    with pytest.raises(UserError, match=f"^objective.method: ppo trains a second model: .*{figure}: cut them"):
        require_room(configs["ppo"], shape, Layout(), static - 1)
    with pytest.raises(UserError, match=r"^objective.method: prime trains a second model"):
        require_room(configs["prime"], shape, Layout(), static + 1)  # whose head is whole


HOST_CASES = [  # (model, sections, ranks)
    ("llama-tied", {"model": {"dtype": "bf16"}}, 1),
    ("llama", {"model": {"dtype": "bf16"}, "optimizer": {"distributed": True}}, 2),
    ("qwen3", {"parallel": {"tensor": 2, "sequence_parallel": True}}, 2),
    ("qwen3_moe", {"model": {"dtype": "bf16"}, "optimizer": {"distributed": True}, "parallel": {"expert": 2}}, 2),
]
NO_REFERENCE = {"method": "grpo", "kl_coef": 0.0}


def held_on_the_host(model: str, sections: dict) -> list[dict]:
    """Return this rank's bytes in each combination: allocated, and planned for reference, trainer.offload, a save."""
    from megatron_dypo.checkpoint.state import exchange_holders, snapshot
    from megatron_dypo.models.shape import model_shape
    from megatron_dypo.models.sharding import random_weights
    from megatron_dypo.planner.placement import candidate_of
    from megatron_dypo.planner.show_plan import work_of
    from megatron_dypo.policy import host_memory
    from megatron_dypo.policy.policy import Policy
    from megatron_dypo.runtime import distributed as runtime

    host_memory.CHUNK = 4096  # of pinned memory
    layout, found = None, []
    for on in ("none", "previous", "device", "host"):
        objective = {"none": NO_REFERENCE, "previous": {"reference": "previous"}}.get(on, {})
        config = make_config(model, **sections, objective=objective)
        config.model.reference_on = on if on in ("device", "host") else "auto"
        config.trainer.save_every = 1
        layout = layout or runtime.init(config.parallel)
        shape = model_shape(config.model)
        policy = Policy(config, shape, layout, random_weights(shape, 0))
        policy.zero_gradients()
        policy.step(1e-3)
        before = policy.offload.host_bytes
        with policy.offload.on_host():
            pass
        allocated = {
            "reference": getattr(policy.reference, "host_bytes", 0),
            "offload": policy.offload.host_bytes,
            "snapshot": sum(tensor.nbytes for _, tensor in snapshot(policy, exchange_holders(policy))),
        }
        assert before == 0
        kept = on if on in ("device", "host") else "none"
        candidate = dataclasses.replace(candidate_of(config, layout), reference=kept, placement="turns")
        dtype = "fp32" if config.model.dtype == "auto" else config.model.dtype
        planned = host_need(shape, candidate, work_of(config, None, None, 0.5, 0.25), dtype)
        beside = host_need(shape, dataclasses.replace(candidate, placement="beside"), WORK, dtype)
        assert (beside.reference, beside.offload, beside.snapshot) == (planned.reference, 0, 0)
        found.append({"on": on, "allocated": allocated, "planned": dataclasses.asdict(planned)})
    return found


@pytest.mark.parametrize(("model", "sections", "ranks"), HOST_CASES, ids=str)
def test_host_memory_of_reference_offload_and_saving_is_what_is_allocated(model, sections, ranks):
    """Exactly for the reference; within mcore's padding and step counts for offload. A save covers all ranks."""
    everyone = run_ranks(ranks, held_on_the_host, model, sections)
    for at_once in zip(*everyone, strict=True):
        for found in at_once:
            allocated, planned = found["allocated"], found["planned"]
            assert allocated["reference"] == planned["reference"], found["on"]
            assert (planned["reference"] > 0) == (found["on"] == "host")
            assert allocated["offload"] == pytest.approx(planned["offload"], rel=0.05), found["on"]
        sums = [sum(found[which]["snapshot"] for found in at_once) for which in ("allocated", "planned")]
        assert sums[0] == pytest.approx(sums[1], rel=0.01), at_once[0]["on"]
    offload = {found["on"]: found["planned"]["offload"] for found in everyone[0]}
    assert offload["none"] == offload["previous"] == offload["host"] < offload["device"]


def placed(memory_gib: float | None, engine_gib: float = 0.0, offload: bool = False, **model) -> tuple[str, str]:
    """Return where a small policy's reference is placed on a GPU of this size."""
    config = make_config(model={"dtype": "bf16"} | model)
    config.trainer.offload = offload
    memory = None if memory_gib is None else round(memory_gib * GIB)
    shape = dataclasses.replace(SHAPE, num_layers=64, hidden_size=2048, ffn_hidden_size=8192)
    return place_reference(config, shape, Layout(), memory, engine_gib * GIB)


def test_a_reference_is_on_the_device_exactly_where_it_fits_beside_peak_and_engine():
    where, said = placed(200)
    assert where == "device" and "on the device, because it fits" in said and "of 200" in said
    need = policy_need(
        dataclasses.replace(SHAPE, num_layers=64, hidden_size=2048, ffn_hidden_size=8192),
        Candidate(tensor=1, pipeline=1, data=1, **PLACED | {"placement": "turns"}, reference="device"),
        dataclasses.replace(WORK, budget=200, longest=1024 + 40),
    )
    assert need.reference == need.weights > 5 * GIB
    edge = need.policy / GIB
    assert placed(edge + 0.01)[0] == "device" and placed(edge - 0.01)[0] == "host"
    assert placed(edge + 30.01, engine_gib=30)[0] == "device" and placed(edge + 29.99, engine_gib=30)[0] == "host"
    assert (
        placed(200, offload=True)[0] == "host"
        and placed(None)[0] == "device"
        and placed(None, offload=True)[0] == "host"
    )
    for on in ("device", "host"):
        where, said = placed(1, offload=True, reference_on=on)
        assert where == on and "as model.reference_on says" in said


def test_a_plan_puts_the_reference_where_steps_are_fastest_and_counts_it_there():
    shape, cluster = RELEASED["Qwen/Qwen2.5-7B"], Cluster(8, 141 * GIB, gpu("h200"))
    work = dataclasses.replace(WORK, passes=2, reference="auto", saves=True)
    best = plan(shape, cluster, work)[0]
    assert "device" in {made.candidate.reference for made in best if made.candidate.placement == "beside"}
    for made in best:
        on_device = made.candidate.reference == "device"
        assert made.need.reference == (made.need.weights if on_device else 0)
        assert (made.host.reference > 0) != on_device and made.host.snapshot > 0
        assert made.candidate.keys(0.5)["model.reference_on"] == made.candidate.reference
    forced = plan(shape, cluster, dataclasses.replace(work, reference="host"))[0]
    assert {made.candidate.reference for made in forced} == {"host"}
    none = plan(shape, cluster, dataclasses.replace(WORK, saves=False))[0]
    assert all(made.host.reference == made.host.snapshot == 0 for made in none)


def compare(shape: ModelShape, parallel: dict, ranks: int, distributed: bool, method: str = "dypo") -> None:
    """Assert that the plan equals what ranks count."""
    everyone = run_ranks(ranks, counted, shape, parallel, distributed, method)
    found = [max(column) for column in zip(*everyone, strict=True)]
    cut = {name: parallel.get(name, 1) for name in ("tensor", "pipeline", "context", "expert", "expert_tensor")}
    cut["virtual"] = parallel.get("virtual_pipeline", 1)
    replica = cut["tensor"] * cut["pipeline"] * cut["context"]
    candidate = Candidate(**PLACED | cut, data=ranks // replica if distributed else 1)
    if not distributed:
        candidate = dataclasses.replace(candidate, context=1)
    side = RECIPES[method].side
    need = policy_need(shape, candidate, dataclasses.replace(WORK, side=side))
    if side is None:
        assert found[3] == rank_parameters(shape, cut["tensor"], cut["pipeline"], cut["expert"], cut["expert_tensor"])
    # a policy's last stage has its head, and a critic's first one the embedding: no rank has the most of both
    assert found[0] == (need.weights if side != "critic" else pytest.approx(need.weights, rel=1e-3))
    assert found[1] == pytest.approx(need.gradients, rel=0.05)
    assert found[2] == pytest.approx(need.optimizer, rel=0.05)


def test_activations_are_the_documented_bytes():
    """docs/memory.md's count for one token and layer, and the effect of sequence parallelism and pipelines."""
    shape = RELEASED["Qwen/Qwen2.5-7B"]
    candidate = Candidate(tensor=1, pipeline=1, data=8, **PLACED)
    of = {
        recompute: activation_bytes(shape, dataclasses.replace(candidate, recompute=recompute), 16384) / 1e9
        for recompute in ("none", "selective", "full")
    }
    assert of == {"none": pytest.approx(76.6, abs=0.1), "selective": pytest.approx(26.3, abs=0.1)} | {
        "full": pytest.approx(5.9, abs=0.1)
    }
    half = activation_bytes(shape, dataclasses.replace(candidate, tensor=2), 16384) / 1e9
    assert half == pytest.approx(of["none"] / 2)
    interleaved = dataclasses.replace(candidate, pipeline=2, virtual=2)
    assert activation_bytes(shape, interleaved, 16384) / 1e9 == pytest.approx(of["none"] * 1.25)


def bytes_saved(policy, forward: Callable[[], object]) -> int:
    """Return the bytes that ``forward`` keeps for its backward pass, per storage, without weights."""
    import torch

    storages = {parameter.untyped_storage().data_ptr(): None for parameter in policy.parameters.values()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storages.setdefault(tensor.untyped_storage().data_ptr(), tensor)  # held, so that no other gets its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values() if tensor is not None)


def saved_by_a_layer(shape: ModelShape, tokens: int) -> float:
    """Return bytes per token, as in bf16, that a layer keeps with an attention that keeps what torch's flash one does.

    In fp32: CPUs' norms in bf16 keep fp32 copies.
    """
    import numpy as np
    import torch

    from megatron_dypo.models.sharding import random_weights
    from megatron_dypo.policy import attention
    from megatron_dypo.policy.micro_batch import MicroBatch
    from megatron_dypo.policy.policy import Policy
    from megatron_dypo.records import Kind, Sequence
    from megatron_dypo.runtime import distributed as runtime
    from tests.batches import make_config

    class Flash(torch.autograd.Function):
        @staticmethod
        def forward(ctx, query, key, value):
            out = torch.zeros_like(query)
            ctx.save_for_backward(query, key, value, out)
            return out

    attention.BACKENDS["sdpa"] = lambda query, key, value, *_: Flash.apply(query, key, value).flatten(1)
    config = make_config()
    policy = Policy(config, shape, runtime.init(config.parallel), random_weights(shape, 0))
    sequence = Sequence(np.zeros(tokens, np.int32), 1, Kind.ROLLOUT, 0, 0)
    batch = MicroBatch.pack([sequence], [0], 1.0, **policy.layout.packing)
    packed = policy._packed_params(batch, batch.positions_T)
    hidden = torch.randn(tokens, 1, shape.hidden_size, requires_grad=True)
    layer = policy.chunks[0].module.decoder.layers[0]
    return bytes_saved(policy, lambda: layer(hidden, attention_mask=None, packed_seq_params=packed)) / 2 / tokens


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_a_dense_layer_keeps_the_documented_bytes(family):
    """Leave out what only the CPU keeps: inputs of unfused norms and SwiGLU, and RoPE's tables."""
    hidden, ffn, heads, groups, width, tokens = 256, 512, 8, 2, 64, 128
    shape = dataclasses.replace(
        RELEASED["Qwen/Qwen2.5-7B"], family=family, num_layers=1, hidden_size=hidden, ffn_hidden_size=ffn,
        num_attention_heads=heads, num_query_groups=groups, head_dim=width, vocab_size=256,
    )  # fmt: skip
    [found] = run_ranks(1, saved_by_a_layer, shape, tokens)
    found -= 4 * hidden + 4 * ffn + 4 * width + (2 * (heads + groups) * width if family == "qwen3" else 0)
    alone = dataclasses.replace(Candidate(tensor=1, pipeline=1, data=8, **PLACED), recompute="none")
    assert found == pytest.approx(activation_bytes(shape, alone, tokens) / tokens, rel=0.005)


def saved_by_a_mixture(shape: ModelShape, tokens: int) -> float:
    """Return the bytes per token that a mixture keeps in bf16 for its backward pass; for a forked rank."""
    import torch

    from megatron_dypo.models.sharding import random_weights
    from megatron_dypo.policy.moe import Routing
    from megatron_dypo.policy.policy import Policy
    from megatron_dypo.runtime import distributed as runtime
    from tests.batches import make_config

    config = make_config(model={"dtype": "bf16"})
    policy = Policy(config, shape, runtime.init(config.parallel), random_weights(shape, 0))
    mixture = policy.chunks[0].module.decoder.layers[0].mlp
    mixture.batch = Routing(torch.ones(tokens, dtype=torch.bool))
    hidden = torch.randn(tokens, 1, shape.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    return bytes_saved(policy, lambda: mixture(hidden)) / tokens


def test_a_mixture_keeps_the_documented_bytes():
    """Leave out what only the CPU keeps, where SwiGLU is not fused (6FK), and the router's fp32 weights (4hE, once)."""
    hidden, ffn, experts, each, tokens = 256, 128, 16, 4, 64
    shape = dataclasses.replace(
        MIXTURE, family="qwen3_moe", shared_expert_ffn_hidden_size=0, num_layers=1, hidden_size=hidden,
        ffn_hidden_size=ffn, num_experts=experts, router_topk=each,
    )  # fmt: skip
    [found] = run_ranks(1, saved_by_a_mixture, shape, tokens)
    found -= 6 * ffn * each + 4 * hidden * experts / tokens
    assert found == pytest.approx(4 * hidden + 9 * experts + each * (2 * hidden + 6 * ffn), rel=0.02)
    candidate = Candidate(tensor=1, pipeline=1, data=8, **PLACED)
    counted = [
        activation_bytes(dataclasses.replace(shape, router_topk=k), candidate, tokens) / tokens for k in (0, each)
    ]
    assert counted[1] - counted[0] == UNEVEN * each * (2 * hidden + 6 * ffn + 3 * 2 * hidden)
    again = activation_bytes(shape, dataclasses.replace(candidate, recompute="selective"), tokens) / tokens
    assert again == counted[1]  # of one layer, which exists once either way


@pytest.mark.parametrize(
    ("model", "total", "active"), [("Qwen/Qwen3-30B-A3B", 30.5, 3.3), ("Qwen/Qwen3-235B-A22B", 235, 22)]
)
def test_a_mixture_s_parameters_are_as_its_makers_count_them(model, total, active):
    shape = RELEASED[model]
    assert shape.parameters / 1e9 == pytest.approx(total, rel=0.002)
    assert shape.active_parameters / 1e9 == pytest.approx(active, rel=0.02)
    # both padded the vocabulary
    assert rank_parameters(shape, 1, 1) == pytest.approx(shape.parameters, rel=1e-3)


def test_experts_within_a_node_and_few_sequences_are_faster():
    """Dispatch to experts is as slow as its slowest link; a few sequences read a few experts."""
    shape, cluster = RELEASED["Qwen/Qwen3-30B-A3B"], Cluster(16, 80 * GIB, gpu("h100"))

    def seconds(expert: int, sequences: int):
        work = dataclasses.replace(WORK, prompts=sequences, samples=1)
        candidate = Candidate(tensor=1, pipeline=1, data=16, expert=expert, **PLACED)
        need = dataclasses.replace(policy_need(shape, candidate, work), engine=70 * GIB)
        return step_seconds(shape, candidate, cluster, work, need)

    assert seconds(1, 512).logprob < seconds(8, 512).logprob < 0.5 * seconds(16, 512).logprob
    one, many = (seconds(8, sequences).rollout / WORK.longest for sequences in (16, 16 * 64))
    assert 0.004 < one < 0.004 + 2 * 2 * shape.active_parameters / cluster.gpu.memory
    assert many > 0.004 + 2 * shape.parameters / cluster.gpu.memory / 4


# NVIDIA NeMo-RL's performance summary (0.4; mixtures 0.6): GRPO on DGX H100, bf16, 64 prompts x 32 responses of at most
# 4,096 tokens, 4 updates per rollout (235B: 16 x 32 of 8,192, 1 update), colocated or one step off-policy: model, GPUs,
# mean tokens of a sequence, seconds of a step, layout.
PUBLISHED = {
    "Llama 8B": ("meta-llama/Llama-3.1-8B", 16, 1060, 97.7, {"pipeline": 2, "data": 8}),
    "Llama 8B, one step off": (
        "meta-llama/Llama-3.1-8B", 16, 1129, 74.6, {"pipeline": 2, "data": 4, "server_gpus": 8},
    ),
    "Qwen3 32B": ("Qwen/Qwen3-32B", 32, 3206, 393, {"tensor": 4, "pipeline": 4, "data": 2, "engine_tensor": 4}),
    "Qwen3 32B, one step off": (
        "Qwen/Qwen3-32B", 64, 3207, 215,
        {"tensor": 4, "pipeline": 4, "data": 2, "engine_tensor": 4, "server_gpus": 32},
    ),
    "Qwen3 30B-A3B": ("Qwen/Qwen3-30B-A3B", 32, 3203, 192, {"expert": 8, "data": 32, "engine_tensor": 2}),
    "Qwen3 30B-A3B, one step off": (
        "Qwen/Qwen3-30B-A3B", 32, 3201, 152,
        {"pipeline": 2, "expert": 8, "data": 8, "engine_tensor": 2, "server_gpus": 16},
    ),
    "Qwen3 235B-A22B, one step off": (
        "Qwen/Qwen3-235B-A22B", 256, 5721, 231,
        {"tensor": 4, "expert": 16, "pipeline": 8, "data": 4, "recompute": "full", "engine_tensor": 8,
         "server_gpus": 128},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_step_times_are_met_within_30_percent(name):
    model, gpus, length, seconds, layout = PUBLISHED[name]
    shape, cluster, off_policy = RELEASED[model], Cluster(gpus, 80 * GIB, gpu("h100")), "server_gpus" in layout
    prompts, longest, updates = (16, 8192, 1) if "235B" in name else (64, 4096, 4)
    work = StepWorkload(
        prompts, 32, 150, length - 150, longest, 0, 8192, mid=1.0, hard=0.0, passes=2, updates=updates,
        overlap=off_policy,
    )  # fmt: skip
    placed = PLACED | {"tensor": 1, "pipeline": 1, "placement": "servers" if off_policy else "turns"}
    candidate = Candidate(**placed | layout)
    share = 0.8 if "235B" in name else 0.6
    need = dataclasses.replace(policy_need(shape, candidate, work), engine=share * cluster.memory)
    ratio = step_seconds(shape, candidate, cluster, work, need).step / seconds
    assert 0.7 < ratio < 1.3, f"{name}: {ratio:.2f}"


# Weight syncs on H100 in bf16 that other systems publish: model, GPUs, cut, seconds, and whether ours are within 30%.
# NeMo-RL: docs/design-docs/nccl-reshard-refit.md (0.21 to 0.34 s). miles: lmsys.org/blog/2026-04-29-p2p-update, the
# NCCL broadcast, of layouts that it does not give.
SYNCS = {
    "4B, NeMo-RL": ("Qwen/Qwen3-4B-Base", 16, {"data": 8, "server_gpus": 8}, 0.275, True),
    "30B-A3B, miles": (
        "Qwen/Qwen3-30B-A3B", 16, {"expert": 8, "data": 8, "server_gpus": 8, "engine_tensor": 8}, 2.67, False,
    ),
    "235B-A22B, miles": (
        "Qwen/Qwen3-235B-A22B", 128,
        {"tensor": 4, "pipeline": 2, "expert": 32, "data": 8, "server_gpus": 64, "engine_tensor": 8}, 10.75, True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SYNCS)
def test_published_weight_syncs_are_met_within_30_percent_or_lie_between_the_slowest_term_and_the_sum(name):
    """For the second, docs/scaling.md gives the reason."""
    model, gpus, cut, seconds, met = SYNCS[name]
    candidate = Candidate(**PLACED | {"tensor": 1, "pipeline": 1, "placement": "servers"} | cut)
    sync = syncs(RELEASED[model], candidate, Cluster(gpus, 80 * GIB, gpu("h100")))["nccl"]
    ratio = sync.total / seconds
    assert (0.7 < ratio < 1.3) == met, f"{name}: {ratio:.2f}, {sync}"
    assert met or ratio < 1 < (sync.gather + sync.send + sync.load) / seconds


def test_a_gather_over_nodes_uses_the_network_of_all_its_gpus():
    shape, cluster = RELEASED["Qwen/Qwen3-235B-A22B"], Cluster(128, 80 * GIB, gpu("h100"))
    placed = PLACED | {"tensor": 4, "pipeline": 1, "placement": "servers", "server_gpus": 64, "data": 16}

    def gather(cluster: Cluster = cluster, **cut: int) -> float:
        return syncs(shape, Candidate(**placed | cut), cluster)["nccl"].gather

    assert gather(expert=8) < gather(expert=32) < 1.5 * gather(expert=8)
    slower = dataclasses.replace(cluster, gpu=dataclasses.replace(cluster.gpu, network=5e9))
    assert gather(slower, expert=32) > 5 * gather(expert=32) and gather(slower, expert=8) == gather(expert=8)
    stages = gather(pipeline=2, data=8, expert=8) - gather(expert=8)
    assert 0 < stages < 2 * shape.parameters / 2 / 4 / cluster.gpu.network


def test_every_way_of_a_sync_is_planned_and_its_slowest_term_counts():
    shape, cluster = RELEASED["Qwen/Qwen3-30B-A3B"], Cluster(16, 80 * GIB, gpu("h100"))
    placed = PLACED | {"tensor": 1, "pipeline": 1, "placement": "servers", "server_gpus": 8, "data": 8, "expert": 8}
    ways = syncs(shape, Candidate(**placed, engine_tensor=8), cluster)
    assert list(ways) == ["in process", "nccl", "sparse_nccl", "ipc", "shared_memory"]
    for sync in ways.values():
        slowest = max(sync.gather, sync.send, sync.load)
        assert slowest <= sync.total <= sync.gather + sync.send + sync.load
        assert sync.streams == (sync.total == slowest) or sync.way == "in process"
    here = dataclasses.replace(cluster, gpus=8)
    assert syncs(shape, Candidate(**placed), here)["nccl"].send < ways["nccl"].send / 5, "within a node"
    work = dataclasses.replace(WORK, overlap=True)
    need = dataclasses.replace(policy_need(shape, Candidate(**placed), work), engine=70 * GIB)
    assert step_seconds(shape, Candidate(**placed), cluster, work, need).sync == ways["nccl"].total


@pytest.mark.parametrize(
    ("model", "gpus"), [("Qwen/Qwen2.5-Math-7B", 16), ("meta-llama/Llama-3.1-70B", 64), ("Qwen/Qwen3-30B-A3B", 16)]
)
def test_what_fits_stays_within_the_memory_and_the_model_can_be_cut_so(model, gpus):
    shape, cluster = RELEASED[model], Cluster(gpus, 80 * GIB, gpu("h100"))
    fits, rejected = plan(shape, cluster, WORK)
    assert fits and rejected
    for made in fits:
        c = made.candidate
        cut = {"tensor": c.tensor, "pipeline": c.pipeline, "virtual_pipeline": c.virtual, "context": c.context}
        cut |= {"expert": c.expert, "expert_tensor": c.expert_tensor, "sequence_parallel": c.tensor > 1}
        check_layout(Parallel(**cut), shape, c.ranks, model)
        assert c.ranks + c.server_gpus == gpus
        assert made.need.policy + (made.need.engine if c.placement == "beside" else 0) <= cluster.memory
        assert 0 < made.engine_memory <= 0.9 and made.seconds.step > 0
    fastest = min(made.seconds.step for made in fits)
    assert fits[0].seconds.step <= 1.03 * fastest
    names = {
        f"TP{c.tensor} PP{c.pipeline}"
        + "".join(
            f" {name}{size}"
            for name, size in (("CP", c.context), ("EP", c.expert), ("ETP", c.expert_tensor))
            if size > 1
        )
        for c in (made.candidate for made in fits)
    }
    assert not names & {each.layout for each in rejected}


def test_a_70b_model_is_rejected_where_it_cannot_fit_and_the_reason_names_the_bytes():
    _, rejected = plan(RELEASED["meta-llama/Llama-3.1-70B"], Cluster(64, 80 * GIB, gpu("h100")), WORK)
    reasons = {each.layout: each.reason for each in rejected}
    assert reasons["TP1 PP1"].startswith("policy ") and "weights, gradients, optimizer" in reasons["TP1 PP1"]
    fits, rejected = plan(RELEASED["meta-llama/Llama-3.1-70B"], Cluster(8, 80 * GIB, gpu("h100")), WORK)
    assert fits == [] and all("GiB" in each.reason for each in rejected)


def test_more_memory_or_a_faster_gpu_never_makes_it_slower():
    shape = RELEASED["Qwen/Qwen2.5-7B"]
    times = [
        plan(shape, Cluster(8, memory * GIB, gpu(name)), WORK)[0][0].seconds.step
        for name, memory in (("a100", 80), ("h100", 80), ("h200", 141))
    ]
    assert times[0] > times[1] > times[2]


def test_the_command_prints_a_table_the_best_overrides_and_reasons(capsys, tmp_path):
    config = "examples/qwen2.5_math_7b_dypo/config.yaml"
    assert main(["plan", config, "--gpus", "16", "--gpu-memory", "80", "--gpu", "a800"]) == 0
    printed = capsys.readouterr().out
    assert "7.62e9 parameters, 16 GPUs of 80 GiB" in printed and "tokens/s/GPU" in printed
    assert "best (16 trainer ranks): TP2 PP1 DP8, started by" in printed and " parallel.tensor=2 " in printed
    assert "TP8 PP1: parallel.tensor: 8 does not divide the model's 28 attention heads" in printed
    assert "its weight sync, by each way" in printed
    assert all(way in printed for way in ("in process", "nccl", "sparse_nccl", "ipc", "shared_memory", "gather s"))
    assert main(["plan", config, "--gpus", "1", "--gpu-memory", "24"]) == 1
    assert "nothing fits" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpu", "z80"], "--gpu: 'z80' is not known"),
        (["--mid", "0.9", "--hard", "0.9"], "--mid plus --hard: 1.8 is not between 0 and 1"),
        (["--response-tokens", "9000"], "--response-tokens: 9000 is not between 0 and 8192"),
        (["--gpus-per-node", "0"], "--gpus-per-node: 0 is out of range"),
    ],
)
def test_a_plan_for_nothing_is_refused_in_one_line(arguments, said, capsys):
    config = "examples/qwen2.5_math_7b_dypo/config.yaml"
    assert main(["plan", config, "--gpus", "16", "--gpu-memory", "80", *arguments]) == 2
    line = capsys.readouterr().err
    assert said in line and line.count("\n") == 1


def test_a_released_model_s_shape_cannot_be_overridden_but_for_its_positions():
    from megatron_dypo.config.schema import Model, Shape

    name = "Qwen/Qwen3-32B"
    assert planned_shape(Model(hf=name, shape=Shape(max_position=16384))).max_position == 16384
    with pytest.raises(UserError, match=r"model\.shape\.num_layers"):
        planned_shape(Model(hf=name, shape=Shape(num_layers=3)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("example", "gpus"),
    [("qwen2.5_math_7b_dypo", 32), ("qwen3_32b_dypo", 32), ("qwen3_30b_a3b_dypo", 8)],
)
def test_the_overrides_of_a_plan_make_that_layout_whatever_the_file_has(example, gpus):
    path, cluster = f"examples/{example}/config.yaml", Cluster(gpus, 192 * GIB, gpu("h200"))
    fits = plan(planned_shape(load_config(path).model), cluster, WORK)[0]
    assert {made.candidate.placement for made in fits} == {"beside", "turns", "servers"}
    for made in fits:
        c = made.candidate
        config = load_config(path, overrides_of(commands(c, cluster, made.engine_memory, path, [])))
        cut = config.parallel
        assert (cut.tensor, cut.pipeline, cut.virtual_pipeline, cut.context) == (
            c.tensor,
            c.pipeline,
            c.virtual,
            c.context,
        )
        assert (cut.expert, cut.expert_tensor) == (c.expert, c.expert_tensor)
        assert cut.sequence_parallel == (c.tensor > 1) and config.model.recompute == c.recompute
        assert config.optimizer.distributed == (c.shards > 1) and config.trainer.offload == (c.placement == "turns")
        assert (config.rollout.engine == "server") == (c.placement == "servers")
        assert len(config.rollout.servers) == (c.engines if c.placement == "servers" else 0)


def launches(lines: list[str]) -> list[list[str]]:
    """Return the words of the lines that start something, without a trailing ``&``."""
    words = [shlex.split(line) for line in lines]
    return [[word for word in each if word != "&"] for each in words if any("launch/" in word for word in each)]


def overrides_of(lines: list[str]) -> list[str]:
    """Return what follows the configuration; it is the same in all lines."""
    found = {tuple(each[[word.startswith("launch/") for word in each].index(True) + 2 :]) for each in launches(lines)}
    (overrides,) = found
    return list(overrides)


PLANNED = [  # (configuration, further arguments of `plan`, the best one's placement)
    ("qwen2.5_math_7b_dypo", "--gpus 16 --gpu-memory 80", "servers"),
    ("qwen2.5_math_7b_dypo", "--gpus 16 --gpu-memory 80 --gpu a800", "turns"),
    ("qwen2.5_math_7b_dypo", "--gpus 4 --gpu-memory 80 optimizer.lr=1e-6", "turns"),
    ("qwen2.5_math_7b_dypo", "--gpus 16 --gpu-memory 80 model.hf=Qwen/Qwen2.5-7B rollout.async_rollout=1", "servers"),
    ("qwen3_4b_base_dypo", "--gpus 8 --gpu-memory 141 --gpu h200", "turns"),
    ("quickstart", "--gpus 2 --gpu-memory 80 parallel.tensor=2", "beside"),
    ("llama3.1_70b_dypo", "--gpus 64 --gpu-memory 80 --response-tokens 3000", "servers"),
    ("qwen3_32b_dypo", "--gpus 32 --gpu-memory 80", "servers"),
    ("qwen3_32b_dypo", "--gpus 40 --gpu-memory 80 --gpus-per-node 4", "servers"),
    ("qwen3_30b_a3b_dypo", "--gpus 12 --gpu-memory 141", "servers"),
    ("qwen3_235b_a22b_dypo", "--gpus 128 --gpu-memory 80", "servers"),
]


@pytest.mark.parametrize(("example", "given", "placement"), PLANNED, ids=[f"{one[0]} {one[1]}" for one in PLANNED])
def test_what_a_plan_prints_is_what_plan_takes_and_gives_the_same_best_layout(example, given, placement, capsys):
    given, path = given.split(), f"examples/{example}/config.yaml"
    own = [word for word in given if "=" in word]
    options = [word for word in given if "=" not in word]
    assert main(["plan", path, *options, *own]) == 0
    first = best_lines(capsys.readouterr().out)
    overrides = overrides_of(first)
    assert set(own) - set(overrides) <= {"parallel.tensor=2", "rollout.engine=server"}
    assert ("servers" in first[0]) == (placement == "servers") and (
        ("trainer.offload=true" in overrides) == (placement == "turns")
    )
    assert main(["plan", path, *options, *overrides]) == 0
    again = best_lines(capsys.readouterr().out)
    assert sorted(again[0].split()) == sorted(first[0].split()) and sorted(overrides_of(again)) == sorted(overrides)


def best_lines(printed: str) -> list[str]:
    lines = printed.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("best ("))
    return list(itertools.takewhile(lambda line: not line.startswith("host memory per rank"), lines[start:]))


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["none", "auto"])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(
    ("model", "gpus", "memory"),
    [("Qwen/Qwen2.5-7B", 8, 141), ("Qwen/Qwen3-8B-Base", 24, 80), ("Qwen/Qwen3-30B-A3B", 16, 141)],
)
def test_the_best_layout_s_own_keys_leave_it_the_best(model, gpus, memory, overlap, reference):
    """``plan`` reads model.reference_on and rollout.async_rollout, and nothing else of its own output."""
    shape, cluster = RELEASED[model], Cluster(gpus, memory * GIB, gpu("h100"))
    for response in (300, 1000, 3000):
        work = dataclasses.replace(WORK, response_tokens=response, longest=9000, overlap=overlap, reference=reference)
        best = plan(shape, cluster, work)[0][0]
        c = best.candidate
        work = dataclasses.replace(work, reference=c.reference, overlap=overlap and c.placement == "servers")
        assert plan(shape, cluster, work)[0][0] == best


CLOSE = [  # (model, GPUs, GiB, kind, workload): layouts within 3% change with the keys given back
    ("Qwen/Qwen3-4B-Base", 6, 80, "a100", {"prompts": 256, "response_tokens": 6000, "budget": 8192}),
    (
        "Qwen/Qwen3-4B-Base",
        6,
        64,
        "b200",
        {"prompts": 16, "response_tokens": 100, "budget": 16384, "reference": "auto"},
    ),
    ("Qwen/Qwen3-4B-Base", 12, 141, "b200", {"prompts": 16, "response_tokens": 300, "budget": 8192}),
    ("Qwen/Qwen2.5-7B", 8, 96, "a100", {"response_tokens": 6000, "updates": 4, "budget": 16384, "reference": "auto"}),
]


@pytest.mark.parametrize(("model", "gpus", "memory", "kind", "more"), CLOSE)
def test_a_tie_is_decided_alike_when_the_best_one_s_keys_are_given_back(model, gpus, memory, kind, more):
    shape, cluster = RELEASED[model], Cluster(gpus, memory * GIB, gpu(kind))
    work = dataclasses.replace(WORK, longest=16000, overlap=True, passes=1 + ("reference" in more), **more)
    best = plan(shape, cluster, work)[0][0]
    again = {"reference": best.candidate.reference, "overlap": best.candidate.on_servers}
    assert plan(shape, cluster, dataclasses.replace(work, **again))[0][0] == best


@pytest.mark.parametrize(("gpus", "per_node"), [(8, 8), (12, 8), (12, 4), (18, 6), (16, 8), (7, 2)])
def test_ranks_and_servers_share_the_nodes_gpus_and_no_server_lies_over_two(gpus, per_node):
    cluster = Cluster(gpus, 192 * GIB, gpu("h200"), per_node)
    fits = plan(dataclasses.replace(SHAPE, num_attention_heads=8, num_query_groups=8), cluster, WORK)[0]
    for c in (made.candidate for made in fits):
        nodes = nodes_of(c, cluster)
        assert sum(node.ranks for node in nodes) == c.ranks
        assert sum(node.servers for node in nodes) == (c.engines if c.placement == "servers" else 0)
        for node in nodes:
            assert node.ranks + node.servers * c.engine_tensor == node.gpus <= per_node
    assert {made.candidate.placement for made in fits} == {"beside", "turns", "servers"}


def test_the_printed_lines_start_the_ranks_and_the_servers_that_they_name():
    cluster, path = Cluster(12, 80 * GIB, gpu("h100")), "examples/qwen3_32b_dypo/config.yaml"
    c = Candidate(tensor=2, pipeline=1, virtual=1, context=1, data=1, recompute="none", placement="servers",
                  server_gpus=10, engine_tensor=2)  # fmt: skip
    lines = commands(c, cluster, 0.9, path, ["trainer.steps=2", "trainer.offload=true"])
    started = []
    for line in lines:
        if "launch/" in line:
            line = re.sub(r"(launch/\w+\.sh)", r"\1 --dry-run", line.removesuffix(" &"))
            done = subprocess.run(["bash", "-euc", line], capture_output=True, text=True, check=True)
            started += [each for each in done.stdout.splitlines() if " megatron_dypo " in each]
    servers = [line for line in started if " serve " in line]
    (trainer,) = [line for line in started if " train " in line]
    ports = [int(re.search(r"--port (\d+)", line)[1]) for line in servers]
    assert ports == [8000, 8001, 8002, 8000, 8001]
    assert all("--tensor 2" in line and "--host 0.0.0.0" in line for line in servers)
    assert "--nproc-per-node 2" in trainer and "trainer.steps=2" in trainer and "trainer.offload=true" not in trainer
    assert servers[0].startswith("CUDA_VISIBLE_DEVICES=2,3 ") and servers[-1].startswith("CUDA_VISIBLE_DEVICES=2,3 ")
    hosts = load_config(path, overrides_of(lines)).rollout.servers
    assert hosts == [f"http://node{node}:800{i}" for node, count in ((0, 3), (1, 2)) for i in range(count)]
