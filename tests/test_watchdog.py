"""Hangs, deaths and lags are found, named and ended: real ranks, real signals, and torchrun where it matters."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from benchmarks.servers import free_ports
from megatron_dypo import run_folder
from megatron_dypo.config.schema import Parallel
from megatron_dypo.errors import UserError
from megatron_dypo.runtime.measure import StepTimer
from megatron_dypo.runtime.watchdog import TICK
from tests.faults.job import Job
from tests.faults.points import Point
from tests.launch import copy_task, metrics
from tests.ranks import Launch

REPOSITORY = Path(__file__).resolve().parents[1]
HELD_GIL = 5  # seconds
TOLD = 2 * TICK + 1  # seconds: within a tick a rank publishes its new phase, within another the others read it


def task(folder: Path, **overrides: object) -> Path:
    defaults = {"rollout__engine": "transformers", "trainer__save_every": 0, "trainer__eval_every": 0}
    return copy_task(folder, **defaults | overrides)


def wait_for(condition, seconds: float = 60, every: float = 0.1) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(every)


# --- what happens to a rank


def plant() -> None:
    raise ValueError("planted\nsecond line")


def die() -> None:
    time.sleep(TOLD)
    os.kill(os.getpid(), signal.SIGKILL)


def hang() -> None:
    time.sleep(1000)


def freeze() -> None:
    time.sleep(TOLD)
    os.kill(os.getpid(), signal.SIGSTOP)


def hold_the_gil() -> None:
    """Block like a deadlock in C code: no thread of this process runs any Python."""
    time.sleep(TOLD)
    ctypes.PyDLL(None).sleep(1000)


def hold_the_gil_for_a_while() -> None:
    ctypes.PyDLL(None).sleep(HELD_GIL)


def hurry() -> None:
    """Give a rank that cannot end by itself less time than in production."""
    from megatron_dypo.runtime import watchdog

    watchdog.LAST_WORDS = 3.0


def act_in(phase: str, act, rank: int, step: int = 2):
    return Point(f"phase {phase}", from_step=step), act, (rank,)


START = Point("call megatron_dypo.trainer:train")


def log(job: Job, rank: int) -> list[str]:
    """Return what a rank printed about failures: from its first line that begins with a rank's name."""
    lines = (job.folder / f"rank_{rank}.log").read_text().splitlines()
    first = next((i for i, line in enumerate(lines) if line.startswith("[rank ")), len(lines))
    return lines[first:]


