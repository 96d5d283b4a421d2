"""Teachers behind OpenAI-compatible endpoints: what is sent, retried, refused, recorded, and never sent twice."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import signal
import ssl
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
import yaml
from aiohttp import web

from megatron_dypo.data import rows
from megatron_dypo.dataprep import endpoint as endpoint_module
from megatron_dypo.dataprep.attempts import AttemptFile
from megatron_dypo.dataprep.endpoint import Completion, Endpoint, EndpointFault, Refused
from megatron_dypo.dataprep.options import Options
from megatron_dypo.dataprep.prepare import prepare
from megatron_dypo.dataprep.teachers import Tally, generate, load_teachers
from megatron_dypo.errors import UserError
from tests.loopback_server import LoopbackServer

ROOT = Path(__file__).resolve().parents[1]
TOOL = ROOT / "tools/generate_teacher_traces.py"
KEY = "only-for-these-tests"
Behaviour = Callable[["Imitation", dict, int], Awaitable[Any]]


class Imitation(LoopbackServer):
    """A chat endpoint in its own thread that answers the sum in the prompt. ``asked``: every request's body.

    ``behave(self, body, n)``, for the n-th request with that model and prompt: a dict changes the usual answer's
    message or finish_reason, a response replaces it, None leaves it.
    """

    route = ("POST", "/v1/chat/completions")

    def __init__(self, behave: Behaviour | None = None, tls: ssl.SSLContext | None = None):
        super().__init__(tls=tls)
        self.behave = behave
        self.asked: list[dict] = []
        self.keys: set[str | None] = set()
        self.headers: set[str] = set()
        self.under_way = self.most_under_way = 0

    @property
    def url(self) -> str:
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self.port}/v1"

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        body, self.request = await request.json(), request
        self.keys.add(request.headers.get("Authorization"))
        self.headers |= {name.lower() for name in request.headers}
        self.asked.append(body)
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            said = await self.behave(self, body, self.times(body)) if self.behave else None
        finally:
            self.under_way -= 1
        if isinstance(said, web.StreamResponse):
            return said
        return web.json_response(completion(body, **(said or {})))

    def times(self, body: dict) -> int:
        return sum(asked["messages"] == body["messages"] and asked["model"] == body["model"] for asked in self.asked)


def completion(body: dict, finish_reason: str = "stop", **message: Any) -> dict:
    numbers = body["messages"][-1]["content"].split("What is ")[1].rstrip("?").split("+")
    usual = {"role": "assistant", "content": f"It is \\boxed{{{sum(map(int, numbers))}}}"}
    return {
        "model": f"{body['model']}-0528",
        "choices": [{"message": usual | message, "finish_reason": finish_reason}],
        "usage": {"prompt_tokens": 7, "completion_tokens": 11},
    }


@pytest.fixture(autouse=True)
def key(monkeypatch) -> None:
    monkeypatch.setenv("TEACHER_KEY", KEY)


@pytest.fixture(autouse=True)
def short_waits(monkeypatch) -> None:
    """Shorten the waits between the tries of openai's client, in this process."""
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)


class Task:
    """Prompts ``What is i+1?`` and teachers in files, and repeated runs of the generator on them."""

    def __init__(self, folder: Path, prompts: int, *teachers: dict):
        self.prompts, self.teachers, self.out = folder / "p.jsonl", folder / "teachers.yaml", folder / "traces.jsonl"
        texts = [{"id": f"p{i}", "prompt": f"What is {i}+1?", "ground_truth": str(i + 1)} for i in range(prompts)]
        self.prompts.write_text("".join(json.dumps(text | {"teachers": []}) + "\n" for text in texts))
        self.set_teachers(*teachers)

    def set_teachers(self, *teachers: dict) -> None:
        self.teachers.write_text(yaml.safe_dump({"teachers": list(teachers)}))

    def run(self, attempts: int = 1) -> dict[str, Tally]:
        return generate(str(self.prompts), self.teachers, self.out, attempts=attempts, extract="boxed", workers=1)

    def records(self) -> list[dict]:
        return [json.loads(line) for line in self.out.read_text().splitlines()]

    def command(self, *options: str) -> list[str]:
        files = [str(self.prompts), "--teachers", str(self.teachers), "--out", str(self.out)]
        return [sys.executable, str(TOOL), *files, *options]


