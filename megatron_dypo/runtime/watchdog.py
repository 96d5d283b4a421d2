"""A thread alongside training that ends the job if it hangs, and writes every thread's stack on request.

It ends a phase that outlives its deadline, waits for SIGUSR2 (which every thread of the process blocks, so that it
arrives even while the main thread is stuck in C), and makes sure that a rank is gone soon after the job has failed.
Time is counted in the thread's own ticks, so time spent suspended does not count.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Self

from megatron_dypo.config.schema import Parallel
from megatron_dypo.runtime.distributed import launch_rank
from megatron_dypo.runtime.failure import current_phase, headline, report, say
from megatron_dypo.runtime.heartbeat import HeartbeatThread
from megatron_dypo.runtime.job_status import JobStatus
from megatron_dypo.runtime.process import STACKS_SIGNAL

TICK = 2.0  # seconds
STDERR = 2
LAST_WORDS = 20.0  # seconds that a rank gets to end by itself once the job has failed


class Watchdog:
    """A context manager around the job, entered by every rank's main thread once it has its process group.

    ``reporting()`` reports a failure at once, before clean-up that takes time.
    """

    def __init__(self, parallel: Parallel):
        self._timeout = parallel.timeout
        self._tick = min(TICK, parallel.heartbeat_timeout / 4, parallel.timeout / 4)
        self._job_status = JobStatus.of_this_job()
        self._heartbeats = (
            HeartbeatThread(self._job_status, parallel.heartbeat_timeout, self._tick, self)
            if self._job_status
            else None
        )
        self._ending = threading.Lock()  # never released by the thread that ends the job
        self._stopped = False
        self._failed = False  # on this rank
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        signal.pthread_sigmask(signal.SIG_BLOCK, {STACKS_SIGNAL})
        self._thread.start()

        def pass_on(*_: object) -> None:  # a library's thread that does not block it may receive it
            if (thread := self._thread.ident) is not None:
                signal.pthread_kill(thread, STACKS_SIGNAL)

        self._handler = signal.signal(STACKS_SIGNAL, pass_on)
        if self._heartbeats:
            self._heartbeats.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception):
            self._report(error)
        if self._heartbeats:
            self._heartbeats.stop()
        self._stopped = True  # noticed at the thread's next tick; no need to wait
        signal.signal(STACKS_SIGNAL, self._handler)

    @contextlib.contextmanager
    def reporting(self) -> Iterator[None]:
        """Report an exception as it leaves the block."""
        try:
            yield
        except Exception as error:
            self._report(error)
            raise

    def metrics(self) -> dict[str, float]:
        """Return ``perf/heartbeat_gap``, the longest silence (s) of a rank since the last call; rank 0 of several."""
        return {"perf/heartbeat_gap": self._heartbeats.take_gap()} if self._heartbeats and launch_rank() == 0 else {}

    def write_stacks(self) -> None:
        """Write rank, phase and the stacks of all threads to standard error."""
        say(f"{self._here()}\n{_stacks()}")

    def end(self, rank: int, where: object, why: str, frozen: int | None = None) -> None:
        """End this process, and so the job, because of ``rank``; write headline, phases and stacks of all ranks.

        ``frozen``: descriptor of a process that cannot end by itself.
        """
        self._ending.acquire()
        faulthandler.dump_traceback_later(LAST_WORDS, exit=True, file=STDERR)  # ends the process if the rest hangs
        ours = headline(rank, where, why)
        job_status = self._heartbeats.job_status if self._heartbeats else None
        known = job_status.claim_failure(ours) if job_status else ours
        said = ours if known == ours else f"[rank {launch_rank()}] stops in {current_phase()} because of: {known}"
        say(
            "\n".join(
                [said, *(job_status.whereabouts() if job_status and known == ours else []), self._here(), _stacks()]
            )
        )
        if job_status:
            job_status.ask_for_stacks()
        time.sleep(2 * self._tick)
        if frozen is not None:
            _signal(frozen, signal.SIGABRT)  # a process stuck in C then writes its stacks (faulthandler)
            time.sleep(self._tick / 2)
            _signal(frozen, signal.SIGKILL)
        os._exit(1)

    def _report(self, error: Exception) -> None:
        self._failed = True
        report(error, self._job_status)

    def _watch(self) -> None:
        current, spent, left, before = current_phase(), 0.0, LAST_WORDS, time.monotonic()
        while not self._stopped:
            got = signal.sigtimedwait({STACKS_SIGNAL}, self._tick)
            now = time.monotonic()
            if self._stopped:
                return
            if got and now - before < self._tick:  # Python 3.11 invents later ones if SIGCONT came late
                self.write_stacks()
                if self._heartbeats:
                    self._heartbeats.ask_for_stacks()
            passed, before = min(now - before, 2 * self._tick), time.monotonic()
            here = current_phase()
            current, spent = (here, spent + passed) if here is current else (here, 0.0)
            seconds, key = here.limit or (self._timeout, "parallel.timeout")
            answered = not self._heartbeats or self._heartbeats.answered(passed)
            doomed = self._failed or (self._heartbeats and self._heartbeats.failure)
            left -= passed if doomed else 0.0
            if left <= 0:
                self._leave()
            elif spent > seconds and not doomed:
                self.end(launch_rank(), here, f"not finished within {seconds:g} s ({key})")
            elif not answered:
                why = "no answer from the rendezvous store: the launcher, or the machine of rank 0, is frozen or gone"
                self.end(launch_rank(), here, why)

    def _leave(self) -> None:
        """End this rank: the job has failed and its main thread does not return."""
        self._ending.acquire()
        if self._failed:
            say(f"{self._here()}: clean-up has not ended within {LAST_WORDS:g} s\n{_stacks()}")
        else:
            known = self._heartbeats.failure if self._heartbeats else None
            say(f"[rank {launch_rank()}] stops in {current_phase()} because of: {known}")
        os._exit(1)

    def _here(self) -> str:
        here = current_phase()
        return f"[rank {launch_rank()}] {here} for {time.monotonic() - here.since:.1f} s, process {os.getpid()}"


def _stacks() -> str:
    """Return the stacks of all threads, the calling one first."""
    descriptor = os.memfd_create("stacks")
    with open(descriptor, "w+", encoding="utf-8", errors="replace") as file:
        faulthandler.dump_traceback(descriptor)
        file.seek(0)
        return file.read()


def _signal(process: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(process, number)
