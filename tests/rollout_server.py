"""An imitation of a rollout server, for faults that a real one cannot have on demand.

It answers as vLLM does (the paths and fields in use), with tokens that follow from the request's seed; what ``behave``
returns, or raises, replaces the answer. The real server is in tests/test_servers.py.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from megatron_dypo.rollout.server import VARIABLE
from tests.loopback_server import LoopbackServer

SECRET = "only for these tests"  # noqa: S105
EOS = 1
Behaviour = Callable[["Imitation", str, dict], Awaitable[Any]]


class Imitation(LoopbackServer):
    """A context manager around a server in its own thread. ``asked``: path and body of every request so far."""

    def __init__(self, name: str = "the model", behave: Behaviour | None = None, port: int = 0):
        super().__init__(port)
        self.name, self.behave, self.label = name, behave, "default"
        self.asked: list[tuple[str, dict]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def stop(self) -> None:
        """Stop like a killed server: connections are reset, and new ones refused."""
        self._run(self._end())

    def start(self) -> None:
        """Start again, at the same address, without weights."""
        self.label = "default"
        self._run(self._start())

    def count(self, path: str) -> int:
        return sum(asked == path for asked, _ in self.asked)

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        if request.headers.get("Authorization") != f"Bearer {SECRET}":
            return web.Response(status=401)
        path = request.match_info["path"]
        body = await request.json() if request.can_read_body else {}
        self.asked.append((path, body))
        answer = await self.behave(self, path, body) if self.behave else None
        if answer is None:
            answer = self._usual(path, body)
        return answer if isinstance(answer, web.StreamResponse) else web.json_response(answer)

    def _usual(self, path: str, body: dict) -> dict:
        if path == "finish_weight_update":
            self.label = body["weight_version"]
        return {
            "v1/models": {"data": [{"id": self.name}]},
            "weight_info": {"weight_version": self.label},
            "get_world_size": {"world_size": 1},
            "reset_prefix_cache": {"success": True},
            "collective_rpc": {"results": [{}]},
        }.get(path) or ({"choices": [self.choice(body)]} if path == "inference/v1/generate" else {"message": "done"})

    def choice(self, body: dict) -> dict:
        """Return the sample of a request's seed, the same on every server."""
        draw = random.Random(body["sampling_params"]["seed"])
        ids = [draw.randrange(2, 100) for _ in range(draw.randrange(1, body["sampling_params"]["max_tokens"]))] + [EOS]
        return {
            "token_ids": ids,
            "finish_reason": "stop",
            "weight_versions": [{"version": self.label, "start": 0, "end": len(ids)}],
            "logprobs": {"content": [{"token_id": token, "logprob": -draw.random()} for token in ids]},
        }


def set_token(monkeypatch) -> None:
    monkeypatch.setenv(VARIABLE, SECRET)