def teacher(url: str, name: str = "r1", **settings: Any) -> dict:
    return {"name": name, "url": url, "model": f"{name}-model", "key_env": "TEACHER_KEY"} | settings


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}


# --- what is asked and recorded


def test_two_teachers_answer_and_everything_is_recorded(tmp_path):
    async def think(self: Imitation, body: dict, times: int) -> dict | None:
        return {"reasoning_content": "\nOne more.\n"} if body["model"] == "r1-model" else None

    sampling = {"temperature": 0.7, "top_p": 0.9, "max_tokens": 100, "extra": {"chat_template_kwargs": {"x": True}}}
    with Imitation(think) as server:
        task = Task(tmp_path, 5, teacher(server.url, sampling=sampling), teacher(f"{server.url}/", "qwen"))
        tallies = task.run()
    assert server.keys == {f"Bearer {KEY}"}
    (body,) = [asked for asked in server.asked if asked["messages"][0]["content"] == "What is 3+1?"
               and asked["model"] == "r1-model"]  # fmt: skip
    assert body == {
        "model": "r1-model",
        "messages": [{"role": "user", "content": "What is 3+1?"}],
        "temperature": 0.7,
        "top_p": 0.9,
        "max_tokens": 100,
        "chat_template_kwargs": {"x": True},
    }
    records = task.records()
    assert len(records) == 10 and Counter(record["teacher"] for record in records) == {"r1": 5, "qwen": 5}
    (record,) = [record for record in records if (record["teacher"], record["id"]) == ("r1", "p3")]
    assert record == {
        "id": "p3",
        "prompt": [{"role": "user", "content": "What is 3+1?"}],
        "ground_truth": "4",
        "data_source": "",
        "teacher": "r1",
        "attempt": 1,
        "asked_model": "r1-model",
        "model": "r1-model-0528",
        "sampling": sampling,
        "trace": "<think>\nOne more.\n</think>\n\nIt is \\boxed{4}",
        "finish_reason": "stop",
        "prompt_tokens": 7,
        "completion_tokens": 11,
        "verdict": "right",
        "kept": True,
    }
    assert (tallies["qwen"].verdicts, tallies["qwen"].prompt_tokens, tallies["qwen"].completion_tokens) == (
        {"right": 5},
        35,
        55,
    )
    assert KEY not in task.out.read_text()


def test_traces_become_rows_to_train_on(tmp_path):
    async def sometimes_wrong(self: Imitation, body: dict, times: int) -> dict | None:
        if body["model"] == "r1-model":
            return None
        return {"content": "\\boxed{99}"} if "3+1" in body["messages"][0]["content"] else {"reasoning": "By heart."}

    with Imitation(sometimes_wrong) as server:
        task = Task(tmp_path, 5, teacher(server.url), teacher(server.url, "qwen"))
        task.run()
    for verify in ("grader", "marks"):
        counts = prepare(Options((str(task.out),), verify=verify), tmp_path / "rows.jsonl")
        assert counts["traces: wrong answer"] == 1 and counts["rows written"] == 5
        found = {prompt.id: prompt for prompt in rows.read(str(tmp_path / "rows.jsonl"))}
        assert sorted(entry.name for entry in found["p2"].teachers) == ["qwen", "r1"]
        assert [entry.name for entry in found["p3"].teachers] == ["r1"]
        assert found["p2"].messages == ({"role": "user", "content": "What is 2+1?"},)


def test_attempts_go_on_until_one_verifies(tmp_path):
    async def third_time(self: Imitation, body: dict, times: int) -> dict | None:
        if "0+1" in body["messages"][0]["content"] or times < 3:
            return {"content": "\\boxed{99}"}
        return None

    with Imitation(third_time) as server:
        task = Task(tmp_path, 2, teacher(server.url))
        tallies = task.run(attempts=4)
        verdicts = [(record["id"], record["attempt"], record["kept"]) for record in task.records()]
        assert sorted(verdicts) == [
            *(("p0", attempt, False) for attempt in (1, 2, 3, 4)),
            *(("p1", attempt, attempt == 3) for attempt in (1, 2, 3)),
        ]
        assert tallies["r1"].verdicts == {"wrong": 6, "right": 1}
        task.run(attempts=5)
        assert [record["attempt"] for record in task.records()[7:]] == [5] and len(server.asked) == 8


