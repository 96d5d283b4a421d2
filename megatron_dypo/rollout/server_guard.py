"""What stands before a rollout server: no request without the token gets past it, whatever its path.

vLLM's own key guards the paths of its public interface and leaves those that replace weights open.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Awaitable, Callable

from megatron_dypo.errors import UserError

VARIABLE = "MEGATRON_DYPO_SERVER_TOKEN"
SHORTEST_TOKEN = 16  # characters


def server_token() -> str:
    """The token that servers and trainer share. Raises UserError where the environment has none worth the name."""
    token = os.environ.get(VARIABLE, "")
    if len(token) < SHORTEST_TOKEN:
        raise UserError(
            f"{VARIABLE}: rollout servers and trainer need the same secret token in the environment, "
            f"of at least {SHORTEST_TOKEN} characters (openssl rand -hex 32)"
        )
    return token


class RequireToken:
    """ASGI middleware, given to vLLM by name (``--middleware``). Only a health check goes without."""

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
