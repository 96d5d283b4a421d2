"""Out-of-band status between ranks, in the rendezvous store: heartbeats and the first failure.

Every rank has its own connection, because a main thread that waits in the store blocks the other one. Once the store is
gone (it ends with the launcher, or with rank 0 if no launcher keeps it), a rank keeps what it has read so far.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Self, TypeVar

import torch.distributed as dist

_Answer = TypeVar("_Answer")


@dataclass(frozen=True)
class Heartbeat:
    """A sign of life: the rank's phase, for how many seconds, and its process. ``done``: it ended in order."""

    count: int
    place: str
    seconds: float
    pid: int
    machine: str
    done: bool = False


def this_machine() -> str:
    """Return host name and process-id namespace: if both match, equal process ids mean the same process."""
    return f"{socket.gethostname()}/{os.stat('/proc/self/ns/pid').st_ino}"


class JobStatus:
    """The job's status as one rank sees it. No method waits for another rank. ``usable``: the store still answers."""

    def __init__(self, store: dist.TCPStore, rank: int, world: int):
        # A launcher that keeps its store across restarts counts them. If the store is new each time, launchers may
        # count differently: a restarted one joins others that were not restarted.
        kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        attempt = os.environ["TORCHELASTIC_RESTART_COUNT"] if kept else "0"
        self._store = dist.PrefixStore(f"megatron_dypo/{attempt}", store)
        self._others = [other for other in range(world) if other != rank]
        self._rank = rank
        self._known: set[int] = set()
        self._failure: str | None = None
        self.usable = True

    @classmethod
    def of_this_job(cls) -> Self | None:
        """Open a new connection to the store of the default process group; return None for a single rank."""
        store = dist.distributed_c10d._get_default_store()
        while isinstance(store, dist.PrefixStore):
            store = store.underlying_store
        if dist.get_world_size() == 1 or not isinstance(store, dist.TCPStore):
            return None
        return cls(store.clone(), dist.get_rank(), dist.get_world_size())

    def publish(self, heartbeat: Heartbeat) -> None:
        self._ask(lambda: self._store.set(f"beat/{self._rank}", json.dumps(asdict(heartbeat))), None)

    def heartbeats(self, ranks: Iterable[int] | None = None) -> dict[int, Heartbeat]:
        """Return the latest heartbeat of each of ``ranks`` (default: all others) that has published one."""

        def read() -> dict[int, Heartbeat]:
            wanted = self._others if ranks is None else list(ranks)
            self._known.update(r for r in wanted if r not in self._known and self._store.check([f"beat/{r}"]))
            known = [rank for rank in wanted if rank in self._known]
            texts = self._store.multi_get([f"beat/{rank}" for rank in known]) if known else []
            return {rank: Heartbeat(**json.loads(text)) for rank, text in zip(known, texts, strict=True)}

        return self._ask(read, {})

    def whereabouts(self) -> list[str]:
        """Return one line per other rank: the phase it was last seen in."""
        return [
            f"  rank {rank}: {heartbeat.place} for {heartbeat.seconds:.0f} s"
            for rank, heartbeat in self.heartbeats().items()
        ]

    def claim_failure(self, headline: str) -> str:
        """Return the headline of the rank that failed first: this one, unless another was faster."""
        self._failure = self._failure or self._ask(
            lambda: self._store.compare_set("failure", "", headline).decode(), headline
        )
        return self._failure

    def failure(self) -> str | None:
        """Return the headline of the rank that failed first, or None."""
        self._failure = self._failure or self._ask(
            lambda: self._store.get("failure").decode() if self._store.check(["failure"]) else None, None
        )
        return self._failure

    def ask_for_stacks(self) -> None:
        """Ask every rank to write its stacks."""
        self._ask(lambda: self._store.add("stacks", 1), 0)

    def stacks_asked(self) -> int:
        """Return how often all stacks have been requested."""
        return self._ask(lambda: self._store.add("stacks", 0), 0)

    def _ask(self, question: Callable[[], _Answer], otherwise: _Answer) -> _Answer:
        if not self.usable:
            return otherwise
        try:
            return question()
        except RuntimeError:  # includes torch's DistError
            self.usable = False
            return otherwise
