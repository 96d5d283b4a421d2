"""The engines by name: choose one from the configuration, check that it works here, and build it."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import Literal

from megatron_dypo.config.schema import Config
from megatron_dypo.data.tokenizer import Tokenizer
from megatron_dypo.errors import UserError
from megatron_dypo.models.shape import ModelShape
from megatron_dypo.rollout.engine import Engine
from megatron_dypo.rollout.vllm_args import served_model_name, sync_backend
from megatron_dypo.rollout.vllm_versions import Vllm, check_in_process, check_sender, check_server, installed
from megatron_dypo.runtime.distributed import Layout, device_kind

log = logging.getLogger(__name__)
Role = Literal["engine", "server", "sender"]
VLLM_CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)


def engine_name(config: Config) -> str:
    """Return ``rollout.engine`` with ``auto`` resolved: vLLM if installed, else transformers."""
    wanted, installed = config.rollout.engine, importlib.util.find_spec("vllm") is not None
    if wanted == "vllm" and not installed:
        raise UserError(
            "rollout.engine: vllm is not installed here (pip install 'megatron_dypo[vllm]', or engine: transformers)"
        )
    return wanted if wanted != "auto" else "vllm" if installed else "transformers"


def check_vllm(config: Config, shape: ModelShape, role: Role = "engine") -> Vllm | None:
    """Return the installed vLLM. Raises UserError for what it cannot do in its role, before it is loaded.

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
    if role != "engine" and (backend := sync_backend(config, kind)) != "shared_memory":
        raise UserError(f"rollout.sync_backend: {backend}: needs CUDA, and there is none: use shared_memory")
    if shape.head_dim not in VLLM_CPU_HEAD_SIZES:
        sizes = ", ".join(map(str, VLLM_CPU_HEAD_SIZES))
        raise UserError(f"model.shape.head_dim: vLLM on CPU serves head sizes {sizes}, not {shape.head_dim}")
    if config.policy.routing_replay == "rollout":
        raise UserError(
            "policy.routing_replay: rollout: vLLM returns its routing on CUDA only; use rollout.engine: transformers"
        )
    return found


def build_engine(
    config: Config, shape: ModelShape, tokenizer: Tokenizer, folder: Path, layout: Layout
) -> Engine | None:
    """Build this rank's engine, with dummy weights until ``sync``; None if rollouts are replayed. Collective."""
    name = engine_name(config)
    if name == "vllm":
        from megatron_dypo.rollout.vllm_engine import VllmEngine

        return VllmEngine(config, shape, tokenizer.end_ids, folder)
    if name == "server":
        from megatron_dypo.rollout.server_engine import ServerEngine

        return ServerEngine(config, served_model_name(config, shape, tokenizer), layout)
    if name == "transformers":
        if config.rollout.engine == "auto":
            log.warning("vLLM is not installed: sampling with transformers, many times slower")
        from megatron_dypo.rollout.hf_engine import HfEngine

        return HfEngine(shape, returns_experts=config.policy.routing_replay == "rollout")
    return None
