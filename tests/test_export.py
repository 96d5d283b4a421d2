"""The batched export: a few collectives per layer, two layers of memory, and the bytes of the sharded weights.

Bytes, names and order at every layout: test_layouts.py, test_moe.py and test_convert.py, which gather with it.
"""

from __future__ import annotations

import collections

import pytest

from megatron_dypo.config.schema import Shape
from tests import batches
from tests.ranks import run_ranks

SMALL = Shape(
    family="qwen3_moe", num_layers=4, hidden_size=64, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=4,
    head_dim=16, num_experts=16, router_topk=2,
)  # fmt: skip
COLLECTIVES = (
    "all_gather",
    "all_gather_into_tensor",
    "all_reduce",
    "all_to_all",
    "broadcast",
    "reduce",
    "send",
    "recv",
)
ONE_BY_ONE = 3131  # calls per rank that a pass over the last test's model made, one tensor at a time


def build(shape: Shape, parallel: dict):
    """Return this rank's policy with drawn weights, and the function that draws them."""
    from megatron_dypo.models.shape import model_shape
    from megatron_dypo.models.sharding import random_weights
    from megatron_dypo.policy.policy import Policy
    from megatron_dypo.runtime import distributed

    batches.SHAPES["of this test"] = shape
    config = batches.make_config("of this test", parallel=parallel)
    layout, model = distributed.init(config.parallel), model_shape(config.model)
    read = random_weights(model, seed=1)
    return Policy(config, model, layout, read), read


def counted(shape: Shape, parallel: dict) -> dict[str, int]:
    """Count calls of ``torch.distributed`` by name in one pass over the weights, checking that each is as drawn."""
    import torch
    import torch.distributed as dist

    from megatron_dypo.weight_sync.source import sent_shapes

    policy, read = build(shape, parallel)
    calls: collections.Counter[str] = collections.Counter()

    def watched(name: str, plain):
        def call(*arguments, **options):
            calls[name] += 1
            return plain(*arguments, **options)

        return call

    for name in COLLECTIVES:
        setattr(dist, name, watched(name, getattr(dist, name)))
    names = []
    for name, tensor in policy.named_tensors():
        names.append(name)
        assert torch.equal(tensor, read(name)), name
    assert names == list(sent_shapes(policy.shape))
    return dict(calls)


def test_a_layer_of_any_number_of_experts_takes_three_collectives_and_the_rest_of_the_model_two():
    """Experts: a broadcast to the other stage and an all-gather. The rest of a layer: a broadcast."""
    for calls in run_ranks(4, counted, SMALL, {"expert": 2, "pipeline": 2}):
        assert calls == {"broadcast": 4 * 2 + 2, "all_gather_into_tensor": 4}


def test_expert_tensor_parallel_shards_next_to_tensor_parallel_ones():
    """Tensor-parallel shards at TP 2 x ETP 2 are sent separately from the rest."""
    parallel = {"tensor": 2, "expert_tensor": 2, "sequence_parallel": True, "pipeline": 2}
    for calls in run_ranks(4, counted, SMALL, parallel):
        assert calls == {"broadcast": 4 * 3 + 3, "all_gather_into_tensor": 4 * 2 + 2}


@pytest.mark.faults
def test_a_sync_of_a_235b_shaped_model_makes_a_fiftieth_of_the_calls_of_one_tensor_at_a_time():
    large = SMALL.model_copy(update={"num_layers": 8, "ffn_hidden_size": 24, "num_experts": 128, "router_topk": 8})
    for calls in run_ranks(16, counted, large, {"expert": 8, "pipeline": 2}, seconds=600):
        assert sum(calls.values()) <= ONE_BY_ONE / 50
        assert calls == {"broadcast": 8 * 2 + 2, "all_gather_into_tensor": 8}


def synced_often(shape: Shape, parallel: dict, syncs: int) -> tuple[dict, dict, dict]:
    """Return SHA-256 digests by name after ``syncs`` syncs, each of different weights.

    Three sets: received on rank 0 from shared memory, gathered on this rank, and the drawn weights after the same
    changes, unsharded.
    """
    import torch

    from megatron_dypo.weight_sync import transfer
    from megatron_dypo.weight_sync.checksum import checksum
    from megatron_dypo.weight_sync.source import Weights, sent_shapes
    from tests.test_transfer import Receiver

    @torch.no_grad()
    def changed(weight: torch.Tensor) -> torch.Tensor:  # element by element, so that a shard changes as the whole does
        return weight.mul_(0.97).add_(0.01)

    policy, read = build(shape, parallel)
    transfer.BUCKET_BYTES = 10_000  # layers come in parts
    main = torch.distributed.get_rank() == 0
    receiver = Receiver() if main else None
    sender = transfer.SharedMemory(receiver, Weights(policy), is_sender=main)
    for _ in range(syncs):
        for parameter in policy.parameters.values():
            changed(parameter)
        sender.send_weights()
    sender.shutdown()
    received = {name: checksum(tensor) for name, tensor in receiver.got.items()} if main else {}
    gathered = {name: checksum(tensor) for name, tensor in policy.named_tensors()}
    expected = {}
    for name in sent_shapes(policy.shape):
        weight = read(name).clone()
        for _ in range(syncs):
            changed(weight)
        expected[name] = checksum(weight)
    return received, gathered, expected


