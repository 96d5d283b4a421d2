"""The planner: counted bytes on real ranks, published step times, layouts that fit, and reasons that are true."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_dypo.cli import main
from megatron_dypo.config import load_config
from megatron_dypo.config.checks import check_layout
from megatron_dypo.config.schema import Parallel
from megatron_dypo.errors import UserError
from megatron_dypo.plan.cluster import Candidate, Cluster, Work
from megatron_dypo.plan.gpus import gpu
from megatron_dypo.plan.layouts import plan
from megatron_dypo.plan.memory import GIB, activation_bytes, policy_need, rank_parameters
from megatron_dypo.plan.released import RELEASED, planned_shape
from megatron_dypo.plan.steptime import step_seconds
from megatron_dypo.policy.shape import PRESETS, ModelShape
from tests.ranks import run_ranks

SHAPE = dataclasses.replace(
    PRESETS["tiny"], family="qwen3", num_layers=8, num_query_groups=2, vocab_size=5000, max_position=1024
)
WORK = Work(
    prompts=64, samples=8, prompt_tokens=200, response_tokens=1000, longest=4096, teacher_tokens=1000, budget=8192,
    mid=0.5, hard=0.25,
)  # fmt: skip
PLACED = {"virtual": 1, "context": 1, "recompute": "none", "placement": "beside"}
LAYOUTS = [  # (cut, ranks, distributed optimizer, tied embedding)
    ({}, 1, False, True),
    ({"tensor": 2, "sequence_parallel": True}, 2, False, False),
    ({"pipeline": 2}, 4, True, True),
    ({"pipeline": 2, "virtual_pipeline": 2}, 2, False, False),
    ({"tensor": 2, "sequence_parallel": True, "pipeline": 2}, 4, True, False),
    ({"tensor": 2, "sequence_parallel": True, "context": 2}, 4, True, True),
]


def counted(shape: ModelShape, parallel: dict, distributed: bool) -> tuple[int, int, int, int]:
    """Bytes of this rank's weights, gradients and optimizer state, and its parameters. To be run on a forked rank."""
    from megatron_dypo.convert.stream import random_weights
    from megatron_dypo.policy.adam_state import adam_parts
    from megatron_dypo.policy.policy import Policy
    from megatron_dypo.runtime import distributed as runtime
    from tests.batches import make_config

    config = make_config(parallel=parallel, optimizer={"distributed": distributed}, model={"dtype": "bf16"})
    policy = Policy(config, shape, runtime.init(config.parallel), random_weights(shape, 0))
    weights = sum(p.nbytes for p in policy.parameters.values())
    gradients = sum(buffer.grad_data.nbytes for chunk in policy.chunks for buffer in chunk.buffers)
    policy.zero_gradients()
    policy.step(1e-3)  # Adam makes its moments at the first update
    parts = adam_parts(policy.optimizer, policy.parameters).values()
    state = sum(part.flat(name).nbytes for part in parts for name in part.names)
    return weights, gradients, state, sum(p.numel() for p in policy.parameters.values())


