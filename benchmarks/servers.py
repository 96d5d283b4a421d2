"""Run rollout servers for a benchmark or a test, as launch/servers.sh starts them, and end all that they started."""

from __future__ import annotations

import http.client
import os
import random
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.machine import ROOT
from megatron_dypo.rollout.server import VARIABLE

SECONDS = 300.0  # to start, on a busy machine


@dataclass
class Servers:
    """Running servers; ``log``: the output of the launcher and its servers."""

    urls: list[str]
    log: Path

    def pids(self) -> list[int]:
        """Return the current servers' pids: a killed server returns as another process."""
        commands = [f"vllm.entrypoints.openai.api_server.*--port {url.rpartition(':')[2]} " for url in self.urls]
        return [pid for command in commands for pid in _pgrep("-f", command)]

    def processes(self) -> list[int]:
        """Return the servers, and the processes they started."""
        found = self.pids()
        for parent in found:
            found += _pgrep("-P", str(parent))
        return found

    def wait(self) -> None:
        """Wait until all of them answer."""
        deadline = time.monotonic() + SECONDS
        while not all(map(_answers, self.urls)):
            if time.monotonic() > deadline:
                raise TimeoutError(f"servers are not up within {SECONDS:g} s:\n{self.log.read_text()[-3000:]}")
            time.sleep(0.5)


def free_ports(count: int) -> int:
    """Return the first of ``count`` neighbouring ports that are free, a multiple of ``count``.

    They lie below the range from which Linux gives ports to connections (32,768 and up), so that none of them is taken
    between this call and the server's start; a random first guess keeps parallel callers apart.
    """
    guesses = range(20_000 - 20_000 % count, 32_000, count)
    for first in random.SystemRandom().sample(guesses, len(guesses)):
        try:
            for port in range(first, first + count):
                socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            continue
        return first
    raise OSError("no free ports")


@contextmanager
def running(config: Path, first: int, count: int, *overrides: str) -> Iterator[Servers]:
    """Run ``count`` servers of a configuration on ports ``first``, ...; this process's environment has their token."""
    os.environ.setdefault(VARIABLE, secrets.token_hex(32))
    environment = os.environ | {
        "SERVERS": str(count),
        "PORT": str(first),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    log = config.with_name("servers.log")
    with log.open("w") as file:
        command = [ROOT / "launch" / "servers.sh", config, *overrides]
        launcher = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
    servers = Servers([f"http://127.0.0.1:{first + i}" for i in range(count)], log)
    try:
        servers.wait()
        yield servers
    finally:
        before = servers.processes()
        launcher.send_signal(signal.SIGTERM)
        launcher.wait(30)
        deadline = time.monotonic() + 20
        while left := [pid for pid in before if _is_running(pid)]:
            if time.monotonic() > deadline:
                raise TimeoutError(f"launch/servers.sh left processes behind: {left}")
            time.sleep(0.2)


def _answers(url: str) -> bool:
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _pgrep(*arguments: str) -> list[int]:
    return [int(pid) for pid in subprocess.run(["pgrep", *arguments], capture_output=True).stdout.split()]


def _is_running(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    try:
        return not re.search(r"State:\s+Z", status.read_text())  # one that its parent has not asked for is gone, too
    except OSError:
        return False
