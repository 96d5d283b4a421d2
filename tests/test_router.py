"""Requests to rollout servers: balanced, retried, done once, refused with the server's name.

HTTP is real; the servers imitate vLLM's answers, because a real one cannot be made to have these faults
(tests/test_servers.py has real ones).
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time

import numpy as np
import pytest
from aiohttp import web

from megatron_dypo.errors import TrainingError, UserError
from megatron_dypo.rollout.engine import Request, Sampling
from megatron_dypo.rollout.router import Limits, Router
from megatron_dypo.rollout.server import Server
from megatron_dypo.rollout.server_pool import ServerPool
from tests.rollout_server import EOS, Imitation, set_token

SAMPLING = Sampling(1.0, 1.0, 8, EOS)
REQUESTS = [Request(np.arange(2, 6, dtype=np.int32), seed) for seed in range(40)]
LIMITS = Limits(window=4, server_timeout=1.0, request_timeout=1.0)


@pytest.fixture(autouse=True)
def token(monkeypatch):
    set_token(monkeypatch)


def run(servers: list[Imitation], limits: Limits = LIMITS, lost: dict[str, str] | None = None) -> list[list[int]]:
    """Return the requests' token ids, as sampled by the servers."""
    dispatch = Router([Server(server.url) for server in servers], lost or {}, "default", limits)
    responses = asyncio.run(dispatch.run(REQUESTS, SAMPLING))
    assert all(len(response.ids) == len(response.logprobs) for response in responses)
    return [response.ids.tolist() for response in responses]


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    bodies = [{"sampling_params": {"seed": request.seed, "max_tokens": 8}} for request in REQUESTS]
    return [Imitation().choice(body)["token_ids"] for body in bodies]


def test_a_fast_server_gets_more_and_every_request_is_done_once(expected):
    async def slow(server, path, body):
        if path == "inference/v1/generate":
            await asyncio.sleep(0.3)

    with Imitation() as fast, Imitation(behave=slow) as other:
        assert run([fast, other]) == expected
        done = [server.count("inference/v1/generate") for server in (fast, other)]
    assert sum(done) == len(REQUESTS) and done[0] > 2 * done[1] > 0


@pytest.mark.slow
def test_thousands_of_requests_on_as_many_connections():
    requests = [Request(np.arange(2, 6, dtype=np.int32), seed) for seed in range(3000)]
    limits = Limits(window=512, server_timeout=30.0, request_timeout=60.0)
    with Imitation() as first, Imitation() as second:
        dispatch = Router([Server(first.url), Server(second.url)], {}, "default", limits)
        responses = asyncio.run(dispatch.run(requests, SAMPLING))
        assert first.count("inference/v1/generate") + second.count("inference/v1/generate") == len(requests)
    bodies = ({"sampling_params": {"seed": request.seed, "max_tokens": 8}} for request in requests)
    assert [response.ids.tolist() for response in responses] == [first.choice(body)["token_ids"] for body in bodies]


def answering(value: object, path: str = "inference/v1/generate"):
    async def behave(server, asked, body):
        if asked != path:
            return None
        if isinstance(value, Exception):
            raise value
        return value(server, body) if callable(value) else value

    return behave


def changed(**changes: object):
    """Return a response with other fields than it should have."""
    return answering(lambda server, body: {"choices": [server.choice(body) | changes]})


def with_first_logprob(value: float):
    """Return JSON as Python writes it: NaN is possible."""

    def respond(server: Imitation, body: dict) -> web.Response:
        choice = server.choice(body)
        choice["logprobs"]["content"][0]["logprob"] = value
        return web.Response(text=json.dumps({"choices": [choice]}), content_type="application/json")

    return answering(respond)


async def hang(server, path, body):
    await asyncio.sleep(60)


async def hang_restarted(server, path, body):
    return {"weight_version": "new"} if path == "weight_info" else await asyncio.sleep(60)


