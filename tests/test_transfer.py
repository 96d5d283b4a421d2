"""The trainer's side of a weight transfer: shared memory is lossless, in buckets; and vLLM's own backends' arguments.

The transport itself is not tested (it needs GPUs). Real engines: test_rollout.py, test_servers.py.
"""

from __future__ import annotations

import base64
import pickle
from collections import Counter

import pytest
import torch

from megatron_dypo.errors import TrainingError
from megatron_dypo.rollout.server import Server
from megatron_dypo.rollout.server_pool import ServerPool
from megatron_dypo.weight_sync import transfer
from megatron_dypo.weight_sync.checksum import ChecksummedWeights, Turn, checksum
from megatron_dypo.weight_sync.source import Meta
from megatron_dypo.weight_sync.transfer import SharedMemory
from tests.rollout_server import Imitation, set_token

LAYERS = 5


class Source:
    """Weights that change from pass to pass."""

    def __init__(self, dtype: torch.dtype = torch.float32):
        sizes = {"model.embed_tokens.weight": (7, 4), "lm_head.weight": (7, 4)}
        for layer in range(LAYERS):
            sizes |= {f"model.layers.{layer}.{name}": (4, 3 + layer) for name in ("q.weight", "k.weight", "v.weight")}
        self.sizes, self.dtype, self.passes = sizes | {"model.norm.weight": (4,)}, dtype, 0

    def metadata(self) -> list[Meta]:
        return [Meta(name, self.dtype, size) for name, size in self.sizes.items()]

    def tensors(self, turn: int) -> dict[str, torch.Tensor]:
        draw = torch.Generator().manual_seed(turn)
        return {name: torch.randn(size, generator=draw).to(self.dtype) for name, size in self.sizes.items()}

    def __iter__(self):
        self.passes += 1
        return iter(self.tensors(self.passes).items())