@pytest.mark.parametrize(
    "message, verdict",
    [
        ({"finish_reason": "length"}, "incomplete"),
        ({"content": "<think>so \\boxed{1}"}, "incomplete"),
        ({"content": None, "reasoning": "It is \\boxed{1}", "finish_reason": "length"}, "incomplete"),
        ({"content": "one"}, "wrong"),
        ({"content": "", "reasoning": ""}, "wrong"),
        ({"content": "\\boxed{1}", "reasoning": "r"}, "right"),
        ({"content": "\ud800 \\boxed{1}"}, "right"),
        ({"content": None, "reasoning": "It is \\boxed{1}"}, "incomplete"),
        ({"content": "<think>so \\boxed{1}</think>"}, "incomplete"),
        ({"content": "<think>a</think><think>a</think>\\boxed{1}"}, "incomplete"),
    ],
)
def test_only_whole_right_answers_are_kept(tmp_path, message, verdict):
    async def answer(*_: Any) -> dict:
        return message

    with Imitation(answer) as server:
        task = Task(tmp_path, 1, teacher(server.url))
        task.run()
    (record,) = task.records()
    assert (record["verdict"], record["kept"]) == (verdict, verdict == "right")


LONG = "First I add one and one, and then I look at what I have."
REPEATED = [
    # content, trace
    (f"<think>\n{LONG}\n</think>\n\n\\boxed{{1}}", f"<think>\n{LONG}\n</think>\n\n\\boxed{{1}}"),
    (f"{LONG}\n</think>\n\n\\boxed{{1}}", f"<think>\n{LONG}\n</think>\n\n\\boxed{{1}}"),
    (f"{LONG}\n\n\\boxed{{1}}", f"<think>\n{LONG}\n</think>\n\n\\boxed{{1}}"),
    (f"[THINK]{LONG}[/THINK]\\boxed{{1}}", f"<think>\n{LONG}\n</think>\n\n\\boxed{{1}}"),
    ("\\boxed{1}<|im_end|>\n", f"<think>\n{LONG}\n</think>\n\n\\boxed{{1}}"),
    ("First, \\boxed{1}", f"<think>\n{LONG}\n</think>\n\nFirst, \\boxed{{1}}"),
]


@pytest.mark.parametrize("content, trace", REPEATED)
def test_a_thought_that_a_server_repeats_in_its_answer_is_kept_once(content, trace):
    assert Completion(content, f"\n{LONG}\n", "stop", None, None, "m").trace == trace


def test_an_answer_that_begins_as_a_short_thought_by_chance_is_kept_whole():
    assert Completion("1 it is: \\boxed{1}", "1", "stop", None, None, "m").trace.endswith(
        "</think>\n\n1 it is: \\boxed{1}"
    )


def test_no_more_requests_at_a_time_than_allowed(tmp_path):
    async def slow(*_: Any) -> None:
        await asyncio.sleep(0.02)

    with Imitation(slow) as server:
        Task(tmp_path, 30, teacher(server.url, concurrency=3)).run()
        assert server.most_under_way == 3 and len(server.asked) == 30


async def ask_ten(url: str) -> None:
    async with Endpoint(url, "m", concurrency=2) as endpoint:
        asked = [{"role": "user", "content": "What is 1+1?"}]
        await asyncio.gather(*(endpoint.ask(asked, temperature=1.0, top_p=1.0, max_tokens=5) for _ in range(10)))


def test_an_endpoint_keeps_to_its_concurrency_whoever_asks():
    async def slow(*_: Any) -> None:
        await asyncio.sleep(0.02)

    with Imitation(slow) as server:
        asyncio.run(ask_ten(server.url))
        assert server.most_under_way == 2 and server.keys == {None}


# --- faults


async def ask(url: str, model: str = "m", key: str | None = KEY, **settings: Any) -> Completion:
    async with Endpoint(url, model, key=key, **settings) as endpoint:
        message = [{"role": "user", "content": "What is 1+1?"}]
        return await endpoint.ask(message, temperature=0.0, top_p=1.0, max_tokens=5)


def failing(fault: Any, times: int = 2) -> Behaviour:
    """Fail with ``fault()`` the first ``times`` times."""

    async def behave(self: Imitation, body: dict, count: int) -> Any:
        return await fault() if count <= times else None

    return behave


async def overloaded() -> web.Response:
    return web.Response(status=429, headers={"Retry-After": "0"})


async def broken() -> web.Response:
    return web.Response(status=503, text="busy")


async def silent() -> None:
    await asyncio.sleep(60)


async def garbage() -> web.Response:
    return web.Response(text="<html>")