@pytest.mark.parametrize(("parallel", "ranks", "distributed", "tied"), LAYOUTS, ids=[str(each[0]) for each in LAYOUTS])
def test_weights_gradients_and_optimizer_are_what_ranks_hold(parallel, ranks, distributed, tied):
    """The busiest of real ranks; in bf16, as the planner has it. Weights exactly, the padded rest within 5%."""
    shape = dataclasses.replace(SHAPE, tied_embeddings=tied)
    found = [max(column) for column in zip(*run_ranks(ranks, counted, shape, parallel, distributed), strict=True)]
    cut = {"tensor": parallel.get("tensor", 1), "pipeline": parallel.get("pipeline", 1)}
    cut |= {"virtual": parallel.get("virtual_pipeline", 1), "context": parallel.get("context", 1)}
    replica = cut["tensor"] * cut["pipeline"] * cut["context"]
    candidate = Candidate(**PLACED | cut, data=ranks // replica if distributed else 1)
    if not distributed:
        candidate = dataclasses.replace(candidate, context=1)
    need = policy_need(shape, candidate, WORK)
    assert found[3] == rank_parameters(shape, cut["tensor"], cut["pipeline"])
    assert found[0] == need.weights
    assert found[1] == pytest.approx(need.gradients, rel=0.05)
    assert found[2] == pytest.approx(need.optimizer, rel=0.05)


def test_activations_are_the_documented_bytes():
    """docs/memory.md's count for one token and layer, and what sequence parallelism and pipelines make of it."""
    shape = RELEASED["Qwen/Qwen2.5-7B"]
    candidate = Candidate(tensor=1, pipeline=1, data=8, **PLACED)
    of = {
        recompute: activation_bytes(shape, dataclasses.replace(candidate, recompute=recompute), 16384) / 1e9
        for recompute in ("none", "selective", "full")
    }
    assert of == {"none": pytest.approx(76.1, abs=0.1), "selective": pytest.approx(25.9, abs=0.1)} | {
        "full": pytest.approx(5.9, abs=0.1)
    }
    half = activation_bytes(shape, dataclasses.replace(candidate, tensor=2), 16384) / 1e9
    assert half == pytest.approx(of["none"] / 2)
    interleaved = dataclasses.replace(candidate, pipeline=2, virtual=2)
    assert activation_bytes(shape, interleaved, 16384) / 1e9 == pytest.approx(of["none"] * 1.25)


# NVIDIA NeMo-RL 0.4's performance summary: GRPO on DGX H100, bf16, 64 prompts x 32 responses of at most 4,096 tokens,
# 4 updates a rollout, colocated or one step off policy: model, GPUs, mean tokens of a sequence, seconds of a step, cut.
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
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_step_times_are_met_within_30_percent(name):
    model, gpus, length, seconds, layout = PUBLISHED[name]
    shape, cluster, off_policy = RELEASED[model], Cluster(gpus, 80 * GIB, gpu("h100")), "server_gpus" in layout
    work = Work(64, 32, 150, length - 150, 4096, 0, 8192, mid=1.0, hard=0.0, passes=2, updates=4, overlap=off_policy)
    placed = PLACED | {"tensor": 1, "placement": "servers" if off_policy else "turns"}
    candidate = Candidate(**placed | layout)
    need = dataclasses.replace(policy_need(shape, candidate, work), engine=0.6 * cluster.memory)
    ratio = step_seconds(shape, candidate, cluster, work, need).step / seconds
    assert 0.7 < ratio < 1.3, f"{name}: {ratio:.2f}"


@pytest.mark.parametrize(("model", "gpus"), [("Qwen/Qwen2.5-Math-7B", 16), ("meta-llama/Llama-3.1-70B", 64)])
def test_what_fits_stays_within_the_memory_and_the_model_can_be_cut_so(model, gpus):
    shape, cluster = RELEASED[model], Cluster(gpus, 80 * GIB, gpu("h100"))
    fits, rejected = plan(shape, cluster, WORK)
    assert fits and rejected
    for made in fits:
        c = made.candidate
        cut = {"tensor": c.tensor, "pipeline": c.pipeline, "virtual_pipeline": c.virtual, "context": c.context}
        check_layout(Parallel(**cut), shape, c.ranks, model)
        assert c.ranks + c.server_gpus == gpus
        assert made.need.policy + (made.need.engine if c.placement == "beside" else 0) <= cluster.memory
        assert 0 < made.engine_memory <= 0.9 and made.seconds.step > 0
    fastest = min(made.seconds.step for made in fits)
    assert fits[0].seconds.step <= 1.03 * fastest
    names = [f"TP{c.tensor} PP{c.pipeline}" + f" CP{c.context}" * (c.context > 1) for c in (m.candidate for m in fits)]
    assert not set(names) & {each.layout for each in rejected}


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
    assert "best (16 trainer ranks): parallel.tensor=2 " in printed
    assert "TP8 PP1: parallel.tensor: 8 does not divide the model's 28 attention heads" in printed
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


@pytest.mark.parametrize("example", ["qwen2.5_math_7b_dypo", "qwen3_32b_dypo"])
def test_the_overrides_of_a_plan_make_that_layout_whatever_the_file_has(example):
    path = f"examples/{example}/config.yaml"
    shape = planned_shape(load_config(path).model)
    for made in plan(shape, Cluster(32, 192 * GIB, gpu("h200")), WORK)[0]:
        c = made.candidate
        if c.placement == "servers" and "32b" not in example:
            continue  # whose addresses nobody knows
        config = load_config(path, made.candidate.overrides(made.engine_memory).split())
        cut = config.parallel
        assert (cut.tensor, cut.pipeline, cut.virtual_pipeline, cut.context) == (
            c.tensor,
            c.pipeline,
            c.virtual,
            c.context,
        )
        assert cut.sequence_parallel == (c.tensor > 1) and config.model.recompute == c.recompute
        assert config.optimizer.distributed == (c.shards > 1) and config.trainer.offload == (c.placement == "turns")
        assert (config.rollout.engine == "server") == (c.placement == "servers")