@pytest.mark.faults
def test_after_twenty_syncs_at_ep_4_tp_2_pp_2_every_tensor_is_bit_for_bit_what_it_is_in_one_piece():
    parallel = {"expert": 4, "tensor": 2, "pipeline": 2, "sequence_parallel": True}
    found = run_ranks(16, synced_often, SMALL, parallel, 20, seconds=600)
    received, _, expected = found[0]
    assert received == expected and len(expected) > 16 * 3 * SMALL.num_layers
    assert all(gathered == whole == expected for _, gathered, whole in found)


def live_bytes() -> int:
    """Return the bytes of all tensors' storages in this process."""
    import gc

    import torch

    storages: collections.Counter[int] = collections.Counter()
    for each in gc.get_objects():
        if type(each) in (torch.Tensor, torch.nn.Parameter) and each.device.type == "cpu":
            place = each.untyped_storage()
            storages[place.data_ptr()] = max(storages[place.data_ptr()], place.nbytes())  # two may begin at one address
    return sum(storages.values())


def peak_in_layers(parallel: dict) -> float:
    """Return the peak memory of a pass above what was there before, in layers."""
    import math
    import time

    from megatron_dypo.weight_sync.source import sent_shapes

    policy, _ = build(SMALL, parallel)
    layer = sum(4 * math.prod(size) for name, size in sent_shapes(policy.shape).items() if ".layers.0." in name)
    before, peak, seen = live_bytes(), 0, collections.Counter()
    for name, _ in policy.named_tensors():
        unit = name.split(".")[2] if ".layers." in name else name
        seen[unit] += 1
        if seen[unit] in (1, 20):  # when the previous layer could still exist; when the next one does
            for _ in range(10):  # a thread of gloo's may keep what it has sent until its next turn
                time.sleep(0.05)
                if (extra := live_bytes() - before) <= 2.01 * layer:
                    break
            peak = max(peak, extra)
    return peak / layer


@pytest.mark.parametrize(
    "parallel", [{"expert": 2, "pipeline": 2}, {"tensor": 2, "sequence_parallel": True, "expert": 2}]
)
def test_two_layers_are_in_memory_at_most_and_the_second_while_the_first_is_used(parallel):
    for layers in run_ranks(4 if "pipeline" in parallel else 2, peak_in_layers, parallel):
        assert 1.2 < layers <= 2.01


def gathering_threads(parallel: dict, backend: str) -> set[str]:
    """Return the names of the threads that make collectives in a pass for ``rollout.sync_backend: backend``."""
    import threading

    import torch
    import torch.distributed as dist

    policy, read = build(SMALL, parallel)
    rollout = policy.config.rollout.model_copy(update={"sync_backend": backend})
    policy.config = policy.config.model_copy(update={"rollout": rollout})
    threads: set[str] = set()

    def watched(plain):
        def call(*arguments, **options):
            threads.add(threading.current_thread().name)
            return plain(*arguments, **options)

        return call

    for name in ("broadcast", "all_gather_into_tensor"):
        setattr(dist, name, watched(getattr(dist, name)))
    for name, tensor in policy.named_tensors():
        assert torch.equal(tensor, read(name))
        dist.barrier()  # as vLLM's ipc sender makes them between tensors
    return threads


def test_no_thread_makes_collectives_beside_those_of_vllm_s_ipc_sender():
    parallel = {"expert": 2, "pipeline": 2}
    for backend, thread in (("ipc", "MainThread"), ("nccl", "export_0")):
        assert run_ranks(4, gathering_threads, parallel, backend) == [{thread}] * 4


def gathered_of_uneven_stages(sizes: tuple[int, ...], virtual: int) -> None:
    """Compare gathered with drawn tensors, with a table of uneven layer counts per stage."""
    import torch

    from megatron_dypo.config.schema import Parallel
    from megatron_dypo.models import stages
    from megatron_dypo.models.export import hf_tensors, plan
    from megatron_dypo.models.shape import model_shape
    from megatron_dypo.models.sharding import load_weights, random_weights
    from megatron_dypo.runtime import distributed

    stages.stage_layers = lambda *_: sizes
    batches.SHAPES["of this test"] = SMALL
    shape = model_shape(batches.make_config("of this test").model)
    layout = distributed.init(Parallel(pipeline=2, virtual_pipeline=virtual))
    own = [piece.rule for unit in plan(shape, layout) if unit.owner == layout.pp_rank for piece in unit.pieces]
    local = {
        rule.mcore: rule.as_megatron(rule.fold([torch.empty(size) for size in rule.sizes(shape)], shape))
        for rule in own
    }
    read = random_weights(shape, seed=1)
    load_weights(local, shape, layout, read)
    assert all(torch.equal(tensor, read(name)) for name, tensor in hf_tensors(local, shape, layout))


@pytest.mark.parametrize(("sizes", "virtual"), [((1, 3), 1), ((3, 1), 1), ((1, 0, 2, 1), 2)], ids=str)
def test_uneven_stages_are_gathered_by_their_table_alone(sizes, virtual):
    run_ranks(2, gathered_of_uneven_stages, sizes, virtual)
