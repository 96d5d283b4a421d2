"""An OpenAI-compatible endpoint, asked for chat completions: deadlines, retries, bounded concurrency.

    async with Endpoint("https://api.deepseek.com/v1", "deepseek-reasoner", key=os.environ["KEY"]) as endpoint:
        answers = await asyncio.gather(*(
            endpoint.ask([{"role": "user", "content": problem}], temperature=0.6, top_p=0.95, max_tokens=8192)
            for problem in problems
        ))
        answers[0].trace, answers[0].finish_reason, answers[0].completion_tokens

``url`` is what goes before ``/chat/completions``. Any number of ``ask`` may be under way: ``concurrency`` of them are
at the server, the rest wait. Every call ends: with a ``Completion``, with ``EndpointFault`` (this request got none,
after all retries), or with ``Refused`` (no request will: key, address or model are wrong). The key is in the request's
header and nowhere else: what a server says is shown without it.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, Self
from urllib.parse import urlsplit

import aiohttp

from megatron_dypo.data.traces import thinking, without_ends

_SHOWN = 200  # characters of what a server answered
_LONGEST = 64 << 20  # bytes of an answer
_FIRST_WAIT, _LONGEST_WAIT = 1.0, 60.0  # seconds before a retry; doubles from one to the next
_LONGEST_RETRY_AFTER = 600.0  # seconds: a server that asks for more has no time for us
_AGAIN = {408, 409, 425, 429}  # and 5xx


class EndpointFault(Exception):
    """Why a request got no answer, in one line that names the endpoint."""


class Refused(EndpointFault):
    """Nor will another one."""


class _Again(Exception):
    """Worth another try, ``after`` seconds if the server said so."""

    def __init__(self, reason: str, after: float | None = None):
        super().__init__(reason)
        self.after = after


@dataclass(frozen=True)
class Completion:
    """``reasoning``: what the server keeps apart from the answer's ``text``, or "". ``model``: as the server says.

    Token counts are None where the server does not tell.
    """

    text: str
    reasoning: str
    finish_reason: str
    prompt_tokens: int | None
    completion_tokens: int | None
    model: str

    @property
    def trace(self) -> str:
        """All of it, the reasoning within think tags; markers of ends that a server leaves in are taken off."""
        return without_ends(thinking(self.reasoning, self.text) if self.reasoning.strip() else self.text)


class Endpoint:
    """One model at one address; a context manager. ``seconds``: the deadline of one request; ``tries`` of each."""

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key: str | None = None,
        concurrency: int = 8,
        seconds: float = 1800.0,
        tries: int = 6,
        first_wait: float = _FIRST_WAIT,
    ):
        """Raises Refused for an address or a key that no request could be made with."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None or parts.query:
            raise Refused("url: expected http(s)://host[:port][/path], without credentials")
        if key is not None and not (key.isascii() and key.isprintable() and key.strip() == key != ""):
            raise Refused(f"{url}: the key holds characters that no header takes, or none at all")
        self.url, self.model = url.rstrip("/"), model
        self._key, self._seconds, self._tries, self._first_wait = key, seconds, tries, first_wait
        self._places = asyncio.Semaphore(concurrency)
        self._http: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        self._http = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), headers=headers)
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self._http.close()

    async def ask(
        self,
        messages: list[dict[str, str]],
        *,
        temperature: float,
        top_p: float,
        max_tokens: int,
        extra: dict[str, Any] | None = None,
    ) -> Completion:
        """One completion. ``extra``: more fields of the request's body (``seed``, ``chat_template_kwargs``, ...)."""
        body = {"model": self.model, "messages": messages, "temperature": temperature, "top_p": top_p}
        body |= {"max_tokens": max_tokens} | (extra or {})
        async with self._places:
            for attempt in range(1, self._tries + 1):
                try:
                    return await self._once(body)
                except _Again as error:
                    if attempt == self._tries:
                        raise EndpointFault(f"{self.url}: {error}, {attempt} times") from None
                    wait = min(_LONGEST_WAIT, self._first_wait * 2 ** (attempt - 1)) * random.uniform(0.5, 1.0)
                    await asyncio.sleep(wait if error.after is None else error.after)
            raise AssertionError("unreachable: tries is at least 1")

    async def _once(self, body: dict[str, Any]) -> Completion:
        timeout = aiohttp.ClientTimeout(total=self._seconds)
        path = f"{self.url}/chat/completions"
        try:
            async with self._http.post(path, json=body, timeout=timeout, allow_redirects=False) as answer:
                status, headers, content = answer.status, answer.headers, await _content(answer)
        except TimeoutError:
            raise _Again(f"no answer within {self._seconds:g} s") from None
        except (aiohttp.ClientSSLError, aiohttp.InvalidURL) as error:
            raise Refused(f"{self.url}: {error}") from None
        except (aiohttp.ClientError, OSError) as error:
            raise _Again(self._shown(str(error) or type(error).__name__)) from None
        if status == 200:
            return self._answer(content)
        said = self._shown(content.decode(errors="replace"))
        if status in _AGAIN or status >= 500:
            raise _Again(f"HTTP {status}: {said}", _retry_after(headers.get("Retry-After")))
        if status in (401, 403):
            raise Refused(f"{self.url}: refuses the key (HTTP {status})")
        if status in (402, 404, 405):
            raise Refused(f"{self.url}: model {self.model!r}: HTTP {status}: {said}")
        if 300 <= status < 400:
            raise Refused(f"{self.url}: HTTP {status}: it redirects, which is not followed: give the address it means")
        raise EndpointFault(f"{self.url}: HTTP {status}: {said}")

    def _answer(self, content: bytes) -> Completion:
        try:
            tree = json.loads(content)
            choice = tree["choices"][0]
            message, usage = choice["message"], tree.get("usage") or {}
            reasoning = message.get("reasoning_content") or message.get("reasoning") or ""
            text = message.get("content") or ""
            if not isinstance(text, str) or not isinstance(reasoning, str):
                raise TypeError("content is not text")
            return Completion(
                text,
                reasoning,
                str(choice.get("finish_reason")),
                _count(usage.get("prompt_tokens")),
                _count(usage.get("completion_tokens")),
                str(tree.get("model") or self.model),
            )
        except (ValueError, RecursionError, KeyError, IndexError, TypeError, AttributeError):
            raise _Again(f"answers no completion: {self._shown(content.decode(errors='replace'))}") from None

    def _shown(self, text: str) -> str:
        """On one line, short, and without the key, which some servers quote."""
        text = " ".join((text.replace(self._key, "[key]") if self._key else text).split())
        return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _count(value: Any) -> int | None:
    """What a server says, if it is a number of tokens."""
    return value if type(value) is int and 0 <= value < 2**31 else None


async def _content(answer: aiohttp.ClientResponse) -> bytes:
    content = bytearray()
    async for chunk in answer.content.iter_any():
        content += chunk
        if len(content) > _LONGEST:
            raise aiohttp.ClientPayloadError(f"its answer is longer than {_LONGEST} bytes")
    return bytes(content)


def _retry_after(value: str | None) -> float | None:
    """Seconds that the server asks for: a number, or a date; None where it asks for nothing that can be read."""
    if value is None:
        return None
    try:
        seconds = float(value) if value.strip().isdigit() else parsedate_to_datetime(value).timestamp() - time.time()
    except ValueError:
        return None
    return min(_LONGEST_RETRY_AFTER, max(0.0, seconds))
