"""Occupied ports are reported within seconds; launch/servers.sh keeps each server up on its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from benchmarks.servers import free_ports
from megatron_dypo.errors import UserError
from megatron_dypo.rollout import serve
from megatron_dypo.runtime import rendezvous_check
from tests.test_launch import LAUNCH, environment


@contextmanager
def listening(answer: bytes = b"") -> Iterator[int]:
    """Run a program on a port of this machine that answers ``answer`` to anything, or nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    connection.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)  # a thread waiting in accept would hold the port after the close


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.0 400 Bad Request\r\n\r\n"])
def test_a_head_s_port_that_another_program_holds_is_named(answer, monkeypatch):
    monkeypatch.setattr(rendezvous_check, "SECONDS", 1.0)
    with listening(answer) as port, pytest.raises(UserError, match=f"HEAD=127.0.0.1:{port}: another program listens"):
        rendezvous_check.check_rendezvous(f"127.0.0.1:{port}")


def test_a_head_s_port_that_is_free_or_has_the_job_s_store_is_fine():
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    rendezvous_check.check_rendezvous(f"127.0.0.1:{store.port}")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    rendezvous_check.check_rendezvous(f"127.0.0.1:{port}")
    for address in ("host0", "host0:", ":1", "host0:65536", "host0:x"):
        with pytest.raises(UserError, match="not of the form host:port"):
            rendezvous_check.check_rendezvous(address)


def test_a_server_s_port_that_another_program_holds_is_named(monkeypatch):
    with listening() as port, pytest.raises(UserError, match=f"--port: cannot listen at 127.0.0.1:{port}: Address alr"):
        serve._check_port("127.0.0.1", port)
    serve._check_port("127.0.0.1", port)


SERVER = """\
import http.server, pathlib, sys, time
port = int(sys.argv[sys.argv.index("--port") + 1])
starts = pathlib.Path(__file__).parent / f"starts_{port % 2}"
count = len(starts.read_text()) if starts.exists() else 0
starts.write_text("x" * (count + 1))
if port % 2 and ODD:
    sys.exit(ODD)
http.server.SimpleHTTPRequestHandler.log_message = lambda *_: None
http.server.SimpleHTTPRequestHandler.do_GET = lambda self: (self.send_response(200), self.end_headers())
server = http.server.HTTPServer(("127.0.0.1", port), http.server.SimpleHTTPRequestHandler)
(pathlib.Path(__file__).parent / f"pid_{port % 2}").write_text(str(__import__("os").getpid()))
server.serve_forever()
"""


@contextmanager
def servers(folder: Path, odd: int) -> Iterator[tuple[subprocess.Popen, Path]]:
    """Run launch/servers.sh with two imitations; the one at the odd port ends with code ``odd``, unless that is 0."""
    (folder / "server.py").write_text(f"ODD = {odd}\n{SERVER}")
    (folder / "python").write_text(f'#!/bin/sh\nshift 2\nexec {sys.executable} {folder}/server.py "$@"\n')
    (folder / "python").chmod(0o755)
    port = free_ports(2)
    variables = {"PATH": f"{folder}:{os.environ['PATH']}", "PORT": str(port), "SERVERS": "2", "ATTEMPTS": "2"}
    variables |= {"MEGATRON_DYPO_SERVER_TOKEN": "0123456789abcdef", "CUDA_VISIBLE_DEVICES": ""}
    with open(folder / "log", "w") as log:
        script = subprocess.Popen([LAUNCH / "servers.sh", "c.yaml"], env=environment() | variables, stderr=log)
    try:
        yield script, folder / "log"
    finally:
        script.terminate()
        script.wait(20)


def until(condition, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_server_that_dies_early_is_started_again_and_its_neighbour_goes_on(tmp_path):
    with servers(tmp_path, odd=0) as (script, log):
        until(lambda: all((tmp_path / f"pid_{n}").exists() for n in (0, 1)))
        time.sleep(2.5)  # the script checks once per second whether they respond
        first, neighbour = (int((tmp_path / f"pid_{n}").read_text()) for n in (0, 1))
        os.kill(first, signal.SIGKILL)
        until(lambda: (tmp_path / "pid_0").read_text() != str(first))
        assert script.poll() is None and (tmp_path / "starts_1").read_text() == "x"
        os.kill(neighbour, 0)
        said = [line for line in log.read_text().splitlines() if line.startswith("launch/servers.sh: ")]
        assert said == ["launch/servers.sh: server 0 ended with code 137 and is restarted"]


def test_a_server_that_cannot_start_is_given_up_and_its_neighbour_goes_on(tmp_path):
    with servers(tmp_path, odd=2) as (script, log):
        until(lambda: "given up" in log.read_text())
        assert log.read_text() == "launch/servers.sh: server 1 cannot start (exit code 2) and is given up\n"
        assert script.poll() is None and (tmp_path / "starts_1").read_text() == "x", "it said what is wrong"
