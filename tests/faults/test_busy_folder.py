"""A second launch into a busy run folder: refused in one line, and the first goes on unharmed."""

from __future__ import annotations

import os
import signal
from functools import partial

from tests.faults.job import Job
from tests.faults.outcome import assert_on_track
from tests.faults.points import Point, mark
from tests.faults.task import STEPS, make_task, reference
from tests.launch import metrics


def lose_patience() -> None:
    """Shorten the time that a launch gives a killed launcher's ranks to release the folder."""
    from megatron_dypo import run_folder

    run_folder.PATIENCE = 0.5


def test_a_second_launch_is_refused_in_one_line(references, tmp_path):
    config, begun, run_dir = make_task(tmp_path), tmp_path / "begun", tmp_path / "run"
    begins = (Point("phase rollout", from_step=2), partial(mark, begun), (0,))
    starts = (Point("call megatron_dypo.run_folder:claim"), lose_patience, (0,))
    with Job(tmp_path / "first", config, f"trainer.steps={STEPS // 4}", acts=[begins]) as first:
        assert first.wait_for(begun), first.output()
        for pid in first.pids:  # so that it does not end before the second is refused
            os.kill(pid, signal.SIGSTOP)
        with Job(tmp_path / "second", config, acts=[starts]) as second:
            codes = second.wait()
        refusal = f"megatron_dypo: trainer.run_dir: {run_dir} is in use by process {first.pids[0]}"
        assert codes[0] == 2 and second.output().startswith(refusal), (codes, second.output())
        assert second.output().count("\n") == 1
        for pid in first.pids:
            os.kill(pid, signal.SIGCONT)
        assert first.wait() == [0, 0], first.output()
    assert_on_track(run_dir, reference(references))
    assert [line["step"] for line in metrics(run_dir)] == list(range(STEPS // 4 + 1))
