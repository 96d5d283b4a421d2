"""Ask an OpenAI-compatible endpoint for chat completions, with openai's client, which retries, waits and pools.

async with Endpoint("https://api.deepseek.com/v1", "deepseek-reasoner", key=os.environ["KEY"]) as endpoint:
        answers = await asyncio.gather(*(
            endpoint.ask([{"role": "user", "content": problem}], temperature=0.6, top_p=0.95, max_tokens=8192)
            for problem in problems
        ))
        answers[0].trace, answers[0].finish_reason, answers[0].completion_tokens

``url`` is what precedes ``/chat/completions``. Any number of ``ask`` may be pending: ``concurrency`` of them are at the
server, the rest wait. Every call ends: with a ``Completion``, with ``EndpointFault`` (this request got no answer after
all retries), or with ``Refused`` (no request will: key, address or model are wrong). The key is only in the request's
header: openai's client never holds it, and server messages are shown without it.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import urlsplit

import httpx2
import openai

from megatron_dypo.data.traces import thinking, without_ends

_SHOWN = 200  # characters of what a server answered
_LONGEST = 64 << 20  # bytes of an answer
_LONGEST_WAIT = 120  # seconds; openai's client gives up at once if Retry-After asks for more
_RETRIES = "x-stainless-retry-count"  # the header in which openai's client counts a request's retries
# Its further headers, which describe this machine and the account at OpenAI, are not sent.
_SENT = ("host", "connection", "user-agent", "accept", "accept-encoding", "content-type", "content-length", _RETRIES)


class EndpointFault(Exception):
    """Raised for a request that got no answer; the message is one line that names the endpoint."""


class Refused(EndpointFault):
    """Raised if no further request will be answered either: key, address or model are wrong."""


@dataclass(frozen=True)
class Completion:
    """One answer: ``reasoning`` is what the server returns apart from ``text``, or ""; ``model`` as the server names
    it.

    Token counts are None if the server does not report them.
    """

    text: str
    reasoning: str
    finish_reason: str
    prompt_tokens: int | None
    completion_tokens: int | None
    model: str

    @property
    def trace(self) -> str:
        """Return reasoning (within think tags) and answer, without end markers that a server may leave in."""
        return without_ends(thinking(self.reasoning, self.text) if self.reasoning.strip() else self.text)

    @classmethod
    def parse(cls, body: bytes | bytearray, asked: str = "") -> Completion:
        """Return the first choice of a response's body. Raises ValueError if the body is not a completion.

        ``asked``: the model's name if the server does not report one.
        """
        try:
            tree = json.loads(body)
            choice, usage = tree["choices"][0], tree.get("usage") or {}
            message, model = choice["message"], tree.get("model") or asked
            text = message.get("content") or ""
            reasoning = message.get("reasoning_content") or message.get("reasoning") or ""
            prompt, answer = _count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens"))
            if isinstance(text, str) and isinstance(reasoning, str):
                return cls(text, reasoning, str(choice.get("finish_reason")), prompt, answer, str(model))
        except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
            pass
        raise ValueError("not a chat completion")


def _count(value: Any) -> int | None:
    """Return what the server reports if it is a number of tokens, else None."""
    return value if type(value) is int and 0 <= value < 2**31 else None


class Endpoint:
    """One model at one address; a context manager. Each request has ``tries``, each with a deadline of ``seconds``."""

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key: str | None = None,
        concurrency: int = 8,
        seconds: float = 1800.0,
        tries: int = 8,
    ):
        """Raise Refused for an address or a key that no request can be made with."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None or parts.query:
            raise Refused("url: expected http(s)://host[:port][/path], without credentials")
        if key is not None and not (key.isascii() and key.isprintable() and key.strip() == key != ""):
            raise Refused(f"{url}: the key holds characters that no header takes, or none at all")
        self.url, self.model = url.rstrip("/"), model
        self._key, self._seconds, self._tries = key, seconds, tries
        self._places = asyncio.Semaphore(concurrency)

    async def __aenter__(self) -> Self:
        self._client = openai.AsyncOpenAI(
            base_url=self.url,
            api_key="none",  # or the client takes the environment's; the key is added below it
            max_retries=self._tries - 1,
            timeout=self._seconds,
            http_client=_Http(self._key, self._seconds),
        )
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self._client.close()

    async def ask(
        self,
        messages: list[dict[str, str]],
        *,
        temperature: float,
        top_p: float,
        max_tokens: int,
        extra: dict[str, Any] | None = None,
    ) -> Completion:
        """Return one completion. ``extra``: further fields of the request's body (``seed``, ``chat_template_kwargs``).

        Raises EndpointFault, or its subclass Refused.
        """
        body = {"model": self.model, "messages": messages, "temperature": temperature, "top_p": top_p}
        body |= {"max_tokens": max_tokens} | (extra or {})
        try:
            async with self._places:
                content = json.dumps(body).encode()
                answer = await self._client.post("/chat/completions", content=content, cast_to=httpx2.Response)
        except openai.APIError as error:
            raise self._fault(error) from None
        return Completion.parse(answer.content, self.model)

    def _fault(self, error: openai.APIError) -> EndpointFault:
        """Translate the error that openai's client gave up on."""
        tries = int(error.request.headers[_RETRIES]) + 1
        times = f", {tries} times" if tries > 1 else ""
        if isinstance(error, openai.APITimeoutError):
            return EndpointFault(f"{self.url}: no answer within {self._seconds:g} s{times}")
        if not isinstance(error, openai.APIStatusError):
            why, lost = self._shown(str(error.__cause__) or type(error.__cause__).__name__), error.__cause__
            untrusted = isinstance(lost, httpx2.ConnectError) and "[SSL" in why
            return Refused(f"{self.url}: {why}") if untrusted else EndpointFault(f"{self.url}: {why}{times}")
        status, said = error.status_code, self._shown(error.response.text)
        if status in (401, 403):
            return Refused(f"{self.url}: refuses the key (HTTP {status})")
        if status in (402, 404, 405):
            return Refused(f"{self.url}: model {self.model!r}: HTTP {status}: {said}")
        if status < 400:
            return Refused(f"{self.url}: HTTP {status}: it redirects, which is not followed: give the address it means")
        return EndpointFault(f"{self.url}: HTTP {status}: {said}{times}")

    def _shown(self, text: str) -> str:
        """Shorten a server's text to one line, without the key, which some servers quote."""
        text = " ".join((text.replace(self._key, "[key]") if self._key else text).split())
        return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