BAD = {
    "no JSON": (answering(lambda *_: web.Response(text="<html>bad gateway</html>")), "answers garbage: <html>"),
    "a list": (answering(lambda *_: web.json_response([1])), "answers garbage"),
    "an error": (answering(lambda *_: web.json_response({"error": "no room"}, status=500)), "HTTP 500.*no room"),
    "a refused token": (answering(lambda *_: web.Response(status=401)), "refuses the token"),
    "no choice": (answering({"choices": []}), "no usable response"),
    "no end": (changed(finish_reason="length"), "do not go with finish_reason 'length'"),
    "text for ids": (changed(token_ids="12"), "no usable response"),
    "no experts": (changed(routed_experts=""), "no usable response"),
    "other log-probs": (changed(logprobs={"content": []}), "log-probs belong to other tokens"),
    "no log-prob": (with_first_logprob(float("nan")), "invalid log-prob"),
    "a probability above 1": (with_first_logprob(0.5), "invalid log-prob"),
    "elsewhere": (answering(lambda *_: web.Response(status=307, headers={"Location": "http://a..b:1/"})), "HTTP 307"),
    "other weights": (changed(weight_versions=[{"version": "older"}]), r"weights \['older'\], not 'default'"),
    "two versions": (changed(weight_versions=[{"version": v} for v in ("default", "next")]), "weights"),
    "restarted": (hang_restarted, "serves the weights 'new'"),
    "silent": (hang, "no answer to /.* within 1 s"),
}


def said_by_us(caplog) -> list[str]:
    """Return our log lines, without the imitation's web server, which complains of broken connections."""
    return [record.getMessage() for record in caplog.records if record.name.startswith("megatron_dypo")]


@pytest.mark.parametrize("behave, said", BAD.values(), ids=BAD)
def test_a_bad_server_is_named_and_another_does_its_work(behave, said, expected, caplog):
    async def slowly(server, path, body):  # so that a health check of the other falls into the call
        await asyncio.sleep(0.05)

    with Imitation(behave=slowly) as good, Imitation(behave=behave) as bad, caplog.at_level(logging.WARNING):
        assert run([good, bad]) == expected
        assert good.count("inference/v1/generate") == len(REQUESTS)
    lines = said_by_us(caplog)
    assert lines and all(bad.url in line for line in lines)
    assert re.search(said, "\n".join(lines)), lines


def test_what_vllm_says_for_a_log_prob_that_is_none_arrives_as_none():
    with Imitation(behave=with_first_logprob(-9999.0)) as server:
        dispatch = Router([Server(server.url)], {}, "default", LIMITS)
        (response,) = asyncio.run(dispatch.run(REQUESTS[:1], SAMPLING))
    assert np.isnan(response.logprobs[0]) and np.isfinite(response.logprobs[1:]).all()


def test_a_request_that_nobody_can_serve_is_an_error_and_takes_no_server_down(expected, caplog):
    def fail(seed: int):
        return lambda server, body: (
            web.Response(status=500, text="poison") if body["sampling_params"]["seed"] == seed else None
        )

    with Imitation(behave=answering(fail(7))) as first, Imitation(behave=answering(fail(7))) as second:
        with pytest.raises(TrainingError, match=r"no server sampled request 7 in 3 tries.*poison"):
            run([first, second])
        assert "lost" not in caplog.text
        first.behave = None
        assert run([first, second]) == expected, "one that fails on one server is another's"
        assert "lost" not in caplog.text


def test_a_server_that_ends_in_the_middle_and_one_that_returns(expected, caplog):
    async def slowly(server, path, body):
        await asyncio.sleep(0.2 if path == "inference/v1/generate" else 0)

    with Imitation(behave=slowly) as first, Imitation(behave=slowly) as second:
        asked = Router([Server(first.url), Server(second.url)], {}, "default", LIMITS)

        async def disturbed() -> list:
            sampling = asyncio.create_task(asked.run(REQUESTS, SAMPLING))
            await asyncio.sleep(0.25)
            await asyncio.to_thread(second.stop)
            await asyncio.sleep(0.5)
            await asyncio.to_thread(second.start)  # with its former weights' name: as after a short network failure
            return await sampling

        assert [response.ids.tolist() for response in asyncio.run(disturbed())] == expected
    lines = [record.getMessage() for record in caplog.records]
    assert any("requests reassigned" in line and second.url in line for line in lines), lines
    assert any(line == f"{second.url}: is back" for line in lines), lines


def test_without_a_server_left_the_error_comes_in_time_and_names_them_all():
    with Imitation(behave=hang) as first, Imitation() as second:
        second.stop()
        began = time.monotonic()
        with pytest.raises(TrainingError, match=f"no rollout server is left, 40 .*{first.url}.*{second.url}"):
            run([first, second])
        assert time.monotonic() - began < 10
        second.start()


def test_a_server_that_was_not_synced_is_not_used(expected):
    with Imitation() as first, Imitation() as second:
        assert run([first, second], lost={first.url: "left out of the sync"}) == expected
        assert first.asked == []
        with pytest.raises(TrainingError, match="left out of the sync"):
            run([first], lost={first.url: "left out of the sync"})


