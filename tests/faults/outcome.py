"""The outcome of a run, compared bit for bit with that of an uninterrupted run."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

import psutil

from tests.launch import checkpoint_digests, metrics, without_times
from tests.ranks import run_ranks


def saved_steps(run_dir: Path) -> list[int]:
    """Return the steps of the folders named as checkpoints, in order."""
    return sorted(int(folder.name.removeprefix("step_")) for folder in run_dir.glob("checkpoints/step_*"))


def written_steps(run_dir: Path) -> int:
    """Return how many training steps are in the metrics."""
    path = run_dir / "metrics.jsonl"
    return max(0, path.read_text().count("\n") - 1) if path.exists() else 0  # without the line of step 0


def first_step(output: str) -> int | None:
    """Return the training step that a launch announced as its first, or None."""
    if found := re.search(r" resumes after step (\d+)$", output, re.MULTILINE):
        return int(found[1]) + 1
    found = re.search(r"^step (\d+)/", output, re.MULTILINE)
    return int(found[1]) if found else None


def assert_on_track(run_dir: Path, reference: Path) -> None:
    """Check that the steps written so far are the reference's, each once (except for a torn last line)."""
    path = run_dir / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    lines = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    assert without_times(lines) == without_times(metrics(reference / "run"))[: len(lines)]


def assert_same_outcome(folder: Path, reference: Path, steps: int, keeps_reference: bool = True) -> None:
    """Check that both folders have the same results in ``run/`` and ``rollouts/``.

    That is the same metrics, rollouts, files, weights, moments, and weights of a reference policy, if it
    ``keeps_reference``.
    """
    lines = metrics(folder / "run")
    assert [line["step"] for line in lines] == list(range(steps + 1)), "steps are missing or doubled"
    assert without_times(lines) == without_times(metrics(reference / "run"))
    for part in ("run", "rollouts"):
        assert _files(folder / part) == _files(reference / part)
    for recorded in (reference / "rollouts").iterdir():
        assert (folder / "rollouts" / recorded.name).read_bytes() == recorded.read_bytes(), recorded.name
    checkpoints = [str(path / "run" / "checkpoints" / f"step_{steps}") for path in (folder, reference)]
    ours, theirs = _digests(checkpoints[0]), _reference_digests(checkpoints[1])
    assert any("exp_avg" in name for name in ours)
    assert any("reference" in name for name in ours) == keeps_reference
    assert ours == theirs
    ours, theirs = (json.loads(Path(path, "state.json").read_text()) for path in checkpoints)
    assert ours == theirs


def reward_workers_of(ranks: list[int]) -> list[int]:
    """Return the process ids of the reward workers that still run for these (ended) ranks."""
    parents = {str(rank) for rank in ranks}
    processes = psutil.process_iter(["cmdline", "status"])
    alive = [process for process in processes if process.info["status"] != psutil.STATUS_ZOMBIE]
    return [
        process.pid
        for process in alive
        if "megatron_dypo.reward.worker_main" in (command := process.info["cmdline"] or []) and command[-1] in parents
    ]


def _digests(checkpoint: str) -> dict[str, str]:
    return run_ranks(1, checkpoint_digests, checkpoint)[0]


_reference_digests = cache(_digests)  # one reference for many comparisons


def _files(folder: Path) -> set[str]:
    """Return all files below ``folder``, except those of an engine."""
    names = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    return {name for name in names if not name.startswith("engine")}