def has_ended(process: psutil.Process) -> bool:
    """Return whether it is gone, or only waits to be reaped."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def since_last_step(folder: Path) -> float:
    """Return the seconds since the last step."""
    return time.time() - (folder / "run/metrics.jsonl").stat().st_mtime


# --- a rank that hangs


def test_a_frozen_rank_0_is_named_and_ended(tmp_path):
    """Any other rank: tests/faults/test_frozen.py."""
    config = task(tmp_path, parallel__heartbeat_timeout=4)
    with Job(tmp_path / "job", config, acts=[act_in("update", freeze, 0)]) as job:
        assert job.wait()[0] == -signal.SIGKILL
        assert since_last_step(tmp_path) < 60
        told = log(job, 1)
    assert told[0].startswith("[rank 0] failed in phase 'update' of step 2 (last heard of): no sign of life")
    assert told[0].endswith("(parallel.heartbeat_timeout)")
    assert told[1].startswith("  rank 0: phase 'update' of step 2 for ")
    assert told[2].startswith("[rank 1] phase '") and " of step 2 for " in told[2]
    assert any("training/step.py" in line for line in told[3:])


def test_a_rank_stuck_in_c_code_shows_where(tmp_path):
    config = task(tmp_path, parallel__heartbeat_timeout=4)
    with Job(tmp_path / "job", config, acts=[act_in("reward", hold_the_gil, rank=1)]) as job:
        job.wait()
        assert log(job, 0)[0].startswith("[rank 1] failed in phase 'reward' of step 2 (last heard of): no sign of life")
        stuck = (tmp_path / "job/rank_1.log").read_text()
    assert "Fatal Python error: Aborted" in stuck and "in hold_the_gil" in stuck


def test_a_phase_past_its_deadline_ends_the_job_with_the_stacks_of_all_ranks(tmp_path):
    config = task(tmp_path, rollout__sync_timeout=3.0)
    act = (Point("call megatron_dypo.rollout.hf_engine:HfEngine.sync", from_step=2), hang, (1,))
    with Job(tmp_path / "job", config, acts=[act]) as job:
        assert 1 in job.wait()
        late, waiting = log(job, 1), log(job, 0)
    assert late[0] == "[rank 1] failed in phase 'weight sync' of step 2: not finished within 3 s (rollout.sync_timeout)"
    assert late[1].startswith("  rank 0: phase ")
    assert any(line.endswith("in hang") for line in late)
    assert waiting[0].startswith("[rank 0] phase ") and " of step " in waiting[0]
    assert any("megatron_dypo/trainer.py" in line for line in waiting)


# --- one rank, closely


def in_phases(log: str, timeout: float, *seconds: float) -> None:
    """One rank spends ``seconds`` in consecutive phases, inside another phase."""
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
    from megatron_dypo.runtime import distributed
    from megatron_dypo.runtime.failure import begin_step, phase
    from megatron_dypo.runtime.watchdog import Watchdog

    distributed.init(Parallel(timeout=60.0))
    with Watchdog(Parallel(timeout=timeout)):
        begin_step(4)
        with phase("outer"):
            for part in seconds:
                with phase("inner"):
                    time.sleep(part)
                time.sleep(part)


def test_one_rank_alone_has_deadlines_too(tmp_path):
    launch = Launch(1, in_phases, str(tmp_path / "log"), 2.0, 60.0)
    rank = launch.ranks[0]
    rank.join(180)
    assert rank.exitcode == 1
    told = (tmp_path / "log").read_text()
    assert told.startswith("[rank 0] failed in phase 'inner' of step 4: not finished within 2 s (parallel.timeout)\n")
    assert "in in_phases" in told


def test_every_change_of_phase_starts_the_clock_anew(tmp_path):
    launch = Launch(1, in_phases, str(tmp_path / "log"), 2.0, 1.2, 1.2)
    rank = launch.ranks[0]
    rank.join(180)
    assert (rank.exitcode, (tmp_path / "log").read_text()) == (0, "")


def test_time_spent_suspended_does_not_count(tmp_path):
    launch = Launch(1, in_phases, str(tmp_path / "log"), 3.0, 1.5)
    rank = launch.ranks[0]
    wait_for((tmp_path / "log").exists)
    time.sleep(1.0)
    os.kill(rank.pid, signal.SIGSTOP)
    time.sleep(5.0)
    os.kill(rank.pid, signal.SIGCONT)
    rank.join(180)
    assert (rank.exitcode, (tmp_path / "log").read_text()) == (0, "")


def keep_the_store_and_freeze(log: str, port: int) -> None:
    """Two ranks; the rendezvous store is in rank 0, which freezes while rank 1 computes."""
    os.environ.update(TORCHELASTIC_USE_AGENT_STORE="False", MASTER_PORT=str(port))
    os.dup2(os.open(f"{log}_{os.environ['RANK']}", os.O_WRONLY | os.O_CREAT), 2)
    from megatron_dypo.runtime import distributed
    from megatron_dypo.runtime.failure import phase
    from megatron_dypo.runtime.watchdog import Watchdog

    layout = distributed.init(Parallel(timeout=60.0))
    with Watchdog(Parallel(heartbeat_timeout=4.0)), phase("rollout"):
        if layout.rank == 0:
            freeze()
        hang()


def test_a_frozen_store_is_no_reason_to_wait(tmp_path):
    launch = Launch(2, keep_the_store_and_freeze, str(tmp_path / "log"), free_ports(1))
    launch.ranks[1].join(180)
    launch.ranks[0].kill()
    assert launch.ranks[1].exitcode == 1
    told = (tmp_path / "log_1").read_text()
    assert told.startswith("[rank 1] failed in phase 'rollout': no answer from the rendezvous store: ")
    assert "in hang" in told


# --- a rank that fails or dies


def test_without_a_launcher_that_ends_them_ranks_follow_a_failed_one(tmp_path):
    """Rank 1 fails and its clean-up hangs, while rank 0 hangs elsewhere; there is no signal."""
    acts = [
        (START, hurry, (0, 1)),
        act_in("rollout", plant, 1),
        act_in("rollout exchange", hang, 0),
        (Point("call megatron_dypo.monitor.monitor:Monitor.__exit__"), hang, (1,)),
    ]
    with Job(tmp_path / "job", task(tmp_path), acts=acts) as job:
        for rank in job.ranks:
            rank.join(180)
        assert [rank.exitcode for rank in job.ranks] == [1, 1]
        failed, led = log(job, 1), log(job, 0)
    assert failed[0] == "[rank 1] failed in phase 'rollout' of step 2: ValueError: planted"
    assert "clean-up has not ended within 3 s" in "\n".join(failed)
    assert led == [f"[rank 0] stops in phase 'rollout exchange' of step 2 because of: {failed[0]}"]


def test_a_folder_for_recordings_that_cannot_be_ends_the_job_before_training(tmp_path):
    """Only rank 0 would write there; rank 1, waiting for it, reports rank 0's error instead of its own."""
    (tmp_path / "taken").write_text("a file where a folder is wanted")
    config = task(tmp_path, rollout__record=str(tmp_path / "taken"))
    with Job(tmp_path / "job", config, acts=[(START, hurry, (0, 1))]) as job:
        for rank in job.ranks:
            rank.join(180)
        assert [rank.exitcode for rank in job.ranks] == [1, 1]
        failed, led = log(job, 0), log(job, 1)
    assert failed[0].startswith("[rank 0] failed in phase ") and ": FileExistsError: " in failed[0]
    assert led[0].startswith("[rank 1] stops in phase ") and led[0].endswith(f" because of: {failed[0]}")
    assert len(led) == 1, "no trace of its own"
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_a_killed_rank_is_named_by_the_survivor(tmp_path):
    with Job(tmp_path / "job", task(tmp_path), acts=[act_in("update", die, 1)]) as job:
        for rank in job.ranks:
            rank.join(180)
        assert [rank.exitcode for rank in job.ranks] == [1, -signal.SIGKILL]
        told = log(job, 0)
    assert told[0].startswith("[rank 1] failed in phase ") and " of step " in told[0]
    assert told[0].endswith(("ended by SIGKILL (killed by hand, or out of memory)", "(killed, or out of memory)"))
    assert told[1].startswith("[rank 0] stops in phase ") and told[1].endswith(told[0])
    assert len(told) == 2, "no traces of broken connections"