def fleet(*servers: Imitation, deadline: float = 2.0) -> ServerPool:
    return ServerPool([Server(server.url) for server in servers], "the model", 1.0, deadline)


def test_a_server_of_another_model_or_with_another_token_is_refused_by_name(monkeypatch):
    with Imitation() as first, Imitation(name="another model") as second:
        with pytest.raises(UserError, match=f"{second.url}: serves 'another model', this run needs 'the model'"):
            fleet(first, second).wait_for_all()
        monkeypatch.setenv("MEGATRON_DYPO_SERVER_TOKEN", "not the one that was agreed on")
        with pytest.raises(UserError, match=f"{first.url}: refuses the token"):
            fleet(first).wait_for_all()


def test_servers_that_do_not_start_are_named_after_the_deadline():
    with Imitation() as first, Imitation() as second:
        second.stop()
        with pytest.raises(UserError, match=rf"1 of 2 are not up within 2 s \(rollout.sync_timeout\): {second.url}"):
            fleet(first, second).wait_for_all()
        second.start()
        fleet(first, second).wait_for_all()


def update(servers: ServerPool, known: str, label: str) -> bool:
    same = servers.refresh(known)
    servers.label = label
    servers.init_weight_transfer_engine({"rank_offset": 1, "world_size": 3})
    servers.start_weight_update()
    servers.update_weights({"tensors": []})
    servers.finish_weight_update()
    servers.resume()
    return same


def test_an_update_reaches_all_servers_in_its_four_phases_and_one_that_fails_is_taken_in_later(caplog):
    async def refuse(server, path, body):
        return web.Response(status=500, text="out of memory") if path == "update_weights" else None

    with Imitation() as first, Imitation() as second:
        both = fleet(first, second)
        assert not update(both, "", "run:0")
        assert (first.label, second.label) == ("run:0", "run:0")
        inits = [body["init_info"] for s in (first, second) for path, body in s.asked if path.startswith("init")]
        assert [init["rank_offset"] for init in inits] == [1, 2], "one group for all servers' workers"
        order = [path for path, _ in first.asked if path not in ("v1/models", "weight_info", "get_world_size")]
        four = ["init_weight_transfer_engine", "start_weight_update", "update_weights", "finish_weight_update"]
        assert order == ["pause", *four, "reset_prefix_cache", "resume"]
        assert update(both, "run:0", "run:1")

        second.behave = refuse
        assert update(both, "run:1", "run:2"), "the same servers at its start"
        assert list(both.lost) == [second.url] and "out of memory" in caplog.text
        assert (first.label, second.label) == ("run:2", "run:1")

        second.behave = None
        assert not update(both, "run:2", "run:3"), "the transfer has to be opened anew"
        assert both.lost == {} and second.label == "run:3" and "rejoined" in caplog.text

        second.stop()
        second.start()
        assert not update(both, "run:3", "run:4"), "the same servers, but one was restarted"


def test_a_server_that_freezes_in_an_update_does_not_hold_up_the_others(caplog):
    async def freeze(server, path, body):
        return await asyncio.sleep(60) if path == "update_weights" else None

    with Imitation() as first, Imitation(behave=freeze) as second:
        both = fleet(first, second, deadline=1.0)
        update(both, "", "run:0")
        assert list(both.lost) == [second.url] and "no answer to /update_weights within 0.5 s" in caplog.text
        assert first.label == "run:0"


def test_a_server_that_answers_nothing_in_an_update_is_left_out_as_soon_as_when_it_samples(caplog):
    frozen = asyncio.Event()

    async def freeze(server, path, body):
        if path == "update_weights":
            frozen.set()
        return await asyncio.sleep(60) if frozen.is_set() else None

    async def slow(server, path, body):
        return await asyncio.sleep(3) if path == "update_weights" else None

    with Imitation(behave=slow) as first, Imitation(behave=freeze) as second:
        both, began = fleet(first, second, deadline=100.0), time.monotonic()
        update(both, "", "run:0")
        assert time.monotonic() - began < 10, "its update may take 50 s, its silence 1 s"
        assert list(both.lost) == [second.url] and "no answer to /v1/models within 1 s" in caplog.text
        assert first.label == "run:0", "slow, but not silent"


def test_a_prefix_cache_that_is_not_reset_stops_the_run():
    stale = Imitation(behave=answering({"success": False}, "reset_prefix_cache"))
    with stale, pytest.raises(TrainingError, match="did not reset its prefix cache"):
        update(fleet(stale), "", "run:0")