async def no_choice() -> web.Response:
    return web.json_response({"choices": [], "error": None})


@pytest.mark.parametrize("fault", [overloaded, broken, silent, garbage, no_choice])
def test_what_may_pass_is_tried_again(fault):
    with Imitation(failing(fault)) as server:
        answer = asyncio.run(ask(server.url, seconds=0.5))
        assert answer == Completion("It is \\boxed{2}", "", "stop", 7, 11, "m-0528") and len(server.asked) == 3


def test_a_lost_connection_is_tried_again():
    async def reset(self: Imitation, body: dict, count: int) -> None:
        if count <= 2:
            for connection in list(self._runner.server.connections):
                connection.transport.abort()

    with Imitation(reset) as server:
        assert asyncio.run(ask(server.url)).text == "It is \\boxed{2}" and len(server.asked) == 3


def test_tries_come_to_an_end():
    with Imitation(failing(broken, 99)) as server:
        with pytest.raises(EndpointFault, match=r"HTTP 503: busy, 4 times") as fault:
            asyncio.run(ask(server.url, tries=4))
        assert not isinstance(fault.value, Refused) and len(server.asked) == 4


def test_a_server_that_nobody_listens_at_is_a_fault_in_time():
    with Imitation() as server:
        url = server.url
    with pytest.raises(EndpointFault, match="2 times"):
        asyncio.run(ask(url, tries=2))


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_waited_for(form):
    async def wait() -> web.Response:
        value = "1" if form == "seconds" else formatdate(time.time() + 2, usegmt=True)  # a date has whole seconds
        return web.Response(status=429, headers={"Retry-After": value})

    with Imitation(failing(wait, 1)) as server:
        start = time.monotonic()
        asyncio.run(ask(server.url))
        assert 0.9 <= time.monotonic() - start < 30


def test_no_server_has_one_waited_for_longer_than_a_limit(monkeypatch):
    """openai's client itself gives up at once where it is to wait for more than two minutes."""
    monkeypatch.setattr(endpoint_module, "_LONGEST_WAIT", 1)

    async def later() -> web.Response:
        return web.Response(status=429, headers={"Retry-After": "86400"})

    with Imitation(failing(later, 1)) as server:
        assert asyncio.run(ask(server.url)).text == "It is \\boxed{2}" and len(server.asked) == 2


def test_an_answer_that_trickles_has_the_deadline_of_a_whole_one():
    async def trickle(self: Imitation, body: dict, count: int) -> web.StreamResponse:
        answer = web.StreamResponse()
        await answer.prepare(self.request)
        for _ in range(100):
            await answer.write(b" ")
            await asyncio.sleep(0.05)
        return answer

    with Imitation(trickle) as server, pytest.raises(EndpointFault, match=r"no answer within 0\.3 s, 2 times"):
        asyncio.run(ask(server.url, tries=2, seconds=0.3))


@pytest.mark.parametrize("key", [KEY, None])
def test_the_environment_adds_nothing_to_a_request(monkeypatch, key):
    """A request uses no OpenAI account or proxy, and says nothing about the machine."""
    for name in ("API_KEY", "ADMIN_KEY", "ORG_ID", "PROJECT_ID", "BASE_URL"):
        monkeypatch.setenv(f"OPENAI_{name}", "http://127.0.0.1:9/mine")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "Authorization: Bearer mine\nX-Mine: mine")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    with Imitation() as server:
        asyncio.run(ask(server.url, key=key))
    assert server.keys == {f"Bearer {key}" if key else None}
    http = {"host", "connection", "user-agent", "accept", "accept-encoding", "content-type", "content-length"}
    assert server.headers - {"authorization"} == http | {"x-stainless-retry-count"}


def test_no_log_at_any_level_holds_the_key(caplog):
    async def quote() -> web.Response:
        return web.Response(status=503, text=f"no such key: {KEY}")

    caplog.set_level(logging.DEBUG)
    for name in ("openai", "httpx2", "httpcore2"):
        caplog.set_level(logging.DEBUG, logger=name)
    with Imitation(failing(quote, 1)) as server:
        asyncio.run(ask(server.url))
    assert any(record.name.startswith("openai") for record in caplog.records) and KEY not in caplog.text


