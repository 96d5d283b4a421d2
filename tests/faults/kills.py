"""Kill a run, restart it, and repeat until it is done: where to kill it, and a ledger of the results."""

from __future__ import annotations

import math
import random
import signal
import time
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from tests.faults.job import Job
from tests.faults.outcome import assert_on_track, first_step, saved_steps, written_steps
from tests.faults.points import Point, die, mark
from tests.faults.task import SAVE_EVERY
from tests.launch import metrics

LAST_STEPS = 6  # of a run, without kills
NEXT_STEP = Point("call megatron_dypo.rollout.manager:RolloutManager.batch")


@dataclass(frozen=True)
class Kill:
    """SIGKILL to ``ranks`` at ``point`` or, with ``delay``, N steps' time after ``point.from_step`` began.

    With ``power_cut`` the other ranks die too; otherwise they get torchrun's SIGTERM after a moment.
    """

    point: Point
    ranks: tuple[int, ...] = (0, 1)
    delay: float | None = None
    power_cut: bool = False

    def __str__(self) -> str:
        where = str(self.point) if self.delay is None else f"{self.delay:.2f} steps after a step began"
        return f"{'all' if self.power_cut else self.ranks} {where}"


@dataclass
class Ledger:
    """The results of one run's kills."""

    named: list[Kill] = field(default_factory=list)
    instants: list[Kill] = field(default_factory=list)
    launches: int = 0
    resumes: int = 0  # launches that resumed from the newest checkpoint (or from the start, without one)
    pids: list[int] = field(default_factory=list)

    @property
    def kills(self) -> int:
        return len(self.named) + len(self.instants)

    def __str__(self) -> str:
        points = len({(kill.point.what, kill.point.edge) for kill in self.named})
        at = f"{len(self.named)} at {points} named points, {len(self.instants)} at random instants"
        return f"{self.kills} kills ({at}), {self.launches} launches, {self.resumes} seen to resume"


def spread(start: list[Kill], during: list[Kill], instants: int, steps: int, seed: int) -> list[Kill]:
    """Return these kills and N random instants in random order, dealt evenly over the run's steps.

    ``start`` kills happen during a launch's startup; a kill of ``during`` that names its own first step keeps it. None
    is dealt to the last steps, where a run might end before its kill. The victim is drawn if a kill leaves it open.
    """
    draw = random.Random(seed)
    shuffled = [*start, *(kill for kill in during if not kill.point.from_step)]
    shuffled += [Kill(NEXT_STEP, delay=draw.uniform(0.0, 2.5)) for _ in range(instants)]
    draw.shuffle(shuffled)
    dealt = [(kill.point.from_step, kill) for kill in during if kill.point.from_step]
    for index, kill in enumerate(shuffled):
        step = 1 + index * (steps - LAST_STEPS) // len(shuffled)
        dealt.append((step, kill if kill in start else replace(kill, point=replace(kill.point, from_step=step))))
    return [_draw_ranks(kill, draw) for _, kill in sorted(dealt, key=lambda pair: pair[0])]


def _draw_ranks(kill: Kill, draw: random.Random) -> Kill:
    power_cut = draw.random() < 1 / 3
    ranks = kill.ranks if power_cut or len(kill.ranks) == 1 else (draw.choice(kill.ranks),)
    return replace(kill, power_cut=power_cut, ranks=ranks)


def kill_until_done(folder: Path, config: Path, kills: list[Kill], reference: Path) -> Ledger:
    """Launch once per kill and, at last, until the end; check after each launch that the run is on track."""
    ledger, run_dir = Ledger(), folder / "run"
    durations = [line["time/step"] for line in metrics(reference / "run")[1:]]
    step_time = sum(durations) / len(durations)
    for kill in [*kills, None]:
        before = saved_steps(run_dir)
        codes, output = _launch(folder / f"launch_{ledger.launches}", config, kill, step_time, ledger)
        ledger.launches += 1
        what = f"launch {ledger.launches}, {kill}, after step {before[-1:]}: {codes}\n{output}"
        if kill is None:
            assert codes == [0, 0], what
        else:
            assert -signal.SIGKILL in codes and other_failures(output) == [], what
            (ledger.named if kill.delay is None else ledger.instants).append(kill)
        began = first_step(output)
        if began is not None:
            assert began == (before[-1] if before else 0) + 1, f"not the newest checkpoint: {what}"
            ledger.resumes += 1
        assert_on_track(run_dir, reference)
        assert saved_steps(run_dir)[-1:] >= before[-1:], f"a checkpoint is lost: {what}"
    return ledger


def other_failures(output: str) -> list[str]:
    """Return the headlines of failures not caused by a kill."""
    headlines = [line for line in output.splitlines() if "] failed in " in line]
    return [line for line in headlines if "ended by SIGKILL" not in line and "ended without a message" not in line]


def _launch(folder: Path, config: Path, kill: Kill | None, step_time: float, ledger: Ledger) -> tuple[list[int], str]:
    begun, acts = folder / "begun", []
    if kill is not None:
        acts = [(kill.point, die, kill.ranks) if kill.delay is None else (kill.point, partial(mark, begun), (0,))]
    with Job(folder, config, acts=acts) as job:
        ledger.pids += job.pids
        if kill is not None and kill.delay is not None and job.wait_for(begun):
            _wait(kill, folder.parent / "run", step_time)
            job.kill(*(() if kill.power_cut else kill.ranks))
        codes = job.wait(power_cut=kill is not None and kill.power_cut)
        return codes, job.output()


def _wait(kill: Kill, run_dir: Path, step_time: float) -> None:
    """Wait for the kill's delay, at most until the next save, or many kills would soon move the run to its end."""
    next_step = max(kill.point.from_step, (saved_steps(run_dir) or [0])[-1] + 1)
    next_save = math.ceil(next_step / SAVE_EVERY) * SAVE_EVERY
    deadline = time.monotonic() + kill.delay * step_time
    while time.monotonic() < deadline and written_steps(run_dir) < next_save:
        time.sleep(0.005)
