"""A thread that publishes this rank's heartbeat and watches the others'.

Rank 0 watches all ranks, the others watch rank 0. In addition, ranks of one machine see each other's processes end at
once, and can name the one that was killed before torchrun's agent takes them down with it.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch.distributed as dist

from megatron_dypo.runtime.failure import current_phase, headline, say
from megatron_dypo.runtime.job_status import Heartbeat, JobStatus, this_machine

if TYPE_CHECKING:
    from megatron_dypo.runtime.watchdog import Watchdog

_ASKED_TO_END = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # the job is ended on purpose; nothing failed


class _Process(NamedTuple):
    pid: int
    descriptor: int  # a pidfd: readable once the process has ended


class HeartbeatThread:
    """Publishes and watches heartbeats. ``failure``: the headline of the first rank that failed, or None."""

    def __init__(self, job_status: JobStatus, timeout: float, tick: float, watchdog: Watchdog):
        rank, world = dist.get_rank(), dist.get_world_size()
        self.failure: str | None = None
        self._rank = rank
        self._job_status, self._timeout, self._tick, self._watchdog = job_status, timeout, tick, watchdog
        self._watched = {other for other in range(world) if other != rank and 0 in (rank, other)}
        self._neighbours = _ranks_of_this_node(rank, world) - {rank}  # ranks whose process is not known yet
        self._heard: dict[int, Heartbeat] = {}
        self._silence = dict.fromkeys(self._watched, 0.0)
        self._processes: dict[int, _Process] = {}
        self._gap = 0.0
        self._waited = 0.0  # since the store last answered, in the watchdog's ticks
        self._wants_stacks = self._stopping = False
        self._bell = os.eventfd(0)
        self._thread = threading.Thread(target=self._run, name="peers", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Publish that this rank ended in order, if the store still answers."""
        self._stopping = True
        os.eventfd_write(self._bell, 1)
        self._thread.join(2 * self._tick)

    def ask_for_stacks(self) -> None:
        """Make all other ranks write their stacks; returns at once."""
        self._wants_stacks = True
        os.eventfd_write(self._bell, 1)

    def take_gap(self) -> float:
        """Return the longest silence (s) of a watched rank since the last call."""
        gap, self._gap = self._gap, 0.0
        return gap

    def answered(self, passed: float) -> bool:
        """Record that ``passed`` seconds have passed; return False if the store has been silent for the timeout."""
        self._waited += passed
        return not self._job_status.usable or self._waited <= self._timeout

    @property
    def job_status(self) -> JobStatus | None:
        """Return the job's status if the store can be asked without waiting, else None."""
        return self._job_status if self._job_status.usable and self._waited < 3 * self._tick else None

    def _run(self) -> None:
        count, stacks_seen, before = 0, self._job_status.stacks_asked(), time.monotonic()
        while not self._stopping:
            self._publish(count)
            if self._wants_stacks:
                self._wants_stacks = False
                self._job_status.ask_for_stacks()
                stacks_seen += 1  # this rank has written its own
            if (asked := self._job_status.stacks_asked()) > stacks_seen:
                stacks_seen = asked
                self._watchdog.write_stacks()
            self.failure = self._job_status.failure()
            now = time.monotonic()
            self._listen(min(now - before, 2 * self._tick))
            self._waited, before, count = 0.0, now, count + 1
            self._wait_for_an_end()
        self._publish(count, done=True)

    def _publish(self, count: int, done: bool = False) -> None:
        here = current_phase()
        seconds = time.monotonic() - here.since
        self._job_status.publish(Heartbeat(count, str(here), seconds, os.getpid(), this_machine(), done))

    def _listen(self, passed: float) -> None:
        """Update who is alive from the heartbeats published in the ``passed`` seconds since the last call."""
        heartbeats = self._job_status.heartbeats(self._watched | self._neighbours)
        for rank in self._neighbours & heartbeats.keys():
            self._neighbours.remove(rank)
            if heartbeats[rank].machine == this_machine():
                self._open(rank, heartbeats[rank].pid)
        for rank in self._watched & heartbeats.keys():
            moved = heartbeats[rank] != self._heard.get(rank) or heartbeats[rank].done
            self._silence[rank] = 0.0 if moved else self._silence[rank] + passed
            self._gap = max(self._gap, self._silence[rank])
            if self._silence[rank] > self._timeout:
                why = f"no sign of life for {self._silence[rank]:.0f} s (parallel.heartbeat_timeout)"
                frozen = self._processes[rank].descriptor if rank in self._processes else None
                self._watchdog.end(rank, f"{heartbeats[rank].place} (last heard of)", why, frozen)
        self._heard |= heartbeats

    def _open(self, rank: int, pid: int) -> None:
        try:
            self._processes[rank] = _Process(pid, os.pidfd_open(pid))
        except OSError:  # it has just ended, or the kernel (or a container's rules) has no such call
            return

    def _wait_for_an_end(self) -> None:
        """Wait one tick, or until the bell rings; handle processes that have ended."""
        poll = select.poll()
        for descriptor in [self._bell, *(process.descriptor for process in self._processes.values())]:
            poll.register(descriptor, select.POLLIN)
        ready = {descriptor for descriptor, _ in poll.poll(1000 * self._tick)}
        if self._bell in ready:
            os.eventfd_read(self._bell)
        for rank, process in list(self._processes.items()):
            if process.descriptor in ready:
                del self._processes[rank]
                self._ended(rank, process.pid)
                os.close(process.descriptor)

    def _ended(self, rank: int, pid: int) -> None:
        """Report a rank that ended without a message; the lowest rank left on this machine does it for all."""
        status = _exit_status(pid)
        number = 0 if status is None else status & 0x7F
        if status == 0 or number in _ASKED_TO_END or self.failure:
            return
        if number == 0 and self._gave_notice(rank):
            return
        # torchrun's agent polls every 0.1 s and is about to end this rank too, so report before asking the store.
        ours = headline(rank, f"{self._heard[rank].place} (last heard of)", _cause(status))
        if self._rank < min(self._processes, default=self._rank + 1):
            say(ours)
        self.failure = self._job_status.claim_failure(ours)

    def _gave_notice(self, rank: int) -> bool:
        """Return whether the rank ended in order or reported its failure (the message may take a moment to arrive)."""
        time.sleep(0.5)
        heartbeat = self._job_status.heartbeats([rank]).get(rank)
        return heartbeat is None or heartbeat.done or self._job_status.failure() is not None


def _ranks_of_this_node(rank: int, world: int) -> set[int]:
    """Return the ranks started by this launcher; torchrun numbers a node's ranks consecutively."""
    first = rank - int(os.environ.get("LOCAL_RANK", rank))
    return set(range(first, min(world, first + int(os.environ.get("LOCAL_WORLD_SIZE", world)))))


def _exit_status(pid: int) -> int | None:
    """Return the wait status of a process that its parent has not reaped yet, else None."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return int(fields[-1])


def _cause(status: int | None) -> str:
    if status is None:
        return "ended without a message (killed, or out of memory)"
    number = status & 0x7F
    if number == 0:
        return f"ended with exit code {status >> 8} and no message"
    hint = " (killed by hand, or out of memory)" if number == signal.SIGKILL else ""
    return f"ended by {signal.Signals(number).name}{hint}"
