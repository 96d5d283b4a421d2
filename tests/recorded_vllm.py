"""An imitation of one release of vLLM, from its recorded signatures (``tools/record_vllm.py``); it rejects other calls.

It covers this project's calls: an engine with one worker, whose memory sleeps in parts, and whose model keeps the
weights that it receives.
"""

from __future__ import annotations

import abc
import dataclasses
import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar, Generic, TypeVar

import torch

RECORDS = json.loads((Path(__file__).parent / "vllm_signatures.json").read_text())
PARTS = {"weights", "kv_cache"}
_A, _B = TypeVar("_A"), TypeVar("_B")


def signature(arguments: str) -> inspect.Signature:
    """Parse a recorded signature, such as ``self, level=1``."""
    scope: dict[str, Any] = {}
    exec(f"def function({arguments}): ...", {"ANY": None}, scope)  # noqa: S102
    return inspect.signature(scope["function"])


def strict(arguments: str, function: Callable) -> Callable:
    """Return ``function``, raising TypeError if a call does not fit the recorded arguments."""
    recorded = signature(arguments)

    def call(*given, **named):
        recorded.bind(*given, **named)
        return function(*given, **named)

    return call


@dataclasses.dataclass
class _Info:
    """Arguments of an update or a handshake; releases derive their own classes."""


class Model:
    """A model that keeps what it receives."""

    def __init__(self):
        self.got: dict[str, torch.Tensor] = {}

    def modules(self) -> list:
        return []

    def load_weights(self, weights) -> None:
        for name, tensor in weights:
            self.got[name] = tensor.clone()


def install(monkeypatch, version: str, device: str = "cpu") -> ModuleType:
    """Make ``import vllm`` give this release, re-import what uses it, and return the module."""
    record = RECORDS[version]
    base = _module(
        "vllm.distributed.weight_transfer.base",
        WeightTransferEngine=_transfer_engine(record["WeightTransferEngine"]),
        WeightTransferInitInfo=_Info,
        WeightTransferUpdateInfo=_Info,
        ParamMeta=dataclasses.make_dataclass("ParamMeta", ["name", "dtype", "shape"]),
    )
    if record["WeightSource"]:
        members = (name for name in record["WeightSource"] if not name.startswith("__"))
        base.WeightSource = type("WeightSource", (), dict.fromkeys(members))
    factory = SimpleNamespace(_registry={})
    factory.register_engine = factory._registry.__setitem__
    modules = [
        base,
        _module("vllm.distributed.weight_transfer", base=base),
        _module("vllm.distributed.weight_transfer.factory", WeightTransferEngineFactory=factory),
        _module("vllm.distributed"),
        _module("vllm.model_executor"),
        _module("vllm.model_executor.model_loader"),
        _module(
            "vllm.model_executor.model_loader.reload",
            initialize_layerwise_reload=lambda model: None,
            finalize_layerwise_reload=lambda model, configuration: None,
        ),
        _module("vllm.config", WeightTransferConfig=lambda backend: SimpleNamespace(backend=backend)),
        _module("vllm", SamplingParams=_sampling(record["SamplingParams"])),
    ]
    modules[-1].LLM = _llm(record, factory._registry, torch.device(device))
    modules[-1].config = modules[-2]
    for module in modules:
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.delitem(sys.modules, "megatron_dypo.weight_sync.worker", raising=False)
    return modules[-1]


def _module(name: str, **members: object) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(members)
    return module


def _transfer_engine(record: dict) -> type:
    """Return the base class: abstract like the release's, with its constructor's arguments only."""
    first = signature(record["__init__"]["arguments"])

    class Base(abc.ABC, Generic[_A, _B]):
        def __init__(self, *given):
            bound = first.bind(self, *given).arguments
            self.model = bound["model"]
            if "device" in bound:
                self.device, self.model_config = bound["device"], bound["vllm_config"].model_config

        def parse_init_info(self, given: dict):
            return self.init_info_cls(**given)

        def parse_update_info(self, given: dict):
            return self.update_info_cls(**given)

    for name, member in record.items():
        if "abstractmethod" in member["is"]:
            setattr(Base, name, abc.abstractmethod(lambda self: None))
    abc.update_abstractmethods(Base)
    return Base


def _sampling(known: list[str]) -> Callable:
    def parameters(**given: object) -> SimpleNamespace:
        assert set(given) <= set(known), set(given) - set(known)
        return SimpleNamespace(**given)

    return parameters


def _llm(record: dict, registry: dict, device: torch.device) -> type:
    own = record["WeightTransferEngine"]
    engine_starts = "start_weight_update" in own  # before 0.25 the worker did it

    class LLM:
        made: ClassVar[list[LLM]] = []

        def __init__(self, **arguments: object):
            assert set(arguments) <= set(record["EngineArgs"]), set(arguments) - set(record["EngineArgs"])
            self.arguments, self.model, self.asleep = arguments, Model(), set()
            configuration = SimpleNamespace(parallel_config=None, model_config=None)
            given = [arguments["weight_transfer_config"], configuration, device, self.model]
            wanted = list(signature(record["factories"]["WeightTransferEngineFactory.create_engine"]).parameters)[1:]
            named = dict(zip(("config", "vllm_config", "device", "model"), given, strict=True))
            self.engine = registry[given[0].backend](*(named.get(name) for name in wanted))
            self.made.append(self)

        def generate(self, prompts, sampling_params, **_):
            assert not self.asleep, "it would wait for ever"
            step = SimpleNamespace(logprob=-0.5)
            one = SimpleNamespace(token_ids=[1], logprobs=[{1: step}], finish_reason="stop", routed_experts=None)
            return [SimpleNamespace(outputs=[one]) for _ in prompts]

        def sleep(self, level=1, mode="abort"):
            if not ({"weights"} & self.asleep if "weights" in record["sleep returns if"] else self.asleep):
                self.asleep = set(PARTS)

        def wake_up(self, tags=None):
            if set(tags) <= self.asleep:
                self.asleep -= set(tags)

        def collective_rpc(self, method, timeout=None, args=(), kwargs=None):
            return [{}]

        def reset_prefix_cache(self, *_):
            return True

        def start_weight_update(self, *_):
            assert "weights" not in self.asleep
            if engine_starts:
                self.engine.start_weight_update()

        def update_weights(self, request):
            told = request["update_info"]
            if "update_weights" in own:
                self.engine.update_weights(told)
            else:
                self.engine.receive_weights(self.engine.parse_update_info(told), load_weights=self.model.load_weights)

        def finish_weight_update(self, *_):
            if engine_starts:
                self.engine.finish_weight_update()

    for name, arguments in record["LLM"].items():
        if name != "init_weight_transfer_engine":
            setattr(LLM, name, strict(arguments, vars(LLM)[name]))
    return LLM