def be_refused() -> None:
    raise UserError("data: unusable\nhere")


def test_a_user_error_that_only_one_rank_meets_is_said_once(tmp_path):
    acts = [(START, hurry, (0, 1)), (Point("phase policy start"), be_refused, (1,))]
    with Job(tmp_path / "job", task(tmp_path), acts=acts) as job:
        for rank in job.ranks:
            rank.join(180)
        assert [rank.exitcode for rank in job.ranks] == [1, 2]
        assert log(job, 1) == []
        assert (tmp_path / "job/rank_1.log").read_text().endswith("megatron_dypo: data: unusable here\n")
        (led,) = log(job, 0)
    assert led.endswith(" because of: [rank 1] failed in phase 'policy start': UserError: data: unusable")


def test_a_rank_whose_launcher_is_gone_ends_at_once():
    port = free_ports(1)
    launcher = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "3", "PYTHONPATH": str(REPOSITORY)}
    launcher |= {"TORCHELASTIC_RUN_ID": "gone", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    command = [sys.executable, "-c", "from megatron_dypo.runtime.process import setup_process; setup_process()"]
    orphan = subprocess.run(command, env=os.environ | launcher, capture_output=True, text=True, timeout=60)
    assert orphan.returncode == 1
    assert orphan.stderr.startswith(f"[rank 3] failed in phase 'start': no launcher at 127.0.0.1:{port}: ")


# --- a rank that lags


def test_stragglers_and_missed_heartbeats_are_in_the_metrics(tmp_path):
    acts = [act_in("rollout", hold_the_gil_for_a_while, 1)]
    with Job(tmp_path / "job", task(tmp_path, trainer__steps=3), acts=acts) as job:
        assert job.wait() == [0, 0]
        assert log(job, 0) == log(job, 1) == [], "a slow rank is no failure"
    lines = metrics(tmp_path / "run")
    assert all(1.0 <= line["perf/rollout_imbalance"] <= 2.0 for line in lines)
    assert lines[1]["perf/straggler_rank"] == 1 and lines[1]["perf/rollout_imbalance"] > 1.5
    assert lines[1]["perf/heartbeat_gap"] > HELD_GIL / 5, "0 where no beat is missed"


def test_imbalance_is_the_slowest_over_the_mean():
    clock = StepTimer()
    clock.compare([1.0, 4.0, 1.0])
    assert clock.metrics()["perf/straggler_rank"] == 1
    assert clock.metrics()["perf/rollout_imbalance"] == 2.0
    alone = StepTimer()
    alone.compare([1.0])
    assert not any(name.startswith("perf/") for name in alone.metrics())


# --- the run folder's lock


def test_a_folder_whose_ranks_are_about_to_end_is_waited_for(tmp_path):
    first = run_folder.claim(tmp_path)
    threading.Timer(1.0, first.close).start()
    began = time.monotonic()
    run_folder.claim(tmp_path).close()
    assert 0.9 < time.monotonic() - began < run_folder.PATIENCE


def test_a_folder_that_stays_in_use_is_refused_after_a_while(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "PATIENCE", 1.0)
    with run_folder.claim(tmp_path):
        began = time.monotonic()
        with pytest.raises(UserError, match=f"is in use by process {os.getpid()} on "):
            run_folder.claim(tmp_path)
        assert time.monotonic() - began > 1.0


# --- under torchrun


class Launched:
    """torchrun on 2 ranks, with the output of ranks and agent in ``stderr``."""

    def __init__(self, folder: Path, *command: str, backend: str = "loopback", endpoint: str = "localhost"):
        path = [str(REPOSITORY), str(folder / "installed")]
        build = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", path[1]]
        (folder / "installed").mkdir()
        subprocess.run(build, cwd=REPOSITORY, check=True, capture_output=True)  # torchrun reads its entry points
        self.stderr = folder / "stderr"
        self.seen: list[psutil.Process] = []
        with self.stderr.open("w") as stderr:
            rendezvous = ["--rdzv-backend", backend, "--rdzv-endpoint", endpoint]
            self.agent = subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", *rendezvous, "--nproc-per-node", "2", *command],
                env=os.environ | {"OMP_NUM_THREADS": "1", "WANDB_SILENT": "true", "PYTHONPATH": ":".join(path)},
                cwd=folder,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
            )

    def processes(self) -> list[psutil.Process]:
        """Return the agent's descendants; remembered, in case they outlive it."""
        self.seen = psutil.Process(self.agent.pid).children(recursive=True)
        return self.seen

    def ranks(self) -> list[psutil.Process]:
        """Return the two ranks, in order."""
        children = psutil.Process(self.agent.pid).children()
        return sorted(children, key=lambda child: int(child.environ()["RANK"]))

    def end(self) -> None:
        if self.agent.poll() is None:
            self.processes()
        self.agent.kill()
        self.agent.wait()
        for process in self.seen:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


