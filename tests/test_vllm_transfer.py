"""vLLM's engines behind ``rollout.sync_backend``: the receiver gets what was sent, bit for bit.

HTTP is real and a queue replaces NCCL (tests/vllm_wire.py); ``sparse_nccl`` sends only what changed.
"""

from __future__ import annotations

import functools

import pytest
import torch

from megatron_dypo.errors import TrainingError, UserError
from megatron_dypo.rollout import server_engine
from megatron_dypo.rollout.server_engine import ServerEngine
from megatron_dypo.runtime.distributed import Layout
from megatron_dypo.weight_sync import sparse
from megatron_dypo.weight_sync.sparse import LastSent, SparseNccl
from tests.batches import make_config
from tests.rollout_server import set_token
from tests.test_transfer import Source
from tests.vllm_wire import PlainModel, servers_of

BF16 = torch.bfloat16


class Policy(Source):
    """Weights of which a few elements change from version to version, or none of a tensor."""

    def __init__(self):
        super().__init__(BF16)
        self.version = 0
        self.now = self.tensors(0)

    def step(self, tensors: int, elements: int) -> None:
        self.version += 1
        for number, tensor in enumerate(list(self.now.values())[:tensors]):
            for place in range(elements):
                tensor.view(-1)[(self.version + number + place) % tensor.numel()] += 1

    def __iter__(self):
        return iter((name, tensor.clone()) for name, tensor in self.now.items())


@pytest.fixture
def engine_of(monkeypatch):
    """``engine_of(backend, **rollout)``: our engine with two servers, their models and the wire to them."""
    set_token(monkeypatch)
    monkeypatch.setattr(server_engine, "all_gather_objects", lambda value: [value])
    monkeypatch.setattr(sparse, "BUCKET_BYTES", 150)
    entered = []

    def make(backend: str, **rollout: object):
        entered.append(servers_of(backend, 2, Source().sizes, BF16, monkeypatch))
        servers, models, wire = entered[-1].__enter__()
        urls = [server.url for server in servers]
        config = make_config(rollout={"engine": "server", "servers": urls, "sync_backend": backend} | rollout)
        return ServerEngine(config, "the model", Layout()), models, wire

    yield make
    for each in entered:
        each.__exit__(None, None, None)


def same(model: torch.nn.Module, policy: Policy) -> bool:
    stored = dict(model.named_parameters())
    return all(torch.equal(stored[name].view(torch.int16), now.view(torch.int16)) for name, now in policy.now.items())


def test_packed_nccl_fills_vllms_buffers_and_arrives_bit_for_bit(engine_of, monkeypatch):
    from vllm.distributed.weight_transfer import nccl_engine

    info = functools.partial(nccl_engine.NCCLTrainerInitInfo, packed_buffer_size_bytes=100)
    monkeypatch.setattr(nccl_engine, "NCCLTrainerInitInfo", info)
    policy = Policy()
    engine, models, wire = engine_of("nccl", verify_sync="stored", verify_syncs=1)
    for _ in range(3):
        wire.sent.clear()
        policy.step(tensors=30, elements=4)
        engine.sync(policy)
        assert all(same(model, policy) for model in models)
        assert sum(wire.sent) == sum(tensor.nbytes for tensor in policy.now.values())
        assert not any("load_weights" in vars(model) for model in models), "nothing of the proof is left behind"
        assert len(wire.sent) < len(policy.now) / 2, "packed: not a broadcast a tensor"


def test_cuda_ipc_fills_one_buffer_again_and_again_and_arrives_bit_for_bit(engine_of, monkeypatch):
    from vllm.distributed.weight_transfer import packed_tensor

    monkeypatch.setattr(packed_tensor, "DEFAULT_PACKED_BUFFER_SIZE_BYTES", 100)
    policy = Policy()
    engine, models, wire = engine_of("ipc", verify_sync="stored", verify_syncs=1)
    for _ in range(3):
        policy.step(tensors=30, elements=4)
        engine.sync(policy)
        assert all(same(model, policy) for model in models)
    assert wire.sent == []


def test_what_changed_crosses_alone_and_arrives_bit_for_bit(engine_of, caplog):
    policy = Policy()
    engine, models, wire = engine_of("sparse_nccl")
    engine.sync(policy)
    total = sum(tensor.numel() for tensor in policy.now.values())
    assert sum(wire.sent) == 6 * total and all(same(model, policy) for model in models)
    for tensors, elements in ((30, 1), (5, 3), (0, 0), (30, 10**3)):
        wire.sent.clear()
        before = {name: tensor.clone() for name, tensor in policy.now.items()}
        policy.step(tensors, elements)
        engine.sync(policy)
        changed = sum(int((policy.now[name] != before[name]).sum()) for name in before)
        assert sum(wire.sent) == 6 * changed and all(same(model, policy) for model in models)
        assert ("nccl sends fewer bytes" in caplog.text) == (changed > total / 3)


def test_a_tensor_that_is_compared_is_sent_whole_and_a_false_one_is_named(engine_of):
    """This includes a tensor that went wrong in an earlier sync, in which it was not compared."""
    policy = Policy()
    engine, models, _ = engine_of("sparse_nccl", verify_sync="stored", verify_syncs=5)
    for _ in range(6):
        policy.step(tensors=3, elements=1)
        engine.sync(policy)

    class Forgetful(PlainModel):
        def load_weights(self, weights) -> None:
            super().load_weights((name, tensor) for name, tensor in weights if "layers.2.k" not in name)

    models[1].__class__ = Forgetful
    with pytest.raises(TrainingError, match=r"worker 0: model.layers.2.k.weight: is not what the engine has stored"):
        for _ in range(5):
            policy.step(tensors=30, elements=1)
            engine.sync(policy)


def test_every_bit_counts_as_a_change():
    last, name = LastSent(), "a"
    value = torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=BF16)
    places, values = last.changes(name, value)
    assert places.tolist() == [0, 1, 2, 3] and places.dtype == torch.int32 and torch.equal(values, value)
    value = torch.tensor([-0.0, 1.0, 2.0078125, 3.0], dtype=BF16)  # 2's next neighbour is 2.015625
    places, values = last.changes(name, value)
    assert places.tolist() == [0] and str(values[0].item()) == "-0.0"
    assert len(last.changes(name, value)[0]) == 0 and len(last.changes(name, value, whole=True)[0]) == 4


def test_a_tensor_with_more_places_than_an_int32_has_is_refused_by_name():
    class Huge(Source):
        def metadata(self):
            first, *rest = super().metadata()
            return [type(first)(first.name, BF16, (2**16, 2**15)), *rest]

    with pytest.raises(UserError, match=r"sparse_nccl: model.embed_tokens.weight has 2\*\*31 elements or more"):
        SparseNccl(None, None, Huge(), is_sender=True)


def test_other_ranks_only_make_the_pass():
    source = Source(BF16)
    SparseNccl(None, None, source, is_sender=False).send_weights()
    assert source.passes == 1