@pytest.mark.parametrize(
    "status, complaint",
    [
        (401, r"refuses the key \(HTTP 401\)"),
        (403, r"refuses the key \(HTTP 403\)"),
        (404, r"model 'm': HTTP 404: your key is \[key\]"),
        (402, "HTTP 402"),
        (307, "HTTP 307: it redirects, which is not followed"),
    ],
)
def test_what_will_not_pass_is_not_tried_again(status, complaint):
    with Imitation() as elsewhere:

        async def refuse() -> web.Response:
            return web.Response(status=status, text=f"your key is {KEY}", headers={"Location": elsewhere.url})

        with Imitation(failing(refuse, 99)) as server, pytest.raises(Refused, match=complaint) as fault:
            asyncio.run(ask(server.url))
        assert len(server.asked) == 1 and not elsewhere.asked and KEY not in str(fault.value)


def test_a_request_at_fault_is_not_tried_again():
    async def too_long() -> web.Response:
        return web.Response(status=400, text=f"prompt too long, {KEY}")

    with Imitation(failing(too_long, 99)) as server:
        with pytest.raises(EndpointFault, match=r"HTTP 400: prompt too long, \[key\]") as fault:
            asyncio.run(ask(server.url))
        assert len(server.asked) == 1 and not isinstance(fault.value, Refused)


def test_an_answer_without_end_is_cut(monkeypatch):
    monkeypatch.setattr(endpoint_module, "_LONGEST", 10)
    with Imitation() as server, pytest.raises(EndpointFault, match="longer than 10 bytes"):
        asyncio.run(ask(server.url, tries=1))


@pytest.fixture(scope="module")
def self_signed(tmp_path_factory) -> ssl.SSLContext:
    folder = tmp_path_factory.mktemp("tls")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=127.0.0.1"]
    try:
        subprocess.run([*command, "-keyout", folder / "key", "-out", folder / "cert"], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("openssl is not there, to make a certificate with")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "cert", folder / "key")
    return context


def test_a_certificate_that_nobody_vouches_for_is_refused_at_once(self_signed, monkeypatch):
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 8.0)
    start = time.monotonic()
    with Imitation(tls=self_signed) as server, pytest.raises(Refused, match="certificate"):
        asyncio.run(ask(server.url, tries=2))
    assert not server.asked and time.monotonic() - start < 5


@pytest.mark.parametrize("url", ["ftp://h/v1", "h/v1", "http://", "http://me:secret@h/v1", "http://h/v1?key=secret"])
def test_unusable_addresses(url):
    with pytest.raises(Refused, match="expected http") as fault:
        Endpoint(url, "m")
    assert "secret" not in str(fault.value)


@pytest.mark.parametrize("key", ["", " a", "a\nX-Other: 1", "ü"])
def test_unusable_keys(key):
    with pytest.raises(Refused, match="the key holds characters that no header takes"):
        Endpoint("http://h/v1", "m", key=key)


