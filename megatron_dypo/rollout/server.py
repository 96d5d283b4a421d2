"""One vLLM server over HTTP: its model, one response from it, and the calls that replace its weights."""

from __future__ import annotations

import json
import math
import os
from urllib.parse import urlsplit

import aiohttp
import numpy as np

from megatron_dypo.errors import UserError
from megatron_dypo.records import Response
from megatron_dypo.rollout.engine import Request, Sampling
from megatron_dypo.rollout.routed_experts import from_text
from megatron_dypo.rollout.vllm_args import sampling_arguments
from megatron_dypo.runtime.distributed import is_loopback

_SHOWN = 200  # characters of a server's answer in a message
VARIABLE = "MEGATRON_DYPO_SERVER_TOKEN"
SHORTEST_TOKEN = 16  # characters


def server_token() -> str:
    """Return the token that servers and trainer share. Raises UserError if it is missing or too short."""
    token = os.environ.get(VARIABLE, "")
    if len(token) < SHORTEST_TOKEN:
        raise UserError(
            f"{VARIABLE}: rollout servers and trainer need the same secret token in the environment, "
            f"of at least {SHORTEST_TOKEN} characters (openssl rand -hex 32)"
        )
    return token


class ServerFault(Exception):
    """A server's fault, in one line that names it."""


class WrongServer(ServerFault):
    """Waiting does not help: the server serves something else, or requires another token."""


class BadAnswer(ServerFault):
    """A wrong or late answer, which may be the request's fault as well as the server's."""


def session() -> aiohttp.ClientSession:
    """Return a session whose connections carry the token, for the running event loop."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), headers={"Authorization": f"Bearer {server_token()}"}
    )


class Server:
    """A server at ``url``, ``http://host:port``. Every call raises ServerFault, and has a deadline in seconds."""

    def __init__(self, url: str):
        self.url = url.rstrip("/")

    @property
    def host(self) -> str:
        return urlsplit(self.url).hostname or ""

    @property
    def lane(self) -> str:
        """Return the server's lane in the trace."""
        return f"server {self.host}:{urlsplit(self.url).port}"

    @property
    def is_local(self) -> bool:
        return is_loopback(self.host)

    async def call(
        self, http: aiohttp.ClientSession, method: str, path: str, body: dict | None = None, *, seconds: float
    ) -> dict:
        """Return the JSON object of the server's answer."""
        timeout = aiohttp.ClientTimeout(total=seconds)
        try:
            async with http.request(
                method, f"{self.url}/{path}", json=body, timeout=timeout, allow_redirects=False
            ) as answer:
                content = await answer.read()
        except TimeoutError:
            raise BadAnswer(f"{self.url}: no answer to /{path} within {seconds:g} s") from None
        except (aiohttp.ClientError, OSError) as error:
            raise ServerFault(f"{self.url}: /{path}: {error or type(error).__name__}") from None
        if answer.status == 401:
            raise WrongServer(f"{self.url}: refuses the token in {VARIABLE}")
        if answer.status != 200:
            raise BadAnswer(f"{self.url}: /{path}: HTTP {answer.status}: {_shown(content)}")
        try:
            value = json.loads(content)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise BadAnswer(f"{self.url}: /{path}: answers garbage: {_shown(content)}")
        return value

    async def serves(self, http: aiohttp.ClientSession, seconds: float) -> str:
        """Return the name of its model."""
        answer = await self.call(http, "GET", "v1/models", seconds=seconds)
        try:
            return str(answer["data"][0]["id"])
        except (KeyError, IndexError, TypeError):
            raise ServerFault(f"{self.url}: /v1/models: names no model") from None

    async def label(self, http: aiohttp.ClientSession, seconds: float) -> str:
        """Return the name of its weights; the engine itself answers, so this checks its health, too."""
        answer = await self.call(http, "GET", "weight_info", seconds=seconds)
        return str(answer.get("weight_version"))

    async def sample(
        self, http: aiohttp.ClientSession, request: Request, sampling: Sampling, label: str, seconds: float
    ) -> Response:
        """Return one response, entirely from the weights named ``label``; the caller sets ``weight_version``."""
        body = {
            "token_ids": request.prompt_ids.tolist(),
            "sampling_params": sampling_arguments(request.seed, sampling),
        }
        answer = await self.call(http, "POST", "inference/v1/generate", body, seconds=seconds)
        try:
            return _response(answer, request, sampling, label)
        except (KeyError, IndexError, TypeError, ValueError, OverflowError) as error:
            raise BadAnswer(f"{self.url}: answers no usable response: {error or type(error).__name__}") from None


def _response(answer: dict, request: Request, sampling: Sampling, label: str) -> Response:
    """Parse the answer; raise one of several errors if it does not match the request."""
    (choice,) = answer["choices"]
    versions = {span["version"] for span in choice["weight_versions"]}
    if versions != {label}:
        raise ValueError(f"it was sampled from weights {sorted(versions)}, not {label!r}")
    ids, finish = choice["token_ids"], choice["finish_reason"]
    steps = choice["logprobs"]["content"]
    if not all(type(token) is int and 0 <= token < 2**31 for token in ids):
        raise ValueError("invalid token id")
    if [step["token_id"] for step in steps] != ids:
        raise ValueError("its log-probs belong to other tokens")
    logprobs = [float(step["logprob"]) for step in steps]
    if not all(math.isfinite(value) and value <= 1e-3 for value in logprobs):
        raise ValueError("invalid log-prob")
    # vLLM's server writes these for NaN and -inf. The step that trains on it is skipped, as with vLLM in process.
    logprobs = [math.nan if value <= -9999.0 else value for value in logprobs]
    ends = [place for place, token in enumerate(ids) if token in sampling.end_ids]
    stopped = ends == [len(ids) - 1]
    cut = not ends and len(ids) == sampling.max_tokens
    if (finish, stopped, cut) not in (("stop", True, False), ("length", False, True)):
        raise ValueError(f"{len(ids)} tokens with end tokens at {ends} do not go with finish_reason {finish!r}")
    routed = choice.get("routed_experts")
    experts = None if routed is None else from_text(routed, len(request.prompt_ids) + len(ids))
    return Response(np.array(ids, np.int32), np.array(logprobs, np.float32), finish, experts=experts)


def _shown(content: bytes) -> str:
    text = " ".join(content[: 4 * _SHOWN].decode(errors="replace").split())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
