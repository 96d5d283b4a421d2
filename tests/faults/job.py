"""One launch of a run on forked ranks: the command line as torchrun calls it, supervised as torchrun's agent does."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Self

from tests.faults.points import Point, at
from tests.ranks import Launch

AGENT_INTERVAL = 0.1  # seconds until torchrun's agent notices that a rank has ended
AGENT_PATIENCE = 30.0  # seconds from its SIGTERM to its SIGKILL
Act = tuple[Point, Callable[[], None], tuple[int, ...]]


class Job:
    """The ranks of one launch, as a context manager that leaves none behind.

    ``acts``: actions on given ranks when they reach a point. Their output goes to ``folder/rank_N.log``.
    """

    def __init__(self, folder: Path, config: Path, *overrides: str, world: int = 2, acts: Sequence[Act] = ()):
        folder.mkdir(parents=True)
        self.folder = folder
        command = ["train", str(config), *overrides]
        self._launch = Launch(world, _main, str(folder), command, acts)
        self.ranks = self._launch.ranks

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill()

    def kill(self, *ranks: int) -> None:
        """Send SIGKILL to these ranks (default: all), and wait for their end."""
        for rank in ranks or range(len(self.ranks)):
            self.ranks[rank].kill()
        for rank in ranks or range(len(self.ranks)):
            self.ranks[rank].join(30)

    @property
    def pids(self) -> list[int]:
        return [rank.pid for rank in self.ranks]

    def wait(self, seconds: float = 240, power_cut: bool = False) -> list[int]:
        """Return the exit codes (negative: signals) once all ranks have ended.

        Like torchrun, send SIGTERM after a moment to the ranks left by one that failed; with ``power_cut``, SIGKILL at
        once.
        """
        deadline = time.monotonic() + seconds
        while (running := self._running()) and not any(rank.exitcode for rank in self.ranks):
            assert wait(running, max(0.0, deadline - time.monotonic())), f"no end within {seconds} s:\n{self.output()}"
        if running and power_cut:
            self.kill()
        elif running:
            wait(running, AGENT_INTERVAL)
            for rank in self.ranks:
                rank.terminate()
            deadline = time.monotonic() + AGENT_PATIENCE
            while running := self._running():
                assert wait(running, max(0.0, deadline - time.monotonic())), "ranks do not end by SIGTERM"
        return [rank.exitcode for rank in self.ranks]

    def wait_for(self, path: Path, seconds: float = 240) -> bool:
        """Return whether this file appeared; False if all ranks ended before."""
        deadline = time.monotonic() + seconds
        while not path.exists():
            if not self._running():
                return False
            assert time.monotonic() < deadline, f"no {path.name} within {seconds} s:\n{self.output()}"
            time.sleep(0.005)
        return True

    def output(self) -> str:
        """Return what the ranks have printed so far."""
        return "".join(path.read_text() for path in sorted(self.folder.glob("rank_*.log")))

    def _running(self) -> list[int]:
        return [rank.sentinel for rank in self.ranks if rank.exitcode is None]


def _main(folder: str, command: list[str], acts: Sequence[Act]) -> int:
    rank = int(os.environ["RANK"])
    log = os.open(f"{folder}/rank_{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for standard in (1, 2):
        os.dup2(log, standard)
    import megatron_dypo.trainer  # noqa: F401 - all modules in which a point may lie
    from megatron_dypo.cli import main

    for point, act, ranks in acts:
        if rank in ranks:
            at(point, act)
    return main(command)
