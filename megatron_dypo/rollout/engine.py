"""What a rollout engine is: token ids in, token ids and log-probs out, weights replaced in place.

Every rank runs one engine on its own share of the prompts; ``sync`` is called by all ranks together.
"""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from megatron_dypo.config.schema import Config
from megatron_dypo.data.tokenizer import Tokenizer
from megatron_dypo.errors import UserError
from megatron_dypo.models.shape import ModelShape
from megatron_dypo.records import Response
from megatron_dypo.rollout.vllm_versions import Vllm, check_in_process, check_sender, check_server, installed
from megatron_dypo.runtime.distributed import Layout, device_kind

if TYPE_CHECKING:
    from megatron_dypo.weight_sync.source import Weights

log = logging.getLogger(__name__)
Role = Literal["engine", "server", "sender"]
VLLM_CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)


@dataclass(frozen=True)
class Request:
    """One response to sample. ``seed`` None is greedy decoding."""

    prompt_ids: np.ndarray
    seed: int | None


@dataclass(frozen=True)
class Sampling:
    """How to sample: lengths in tokens. ``eos_id``, one token or several (as transformers' ``eos_token_id``), ends a
    response and is part of it."""

    temperature: float
    top_p: float
    max_tokens: int
    eos_id: int | tuple[int, ...]

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Every token that ends a response."""
        return (self.eos_id,) if isinstance(self.eos_id, int) else self.eos_id


class Engine(Protocol):
    """``generate`` keeps the order of the requests; log-probs are those of the distribution sampled from, and each
    response names the version of the weights.

    ``sleep`` gives the device's memory back, and without ``keep_weights`` the weights too, which the next use must then
    ``sync``. ``sync`` and ``generate`` take what they need again by themselves.
    """

    def generate(self, requests: list[Request], sampling: Sampling) -> list[Response]: ...

    def sync(self, weights: Weights) -> None: ...

    def sleep(self, keep_weights: bool) -> None: ...


def engine_name(config: Config) -> str:
    """``rollout.engine`` with ``auto`` resolved: vLLM where installed, transformers elsewhere."""
    wanted, installed = config.rollout.engine, importlib.util.find_spec("vllm") is not None
    if wanted == "vllm" and not installed:
        raise UserError(
            "rollout.engine: vllm is not installed here (pip install 'megatron_dypo[vllm]', or engine: transformers)"
        )
    return wanted if wanted != "auto" else "vllm" if installed else "transformers"


def sync_backend(config: Config, kind: str) -> str:
    """Return ``rollout.sync_backend`` with ``auto`` resolved for trainers and servers on devices of ``kind``."""
    wanted = config.rollout.sync_backend
    return wanted if wanted != "auto" else {"cuda": "nccl", "cpu": "shared_memory"}[kind]


def check_vllm(config: Config, shape: ModelShape, role: Role = "engine") -> Vllm | None:
    """Return the installed vLLM. Raises UserError for what it cannot do in its role, known before it is loaded.

    ``role``: an ``engine`` in this process, a ``server``, or a trainer that is a ``sender`` of weights to servers.
    """
    kind, found = device_kind(), installed()
    if role == "sender":
        check_sender(sync_backend(config, kind), found)
    elif found is None:
        raise UserError("rollout.engine: vllm is not installed here (pip install 'megatron_dypo[vllm]')")
    else:
        {"engine": check_in_process, "server": check_server}[role](config, found, kind)
    if kind == "cuda":
        return found
    if shape.head_dim not in VLLM_CPU_HEAD_SIZES:
        sizes = ", ".join(map(str, VLLM_CPU_HEAD_SIZES))
        raise UserError(f"model.shape.head_dim: vLLM on CPU serves head sizes {sizes}, not {shape.head_dim}")
    if config.policy.routing_replay == "rollout":
        raise UserError(
            "policy.routing_replay: rollout: vLLM tells its routing with CUDA alone; take rollout.engine: transformers"
        )
    return found


def build_engine(
    config: Config, shape: ModelShape, tokenizer: Tokenizer, folder: Path, layout: Layout
) -> Engine | None:
    """This rank's engine, with dummy weights until ``sync``; None when rollouts are replayed. Collective."""
    name = engine_name(config)
    if name == "vllm":
        from megatron_dypo.rollout.vllm_engine import VllmEngine

        return VllmEngine(config, shape, tokenizer.end_ids, folder)
    if name == "server":
        from megatron_dypo.rollout.server_engine import ServerEngine
        from megatron_dypo.rollout.vllm_args import served_model_name

        return ServerEngine(config, served_model_name(config, shape, tokenizer), layout)
    if name == "transformers":
        if config.rollout.engine == "auto":
            log.warning("vLLM is not installed: sampling with transformers, many times slower")
        from megatron_dypo.rollout.hf_engine import HfEngine

        return HfEngine(shape, returns_experts=config.policy.routing_replay == "rollout")
    return None