@pytest.mark.parametrize("status", [401, 404])
def test_a_refused_teacher_stops_and_the_others_go_on(tmp_path, status):
    async def refuse(self: Imitation, body: dict, times: int) -> web.Response | None:
        return web.Response(status=status, text=f"no {KEY}") if body["model"] == "bad-model" else None

    with Imitation(refuse) as server:
        task = Task(tmp_path, 12, teacher(server.url, "bad", concurrency=2), teacher(server.url))
        result = subprocess.run(task.command(), env=environment(), capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    assert Counter(record["teacher"] for record in task.records()) == {"r1": 12}
    assert sum(asked["model"] == "bad-model" for asked in server.asked) <= 2
    (line,) = [line for line in result.stderr.splitlines() if "bad" in line]
    assert "teacher bad: stopped:" in line and f"HTTP {status}" in line
    assert KEY not in result.stdout + result.stderr + task.out.read_text() and "Traceback" not in result.stderr
    table = " ".join(result.stdout.replace("│", " ").split())
    assert "bad 0 0 0 0 0 0 0 0" in table and "r1 12 12 0 0 0 0 84 132" in table


def test_failed_requests_are_asked_again_by_the_next_run(tmp_path, caplog):
    async def refuse_two(self: Imitation, body: dict, times: int) -> web.Response | None:
        bad = body["messages"][0]["content"] in ("What is 1+1?", "What is 3+1?")
        return web.Response(status=500) if bad and not self.well else None

    with Imitation(refuse_two) as server:
        server.well = False
        task = Task(tmp_path, 5, teacher(server.url, tries=1))
        assert task.run()["r1"].failed == 2 and len(task.records()) == 3
        assert caplog.text.count("teacher r1, prompt p1: ") == 1
        server.well = True
        assert task.run()["r1"].failed == 0
    assert len(server.asked) == 7 and sorted(record["id"] for record in task.records()) == [f"p{i}" for i in range(5)]


def test_a_dead_endpoint_is_given_up(tmp_path):
    with Imitation(failing(broken, 99)) as server:
        tallies = Task(tmp_path, 200, teacher(server.url, tries=1, concurrency=4)).run()
        assert "20 requests in a row failed" in tallies["r1"].stopped and 20 <= len(server.asked) <= 24


# --- resume


def test_killed_it_asks_nothing_twice_that_was_answered(tmp_path):
    async def slow(*_: Any) -> None:
        await asyncio.sleep(0.02)

    with Imitation(slow) as server:
        task = Task(tmp_path, 120, teacher(server.url, concurrency=4), teacher(server.url, "qwen", concurrency=4))
        for lines in (30, 90):
            process = subprocess.Popen(task.command(), env=environment(), stdout=subprocess.DEVNULL)
            while not task.out.exists() or task.out.read_bytes().count(b"\n") < lines:
                assert process.poll() is None
                time.sleep(0.002)
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
        time.sleep(0.2)  # lets the server finish the request that is no longer awaited
        whole = task.out.read_bytes().rpartition(b"\n")[0].splitlines()
        answered = {(record["asked_model"], record["id"]) for record in map(json.loads, whole)}
        before = len(server.asked)
        assert 90 <= len(answered) < 240
        subprocess.run(task.command(), env=environment(), check=True, stdout=subprocess.DEVNULL, timeout=120)
        again = {(asked["model"], f"p{asked['messages'][0]['content'][8:-3]}") for asked in server.asked[before:]}
    assert again.isdisjoint(answered) and len(again) == len(server.asked) - before == 240 - len(answered)
    assert len(server.asked) <= 240 + 2 * 8, "twice asked is only what was under way at a kill"
    records = task.records()
    assert len(records) == 240 and all(record["kept"] for record in records)
    assert len({(record["teacher"], record["id"]) for record in records}) == 240


def test_what_a_kill_left_is_cut_and_graded(tmp_path):
    with Imitation() as server:
        task = Task(tmp_path, 4, teacher(server.url, concurrency=1))
        task.run()
        first, second, third, fourth = task.out.read_bytes().splitlines(keepends=True)
        ungraded = second[: second.index(b'"verdict"')] + b'"verdict": null        , "kept": null }\n'
        assert len(ungraded) == len(second)
        task.out.write_bytes(first + ungraded + third + fourth[:-25] + b" " * 200)
        server.asked.clear()
        tallies = task.run()
        assert [asked["messages"][0]["content"] for asked in server.asked] == ["What is 3+1?"]
    assert task.out.read_bytes() == first + second + third + fourth and tallies["r1"].verdicts == {"right": 4}


def test_answers_under_other_settings_are_not_mixed(tmp_path):
    with Imitation() as server:
        task = Task(tmp_path, 2, teacher(server.url))
        task.run()
        task.set_teachers(teacher(server.url, sampling={"temperature": 1.0}))
        with pytest.raises(UserError, match="teacher r1: --out holds answers of another model or sampling"):
            task.run()
        task.set_teachers(teacher(server.url, "r1-hot", sampling={"temperature": 1.0}))
        assert set(task.run()) == {"r1", "r1-hot"}
        task.prompts.write_text(json.dumps({"id": "p1", "prompt": "What is 7+1?", "ground_truth": "8"}))
        with pytest.raises(UserError, match="prompt p1: --out holds answers to another prompt with this id"):
            task.run()
        assert len(server.asked) == 4


def test_a_file_in_use_or_of_something_else_is_refused(tmp_path):
    with Imitation() as server:
        task = Task(tmp_path, 1, teacher(server.url))
        with AttemptFile(task.out), pytest.raises(UserError, match=r"traces\.jsonl: another run is using"):
            task.run()
        for content in ('{"id": 1}\n', "notes\n", "[]\n"):
            task.out.write_text(content)
            with pytest.raises(UserError, match=r"traces\.jsonl:1: not a record of this tool"):
                task.run()
            assert task.out.read_text() == content and not server.asked


def test_a_full_disk_is_one_line_and_nothing_half(tmp_path, monkeypatch):
    with Imitation() as server:
        task = Task(tmp_path, 3, teacher(server.url, concurrency=1))
        pwrite, left = os.pwrite, [3]

        def full(fd: int, content: bytes, place: int) -> int:
            left[0] -= 1
            if left[0] == 0:
                return pwrite(fd, content[:40], place)
            if left[0] < 0:
                raise OSError(28, "No space left on device")
            return pwrite(fd, content, place)

        monkeypatch.setattr(os, "pwrite", full)
        with pytest.raises(UserError, match=r"traces\.jsonl: cannot be written: No space left on device"):
            task.run()
    assert len(task.records()) == 1


# --- teachers.yaml


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("teachers: []", "teachers: "),
        (
            "teachers: [{name: a, url: 'http://h', model: m, key: secret-1}]",
            r"teachers\.0\.key: .*keys come from the env",
        ),
        ("teachers: [{name: a, url: 'http://h', model: m, key_env: NO_SUCH}]", "variable NO_SUCH is not set"),
        ("teachers: [{name: a, url: 'http://h'}]", r"teachers\.0\.model: "),
        ("teachers: [{name: a, url: u, model: m}, {name: a, url: u, model: m}]", "the name 'a' occurs twice"),
        ("teachers: [{name: a, url: u, model: m, sampling: {temperature: hot}}]", r"0\.sampling\.temperature: "),
        ("teachers: [{name: a, url: u, model: m, sampling: {extra: {x: .nan}}}]", r"0\.sampling\.extra\.x\.float: "),
        ("teachers: {", "not valid YAML"),
    ],
)
def test_malformed_teachers_are_named(tmp_path, text, complaint):
    (tmp_path / "teachers.yaml").write_text(text)
    with pytest.raises(UserError, match=complaint) as fault:
        load_teachers(tmp_path / "teachers.yaml")
    assert "secret-1" not in str(fault.value)


