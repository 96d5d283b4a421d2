"""Damaged checkpoints: the previous one is loaded, the warning names the file, and the run ends as if undamaged."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.job import Job
from tests.faults.outcome import assert_same_outcome, first_step, saved_steps
from tests.faults.points import Point, die
from tests.faults.task import STEPS, make_task, reference


def truncate(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def scramble(path: Path) -> None:
    path.write_bytes(b"\xff" * path.stat().st_size)


def empty(path: Path) -> None:
    path.write_bytes(b"")


FILES = ("__0_0.distcp", "__1_0.distcp", ".metadata", "common.pt", "metadata.json", "state.json", "manifest.json")
FEW = [(truncate, "__1_0.distcp")]  # flipped bits: tests/test_checkpoint.py
MORE = [(damage, name) for damage in (truncate, flip, empty, Path.unlink) for name in FILES]


@pytest.fixture(scope="session")
def stopped(references, tmp_path_factory):
    """Return a run killed in its last step, with the checkpoints of steps 15 and 18."""
    folder = tmp_path_factory.mktemp("stopped")
    stop = (Point("phase rollout", from_step=STEPS), die, (0, 1))
    with Job(folder / "launch", make_task(folder), acts=[stop]) as job:
        assert -9 in job.wait(power_cut=True), job.output()
    assert saved_steps(folder / "run") == [15, 18]
    return folder


def launch_copy(stopped: Path, folder: Path, damage: Callable[[Path], None]) -> Job:
    """Resume a copy of the stopped run in ``folder``, after ``damage`` to that folder's ``run/checkpoints``."""
    for part in ("run", "rollouts"):
        shutil.copytree(stopped / part, folder / part, dirs_exist_ok=True)
    damage(folder / "run" / "checkpoints")
    here = f"trainer.run_dir={folder / 'run'}", f"rollout.record={folder / 'rollouts'}"
    return Job(folder / "launch", stopped / "config.yaml", *here)


def check_fall_back(references: Path, stopped: Path, folder: Path, damage: Callable[[Path], None], name: str) -> None:
    with launch_copy(stopped, folder, lambda checkpoints: damage(checkpoints / "step_18" / name)) as job:
        assert job.wait() == [0, 0], job.output()
    damaged = str(folder / "run" / "checkpoints" / "step_18")
    warnings = [line for line in job.output().splitlines() if line.startswith("WARNING") and damaged in line]
    # A flipped bit of the manifest may leave a valid manifest that some other file does not match.
    assert any(name in line for line in warnings) or (name == "manifest.json" and warnings), job.output()
    assert first_step(job.output()) == 16
    assert_same_outcome(folder, reference(references), STEPS)


@pytest.mark.parametrize(("damage", "name"), FEW)
def test_the_checkpoint_before_a_damaged_one_is_loaded(references, stopped, tmp_path, damage, name):
    check_fall_back(references, stopped, tmp_path, damage, name)


@pytest.mark.faults
@pytest.mark.parametrize(("damage", "name"), [case for case in MORE if case not in FEW])
def test_the_checkpoint_before_a_damaged_one_is_loaded_whatever_the_damage(references, stopped, tmp_path, damage, name):
    check_fall_back(references, stopped, tmp_path, damage, name)


@pytest.mark.parametrize("damage", [scramble, pytest.param(truncate, marks=pytest.mark.faults)])
def test_damage_to_an_older_checkpoint_does_no_harm(stopped, tmp_path, damage):
    with launch_copy(stopped, tmp_path, lambda checkpoints: damage(checkpoints / "step_15" / "state.json")) as job:
        assert job.wait() == [0, 0], job.output()
    assert first_step(job.output()) == 19
    assert saved_steps(tmp_path / "run")[-2:] == [18, 20]


@pytest.mark.parametrize("damage", [flip, pytest.param(truncate, marks=pytest.mark.faults)])
def test_nothing_is_lost_where_all_checkpoints_are_damaged(stopped, tmp_path, damage):
    """Starting over would overwrite what may still be of use: the user decides."""

    def damage_all(checkpoints: Path) -> None:
        for step in (15, 18):
            damage(checkpoints / f"step_{step}" / "__0_0.distcp")
        before.update(contents(tmp_path / "run"))

    before: dict[str, bytes] = {}
    with launch_copy(stopped, tmp_path, damage_all) as job:
        codes = job.wait()
    assert all(codes) and "every checkpoint is damaged" in job.output(), (codes, job.output())
    assert contents(tmp_path / "run") == before


def contents(run_dir: Path) -> dict[str, bytes]:
    """Return the contents of the run's metrics and checkpoints."""
    files = [run_dir / "metrics.jsonl", *(path for path in run_dir.glob("checkpoints/**/*") if path.is_file())]
    return {str(path.relative_to(run_dir)): path.read_bytes() for path in files}