LOOP = " in train\n"  # the phase of every rank's main thread


@pytest.fixture(scope="module")
def running(tmp_path_factory) -> Iterator[tuple[Path, Launched]]:
    """Return an endless run with all its helper processes: (folder, launch)."""
    folder = tmp_path_factory.mktemp("running")
    config = task(folder, trainer__steps=100_000, logging__wandb="offline")
    launched = Launched(folder, "-m", "megatron_dypo", "train", str(config))
    try:
        wait_for(lambda: (folder / "run/metrics.jsonl").exists() and len(metrics(folder / "run")) > 2, 180)
        yield folder, launched
    finally:
        launched.end()


def test_nothing_listens_beyond_loopback(running):
    _, launched = running
    own = {launched.agent.pid, *(process.pid for process in launched.processes())}
    listening = [
        (connection.pid, connection.laddr.ip)
        for connection in psutil.net_connections("inet")
        if connection.pid in own and connection.status == psutil.CONN_LISTEN
    ]
    assert {pid for pid, _ in listening} >= {launched.agent.pid, *(rank.pid for rank in launched.ranks())}
    assert {ip for _, ip in listening} <= {"127.0.0.1", "::1"}


@pytest.mark.parametrize(
    ("here", "everywhere", "expected"),
    [("2", "2", ("lo", "eth7")), ("2", "4", (None, "eth7")), ("1", "1", ("lo", "eth7"))],
)
def test_ranks_of_one_machine_stay_on_loopback_unless_told_otherwise(monkeypatch, here, everywhere, expected):
    from megatron_dypo.runtime.distributed import stay_on_loopback

    for name in ("GLOO_SOCKET_IFNAME", "VLLM_HOST_IP"):
        monkeypatch.setenv(name, "")  # so that both are restored
        monkeypatch.delenv(name)
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth7")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", here)
    monkeypatch.setenv("WORLD_SIZE", everywhere)
    stay_on_loopback()
    assert (os.environ.get("GLOO_SOCKET_IFNAME"), os.environ["NCCL_SOCKET_IFNAME"]) == expected
    assert os.environ.get("VLLM_HOST_IP") == ("127.0.0.1" if expected[0] else None)