def test_an_unusable_address_stops_its_teacher_alone(tmp_path, caplog):
    with Imitation() as server:
        tallies = Task(tmp_path, 2, teacher("ftp://h", "bad"), teacher(server.url)).run()
    assert "expected http" in tallies["bad"].stopped and tallies["r1"].verdicts == {"right": 2}
    assert [record.levelno for record in caplog.records if "bad" in record.getMessage()] == [logging.ERROR]


# --- docs/data.md


def snippets(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / "docs/data.md").read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("text", snippets("json"))
def test_rows_of_the_docs_are_rows(text):
    row = json.loads(text)
    graded = not row.keys().isdisjoint({"ground_truth", "reward_model"})  # an expert's row need not be
    assert rows.read_row(row, 1, graded=graded).teachers


def test_commands_of_the_docs_run(tmp_path):
    """Run all of them, in order, in one folder; the teachers' address is an imitation's, with any key."""
    (tmp_path / "tools").symlink_to(ROOT / "tools")
    python = Path(sys.executable).parent
    environ = environment() | {"PATH": f"{python}:{os.environ['PATH']}"}
    blocks = snippets("bash")
    assert len(blocks) >= 8

    async def clips(self: Imitation, body: dict, times: int) -> web.Response:
        answer = "\\boxed{72}" if body["model"] == "deepseek-reasoner" or times == 2 else "\\boxed{24}"
        message = {"role": "assistant", "content": answer, "reasoning_content": f"{body['model']}: 48 and 24"}
        return web.json_response({"model": "m", "choices": [{"message": message, "finish_reason": "stop"}]})

    with Imitation(clips) as server:
        (teachers,) = snippets("yaml")
        assert teachers.count("http://127.0.0.1:8000/v1") == 2
        (tmp_path / "teachers.yaml").write_text(teachers.replace("http://127.0.0.1:8000/v1", server.url))
        for block in blocks:
            result = subprocess.run(
                ["bash", "-euc", block], cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=120
            )
            assert result.returncode == 0, block + result.stdout + result.stderr
    assert {prompt.id for prompt in rows.read(str(tmp_path / "merged.jsonl"))} >= {"1"}
    assert not (tmp_path / "clean.jsonl").read_text(), "the evaluation's problem is left out"
    (both,) = rows.read(str(tmp_path / "train.parquet"))
    assert len(both.teachers) == 2
    (prompt,) = rows.read(str(tmp_path / "train.jsonl"))
    assert [entry.name for entry in prompt.teachers] == ["deepseek-r1", "qwen3-235b"]