class Receiver:
    """The other end, in this process: our side of vLLM's worker, with a model that keeps what it receives."""

    def __init__(self):
        from vllm.config import WeightTransferConfig

        from megatron_dypo.weight_sync.worker import LocalEngine

        self.calls: list[str] = []
        self.copied: list[bool] = []
        self.buckets: list[list[str]] = []
        self.got: dict[str, torch.Tensor] = {}

        class Model:
            def load_weights(_, weights):
                self.buckets.append([])
                for name, tensor in weights:
                    self.buckets[-1].append(name)
                    self.got[name] = tensor.clone()

        class Configuration:
            parallel_config = model_config = None

        self._engine = LocalEngine(WeightTransferConfig("none"), Configuration(), torch.device("cpu"), Model())

    def init_weight_transfer_engine(self, init_info: dict) -> None:
        self.calls.append("init")
        self._engine.init_transfer_engine(self._engine.parse_init_info(init_info))

    def start_weight_update(self) -> None:
        self.calls.append("start")

    def update_weights(self, update_info: dict) -> None:
        self.calls.append("update")
        self.copied.append(update_info["part"])
        self._engine.update_weights(update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.calls.append("finish")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bucket", [1, 150, 400, 10**6])
def test_what_goes_into_shared_memory_comes_out_bit_for_bit(bucket, dtype, monkeypatch):
    """A layer that fits in a bucket is not split; of a larger one, the receiver copies what it receives."""
    monkeypatch.setattr(transfer, "BUCKET_BYTES", bucket)
    receiver, source = Receiver(), Source(dtype)
    sender = SharedMemory(receiver, source, is_sender=True)
    for turn in (1, 2, 3):
        receiver.buckets, receiver.calls, receiver.copied = [], [], []
        sender.send_weights()
        expected = source.tensors(turn)
        assert receiver.got.keys() == expected.keys()
        assert all(torch.equal(receiver.got[name], tensor) for name, tensor in expected.items())
        assert receiver.calls == ["start", *["update"] * len(receiver.buckets), "finish"]
        layers = [{name.rpartition(".")[0].rpartition(".")[0] for name in names} for names in receiver.buckets]
        seen = Counter(layer for names in layers for layer in names if "layers" in layer)
        sizes = {f"model.layers.{layer}": 3 * 4 * (3 + layer) * dtype.itemsize for layer in range(LAYERS)}
        assert {layer for layer, buckets in seen.items() if buckets > 1} == {
            layer for layer, size in sizes.items() if size > bucket
        }
        used = [sum(expected[name].nbytes for name in names) for names in receiver.buckets]
        assert all(size <= bucket or len(names) == 1 for size, names in zip(used, receiver.buckets, strict=True))
        assert receiver.copied == [any(size > bucket for size in map(sizes.get, names) if size) for names in layers]
    sender.shutdown()


def test_a_sync_of_other_weights_than_it_was_opened_for_is_refused_and_not_cut_short():
    receiver, source = Receiver(), Source()
    sender = SharedMemory(receiver, source, is_sender=True)
    source.sizes["model.layers.0.extra.weight"] = (2, 2)
    with pytest.raises(TrainingError, match="other sizes than when the transfer was opened"):
        sender.send_weights()
    sender.shutdown()


def test_a_receiver_that_fails_ends_the_transfer(monkeypatch):
    monkeypatch.setattr(transfer, "BUCKET_BYTES", 1)
    receiver, failures = Receiver(), [None, RuntimeError("no room")]
    take = receiver.update_weights

    def failing(update_info: dict) -> None:
        take(update_info)
        if len(receiver.buckets) == 2 and (failure := failures.pop()):
            raise failure

    receiver.update_weights = failing
    with pytest.raises(RuntimeError, match="no room"):
        SharedMemory(receiver, Source(), is_sender=True).send_weights()
    assert "finish" not in receiver.calls


def test_other_ranks_only_make_the_pass():
    receiver, source = Receiver(), Source()
    SharedMemory(receiver, source, is_sender=False).send_weights()
    assert source.passes == 1 and receiver.calls == []


def test_reports_name_what_is_missing_doubled_or_different():
    source = Source()
    watched = ChecksummedWeights(source, Turn(0, 1))
    sent = dict(watched)
    taken = {name: checksum(tensor) for name, tensor in sent.items()}
    good = {"times": dict.fromkeys(taken, 1), "given": taken, "stored": {}}
    watched.compare([good, good], "here")
    name = "model.layers.3.k.weight"
    changed = sent[name].clone()
    changed[0, 0] = torch.nextafter(changed[0, 0], torch.tensor(torch.inf))
    for fault, report in (
        ("differs", good | {"given": taken | {name: checksum(changed)}}),
        ("was received 2 times", good | {"times": good["times"] | {name: 2}}),
        ("was not received", good | {"times": good["times"] | {name: 0}}),
        ("is elsewhere", good | {"stored": {name: "is elsewhere"}}),
    ):
        with pytest.raises(TrainingError, match=f"here, worker 1: {name}: {fault}"):
            watched.compare([good, report], "here")
    assert checksum(changed.t()) == checksum(changed.t().contiguous()) != checksum(changed)


def test_every_tensor_has_its_turn_once_in_as_many_syncs_and_those_of_a_module_together():
    modules = [
        f"model.layers.{i}.{part}" for i in range(30) for part in ("self_attn", "mlp.experts.3", "input_layernorm")
    ]
    names = [f"{module}.{rest}" for module in modules for rest in ("q_proj.weight", "k_proj.bias")]
    shares = [{name for name in names if Turn(number, 7).has(name)} for number in range(100, 107)]
    assert sorted(name for share in shares for name in share) == sorted(names)
    assert max(map(len, shares)) < len(names) / 3
    assert all(
        f"{name[:-13]}k_proj.bias" in share for share in shares for name in share if name.endswith("q_proj.weight")
    )
    assert all(Turn(number, 1).has(name) for number in range(3) for name in names)


def test_a_checksum_leaves_the_storage_as_it_is():
    """``trainer.offload`` empties it afterwards, and numpy would have marked it as not resizable."""
    tensor = torch.randn(4, 4)
    checksum(tensor)
    tensor.untyped_storage().resize_(0)


def test_nccl_is_told_of_all_workers_of_all_servers(monkeypatch):
    """vLLM's own trainer side, up to its communicator: the handshake, the phases and the metadata are real."""
    from vllm.distributed.weight_transfer import nccl_engine

    from megatron_dypo.rollout.server_engine import _open_transfer
    from megatron_dypo.runtime.distributed import Layout

    set_token(monkeypatch)
    opened, sent = [], []
    monkeypatch.setattr(nccl_engine, "open_trainer_endpoint", opened.append)
    monkeypatch.setattr(
        nccl_engine.NCCLTrainerWeightTransferEngine,
        "_broadcast",
        lambda self, source, meta: sent.extend(self._checked_iter(source, meta)),
    )

    async def two_workers(server, path, body):
        return {"world_size": 2} if path == "get_world_size" else None

    with Imitation(behave=two_workers) as first, Imitation(behave=two_workers) as second:
        pool = ServerPool([Server(first.url), Server(second.url)], "the model", 5.0, 20.0)
        pool.refresh("")
        pool.label = "run:1"
        source = Source()
        _open_transfer("nccl", pool, source, Layout()).send_weights()
        asked = [
            [body["init_info"] for path, body in server.asked if path.startswith("init")] for server in (first, second)
        ]
        updates = [body["update_info"] for path, body in first.asked if path == "update_weights"]
        assert (first.label, second.label) == ("run:1", "run:1")
    (info,) = opened
    assert (info.world_size, info.rank, info.master_address) == (5, 0, "127.0.0.1")
    assert [(init[0]["rank_offset"], init[0]["world_size"]) for init in asked] == [(1, 5), (3, 5)]
    assert {init[0]["master_port"] for init in asked} == {info.master_port}
    assert [name for name, _ in sent] == updates[0]["names"] == list(source.sizes)
    assert updates[0]["shapes"] == [list(size) for size in source.sizes.values()]


def test_cuda_ipc_has_a_buffer_that_the_largest_tensor_fits_in(monkeypatch):
    """vLLM's buffer is 1 GiB, and rejects, for example, an embedding of 151,936 x 4,096."""
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

    from megatron_dypo.rollout.server_engine import _open_transfer
    from megatron_dypo.runtime.distributed import Layout

    opened = []
    monkeypatch.setattr(WeightTransferTrainerFactory, "trainer_init", lambda info, **_: opened.append(info))
    large = Source(torch.bfloat16)
    large.sizes = large.sizes | {"model.embed_tokens.weight": (151_936, 4_096)}
    for source in (Source(), large):
        _open_transfer("ipc", None, source, Layout())
    assert [info.packed_buffer_size_bytes for info in opened] == [2**30, 151_936 * 4_096 * 2]


def test_cuda_ipc_handles_travel_as_vllm_takes_them(monkeypatch):
    set_token(monkeypatch)
    handles = [{"GPU-0": ("rebuild", 1, (2, 3))}]
    with Imitation() as server:
        pool = ServerPool([Server(server.url)], "the model", 5.0, 20.0)
        pool.refresh("")
        pool.update_weights({"names": ["a"], "ipc_handles": handles})
        (body,) = (body for path, body in server.asked if path == "update_weights")
    assert pickle.loads(base64.b64decode(body["update_info"]["ipc_handles_pickled"])) == handles  # noqa: S301
    assert body["update_info"].keys() == {"names", "ipc_handles_pickled"}
