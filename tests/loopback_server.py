"""A web server in its own thread on loopback, the base of the tests' imitations of servers."""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
from abc import ABC, abstractmethod
from typing import Any, Self

from aiohttp import web


class LoopbackServer(ABC):
    """A context manager. ``_answer`` handles every request to ``route``; ``port`` is known once it has started.

    The port stays reserved until the end, by a socket that is bound and never listens: a stopped server refuses
    connections, and nothing else on the machine gets its port before it starts again.
    """

    route = ("*", "/{path:.*}")

    def __init__(self, port: int = 0, tls: ssl.SSLContext | None = None):
        self.port, self._tls = port, tls
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> Self:
        self._reserved = socket.socket()
        self._reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._reserved.bind(("127.0.0.1", self.port))
        self.port = self._reserved.getsockname()[1]
        self._thread.start()
        self._run(self._start())
        return self

    def __exit__(self, *exception: object) -> None:
        self._run(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._reserved.close()

    def _run(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(30)

    @abstractmethod
    async def _answer(self, request: web.Request) -> web.StreamResponse: ...

    async def _start(self) -> None:
        app = web.Application()
        app.router.add_route(*self.route, self._answer)
        self._runner = web.AppRunner(app, shutdown_timeout=0.01)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port, ssl_context=self._tls, reuse_address=True).start()

    async def _end(self) -> None:
        await self._runner.cleanup()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
