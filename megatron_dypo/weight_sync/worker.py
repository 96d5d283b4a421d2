"""Receive weights inside vLLM's worker without CUDA, and prove what arrived.

``WorkerExtension`` is passed to vLLM by name (``worker_extension_cls``); importing this file registers the backend
``BACKEND`` with vLLM's weight transfer. A tensor arrives as itself, from this process, or as an offset in the shared
memory of the trainer's process. Imports nothing of the training side.
"""

from __future__ import annotations

import mmap
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from megatron_dypo.weight_sync.checksum import Turn, Verify, checksum

if TYPE_CHECKING:
    from megatron_dypo.weight_sync.stored import Stored

BACKEND = "megatron_dypo"


@dataclass
class _Nothing(WeightTransferInitInfo):
    """Empty: the two sides agree on nothing beforehand."""


@dataclass
class BucketInfo(WeightTransferUpdateInfo):
    """Whole layers, or ``part`` of one.

    ``tensors``: (name, tensor), or with ``memory`` (process id, descriptor of that process, bytes) where they lie:
    (name, dtype, shape, offset in bytes).
    """

    tensors: list[tuple]
    memory: tuple[int, int, int] | None = None
    part: bool = False


class LocalEngine(WeightTransferEngine[_Nothing, BucketInfo]):
    """Receive weights. vLLM loads and repacks a layer when its last tensor arrives (layerwise reload) and holds the
    others until then, so tensors of a partial layer are copied out of memory that will be refilled.
    """

    init_info_cls = _Nothing
    update_info_cls = BucketInfo
    _kernels: tuple[tuple, ...] = ()  # (the object that runs a layer's experts, its kernel), during an update on a CPU

    def init_transfer_engine(self, init_info: _Nothing) -> None:
        self.shutdown()

    def start_weight_update(self) -> None:
        """Start an update. On a CPU, vLLM (0.32) packs experts' weights only when it creates their kernel, at the first
        load; removing the kernel makes vLLM create it again.
        """
        methods = {id(method): method for method in map(_expert_method, self.model.modules()) if method}
        if self.device.type == "cpu":
            self._kernels = tuple((method, method.moe_kernel) for method in methods.values())
        for method, _ in self._kernels:
            method.moe_kernel = None
        initialize_layerwise_reload(self.model)

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        for method, kernel in self._kernels:  # for a layer that got no weights
            method.moe_kernel = method.moe_kernel or kernel
        self._kernels = ()

    def update_weights(self, update_info: dict) -> None:
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":  # the base class would ask for an accelerator, which a CPU machine lacks
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: BucketInfo, load_weights: Callable | None = None) -> None:
        """Load a bucket. vLLM 0.24 passes the loader, and starts, synchronizes and finishes an update itself."""
        load, tensors, memory = load_weights or self.model.load_weights, update_info.tensors, update_info.memory
        load(tensors if memory is None else self._in_memory(tensors, memory, update_info.part))

    @staticmethod
    def trainer_send_weights(iterator: Iterator, trainer_args: object) -> None:
        """Raise: vLLM before 0.28 expects the sender here as well; ours is in ``transfer.py``."""
        raise NotImplementedError

    def shutdown(self) -> None:
        self._maps: dict[tuple[int, int, int], mmap.mmap] = {}

    def _in_memory(
        self, places: Iterable[tuple], memory: tuple[int, int, int], copied: bool
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors as views of the trainer's memory, or ``copied``."""
        key = tuple(memory)
        if key not in self._maps:
            self._maps[key] = _map(*key)
        for name, dtype, shape, offset in places:
            count, kind = torch.Size(shape).numel(), getattr(torch, dtype)
            tensor = torch.frombuffer(self._maps[key], dtype=kind, count=count, offset=offset).view(shape)
            yield name, tensor.clone() if copied else tensor


def _expert_method(module: torch.nn.Module) -> object | None:
    """Return the object that runs a module's experts, or None."""
    method = getattr(module, "quant_method", None)
    return method if getattr(method, "moe_kernel", None) is not None else None


def _map(process: int, descriptor: int, size: int) -> mmap.mmap:
    """Map the trainer's memory. Raises OSError if the trainer is on another machine, in another container, or another
    user's.
    """
    with open(f"/proc/{int(process)}/fd/{int(descriptor)}", "r+b") as file:
        return mmap.mmap(file.fileno(), size)


class WorkerExtension:
    """Methods that the trainer calls on vLLM's workers around an update."""

    model_runner: Any  # the worker's

    def prepare_update(self, verify: Verify, number: int = 0, of: int = 1) -> None:
        """End an unfinished update, and prepare to report on turn ``number`` of ``of`` of the next (``weight_report``).

        vLLM considers a failed update finished, but some of its layers still wait for the rest of their tensors.
        """
        self._weight_update_active = True
        self.finish_weight_update()
        model = self.model_runner.get_model()
        vars(model).pop("load_weights", None)  # the last update's wrapper
        if verify != "off":
            self._proof = Proof(model, verify, Turn(number, of))
            load = model.load_weights
            model.load_weights = lambda weights: load(self._proof.watched(weights))

    def weight_report(self) -> dict[str, dict]:
        """Return ``Proof.report`` of the last update."""
        vars(self.model_runner.get_model()).pop(
            "load_weights", None
        )  # or whatever loads next would be taken for doubled
        return self._proof.report()

    def in_place_fault(self) -> str | None:
        """Return the name of a layer whose weights are not stored as loaded, so that they cannot be written in place
        (``sparse_nccl``); None if there is none.
        """
        from megatron_dypo.weight_sync.stored import packed_layers

        packed = next(packed_layers(self.model_runner.get_model()), None)
        return packed and f"{packed} keeps its weights in the order of a kernel, and values cannot be written in place"


class Proof:
    """Record what a model was given in an update, and check what its layers then hold."""

    def __init__(self, model: torch.nn.Module, verify: Verify, turn: Turn):
        self._model, self._turn, self._reads_back = model, turn, verify == "stored"
        self._stored: dict[str, Stored] = {}
        self._let_go: Callable[[], None] = lambda: None  # frees what was read back
        if self._reads_back:  # vLLM's layers are imported, and found before it dismantles them, only for reading back
            from megatron_dypo.weight_sync.stored import matrix, stored_tensors

            self._stored, self._let_go = stored_tensors(model), matrix.cache_clear
        self._times: Counter[str] = Counter()
        self._given: dict[str, str] = {}
        self._own: dict[str, tuple[str, torch.dtype]] = {}  # this worker's part

    def watched(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Yield the weights, taking checksums on their way into the model."""
        for name, tensor in weights:
            self._times[name] += 1
            if self._times[name] > 1:
                continue  # vLLM counts elements to know when a layer is complete, and would count this one again
            if self._turn.has(name):
                self._given[name] = checksum(tensor)
                if name in self._stored:
                    stored = self._stored[name]
                    self._own[name] = stored.checksum(stored.cut(tensor)), tensor.dtype
            yield name, tensor

    def report(self) -> dict[str, dict]:
        """Return by name how many ``times`` a tensor came, the checksum of what was ``given`` of those in turn, and
        what is wrong with what is ``stored``; `verify_sync: stored` reads all of them back now.
        """
        wrong = {}
        self._let_go()
        for name in self._given if self._reads_back else ():
            if name not in self._own:
                wrong[name] = "cannot be read back from vLLM's layers: only `sent` works here"
                continue
            expected, dtype = self._own[name]
            stored = self._stored[name]
            if stored.checksum(stored.read().to(dtype)) != expected:
                wrong[name] = "is not what the engine has stored"
        self._let_go()
        return {"times": dict(self._times), "given": self._given, "stored": wrong}


if BACKEND not in WeightTransferEngineFactory._registry:  # the only way to ask
    WeightTransferEngineFactory.register_engine(BACKEND, LocalEngine)
