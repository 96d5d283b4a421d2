"""One rollout server: vLLM's own, replacing this process, with this project's arguments, guard and worker extension.

The guard rejects every request without the token, whatever its path: vLLM's own key protects the paths of its public
interface and leaves open those that replace weights.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import socket
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import NoReturn

from megatron_dypo.config.schema import Config
from megatron_dypo.data.tokenizer import load_tokenizer
from megatron_dypo.errors import UserError
from megatron_dypo.models.hf_config import write_config
from megatron_dypo.models.limits import check_policy
from megatron_dypo.models.shape import model_shape
from megatron_dypo.rollout.engines import check_vllm
from megatron_dypo.rollout.server import VARIABLE, server_token
from megatron_dypo.rollout.vllm_args import as_flags, engine_arguments, served_model_name, set_environment, sync_backend
from megatron_dypo.runtime.distributed import device_kind, is_loopback


class RequireToken:
    """ASGI middleware, given to vLLM by name (``--middleware``). Only a health check needs no token."""

    def __init__(self, app: Callable[..., Awaitable[None]]):
        self._app = app
        self._wanted = _digest(f"Bearer {server_token()}".encode())

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] == "lifespan" or scope.get("path") == "/health":
            return await self._app(scope, receive, send)
        given = dict(scope["headers"]).get(b"authorization", b"")
        if hmac.compare_digest(_digest(given), self._wanted):
            return await self._app(scope, receive, send)
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1008})
        await send({"type": "http.response.start", "status": 401, "headers": [(b"content-type", b"text/plain")]})
        await send({"type": "http.response.body", "body": f"the token of {VARIABLE} is needed\n".encode()})


def _digest(text: bytes) -> bytes:
    return hashlib.sha256(text).digest()


_ENVIRONMENT = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_HOST_IP": "127.0.0.1"}  # 1: enables the calls that replace weights


def serve(config: Config, host: str, port: int, tensor: int) -> NoReturn:
    """Serve the configuration's model, without weights until a trainer sends some. Raises UserError.

    ``tensor``: tensor-parallel devices of this server.
    """
    server_token()
    reach = _reach(host)
    _check_port(host, port)
    shape = model_shape(config.model)
    check_policy(config.policy, shape, "serve")
    kind, vllm = device_kind(), check_vllm(config, shape, "server")
    tokenizer = load_tokenizer(config, shape)
    name, folder = (
        served_model_name(config, shape, tokenizer),
        Path(config.trainer.run_dir) / "engine" / f"server_{port}",
    )
    write_config(shape, folder, tokenizer.end_ids)
    backend = sync_backend(config, kind)
    transfer = {"shared_memory": "megatron_dypo"}.get(backend, backend)
    # CUDA IPC handles from clients that have the token
    set_environment(kind, **_ENVIRONMENT, **({"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"} if backend == "ipc" else {}))
    flags = as_flags(
        engine_arguments(config, shape, folder, kind, vllm)
        | {
            "served_model_name": name,
            "tokens_only": True,
            "weight_transfer_config": {"backend": transfer},
            "middleware": "megatron_dypo.rollout.serve.RequireToken",
            "tensor_parallel_size": tensor,
            "host": host,
            "port": port,
            "uvicorn_log_level": "warning",
        }
    )
    print(f"megatron_dypo: serving {name} at http://{host}:{port}, {reach}", flush=True)
    print(
        f"megatron_dypo: every request, those that replace weights included, needs the token in {VARIABLE}", flush=True
    )
    os.execv(sys.executable, [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *flags])


def _check_port(host: str, port: int) -> None:
    """Raise UserError if another program already listens; vLLM would notice only after minutes."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # like vLLM: ignores a server that has just ended
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(f"--port: cannot listen at {host}:{port}: {error.strerror}") from None


def _reach(host: str) -> str:
    """Describe who can reach an address. Raises UserError if it is not an IP address."""
    if is_loopback(host):
        return "reached from this machine only"
    try:
        ipaddress.ip_address(host)
    except ValueError:
        raise UserError(f"--host: {host!r} is not an IP address (127.0.0.1: this machine only; 0.0.0.0: all)") from None
    return "REACHED FROM OTHER MACHINES, unencrypted: keep it inside a network you trust"