def test_sigusr2_to_any_rank_shows_the_stacks_of_all(running):
    _, launched = running
    before = launched.stderr.read_text()
    assert "[rank " not in before
    for rank in launched.ranks():
        seen = launched.stderr.read_text().count(LOOP)
        rank.send_signal(signal.SIGUSR2)
        wait_for(lambda seen=seen: launched.stderr.read_text().count(LOOP) == seen + 2, 20)
    told = launched.stderr.read_text().removeprefix(before).splitlines()
    headers = [line for line in told if line.startswith("[rank ")]
    assert [line[:8] for line in headers] == ["[rank 0]", "[rank 1]", "[rank 1]", "[rank 0]"]
    assert all(" phase '" in line and " of step " in line and ", process " in line for line in headers)
    assert not any(map(has_ended, launched.ranks()))


def test_everything_ends_with_a_killed_launcher_and_the_folder_is_free(running):
    """The last test of this launch."""
    folder, launched = running
    processes = launched.processes()
    names = " ".join(" ".join(process.cmdline()) for process in processes)
    assert "wandb-core" in names and "megatron_dypo.reward.worker_main" in names
    launched.agent.kill()
    run_folder.claim(folder / "run").close()
    wait_for(lambda: all(map(has_ended, processes)), 10)


def test_under_torchrun_the_first_line_names_the_rank_that_failed(tmp_path):
    script = tmp_path / "failing.py"
    script.write_text(
        "import os, megatron_dypo.trainer\n"
        "from megatron_dypo.cli import script\n"
        "from tests.faults.points import at\n"
        "from tests.test_watchdog import act_in, plant\n"
        "if os.environ['RANK'] == '1':\n"
        "    at(*act_in('update', plant, 1)[:2])\n"
        "script()\n"
    )
    launched = Launched(tmp_path, str(script), "train", str(task(tmp_path)), backend="c10d", endpoint="localhost:0")
    try:
        assert launched.agent.wait(240) == 1
    finally:
        launched.end()
    assert since_last_step(tmp_path) < 60
    told = launched.stderr.read_text()
    first = next(line for line in told.splitlines() if "[rank" in line or "Error" in line or "Traceback" in line)
    assert first == "[rank 1] failed in phase 'update' of step 2: ValueError: planted"
    assert "second line" in told and "in plant" in told