class _Http(httpx2.AsyncClient):
    """The transport for openai's client: uses no proxy, follows no redirect, trusts the system's certificates.

    Deadline and largest length hold for a whole answer. A success that is not a completion counts as a lost connection,
    so that it is retried.
    """

    def __init__(self, key: str | None, seconds: float):
        limits = httpx2.Limits(max_connections=None)
        super().__init__(verify=ssl.create_default_context(), trust_env=False, limits=limits)
        self._authorization = {"Authorization": f"Bearer {key}"} if key else {}
        self._seconds = seconds

    async def send(self, request: httpx2.Request, **_: Any) -> httpx2.Response:
        request.headers = httpx2.Headers(
            {name: value for name, value in request.headers.items() if name in _SENT} | self._authorization
        )
        body = bytearray()
        try:
            async with asyncio.timeout(self._seconds):
                answer = await super().send(request, stream=True)
                async for part in answer.aiter_bytes():
                    body += part
                    if len(body) > _LONGEST:
                        await answer.aclose()
                        raise httpx2.ReadError(f"its answer is longer than {_LONGEST} bytes")
        except TimeoutError:
            raise httpx2.ReadTimeout("") from None
        except httpx2.ConnectError as error:
            if "[SSL" in str(error):  # an error of openai's own is not tried again
                raise openai.APIConnectionError(request=request) from error
            raise
        if answer.is_success:
            try:
                Completion.parse(body)
            except ValueError:
                said = body.decode(errors="replace")
                raise httpx2.RemoteProtocolError(f"answers no completion: {said}") from None
        wait = answer.headers.get("Retry-After", "")
        wait = str(min(int(wait), _LONGEST_WAIT)) if wait.isdecimal() else wait
        return httpx2.Response(answer.status_code, headers={"Retry-After": wait}, content=bytes(body), request=request)
