"""Whole runs as a user starts them: torchrun, real vLLM, real Megatron-Core, two ranks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time

import psutil
import pytest
import yaml

from tests.launch import checkpoint_digests, copy_task, metrics, torchrun, train_here, without_times
from tests.ranks import run_ranks

STEPS = 24


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Return an uninterrupted run with recorded rollouts: (folder, torchrun's result)."""
    folder = tmp_path_factory.mktemp("straight")
    suite = [{"question": f"{word}{digit}=", "answer": f"#### {digit}"} for word in ("a", "b") for digit in range(10)]
    (folder / "gsm8k.jsonl").write_text("\n".join(map(json.dumps, suite)))
    evaluation = {"suites": ["gsm8k"], "data": str(folder), "instruction": None, "temperature": 0.0}
    config = copy_task(
        folder,
        rollout__record=str(folder / "rollouts"),
        logging__wandb="offline",
        **{f"evaluation__{key}": value for key, value in evaluation.items()},
    )
    result = torchrun(2, "train", str(config), WANDB_SILENT="true")
    assert result.returncode == 0, result.stderr
    return folder, result


def test_run_visits_all_regimes_and_learns(straight):
    folder, _ = straight
    lines = metrics(folder / "run")
    assert [line["step"] for line in lines] == list(range(STEPS + 1))
    assert lines[1]["dypo/hard_frac"] == 1.0 and lines[1]["dypo/offline_ratio"] == 1.0
    for regime in ("easy", "mid", "hard"):
        assert any(line[f"dypo/{regime}_frac"] > 0 for line in lines[1:])
    first, last = (sum(line["reward/mean"] for line in part) / 5 for part in (lines[1:6], lines[-5:]))
    assert first < 0.1 and last > 0.25
    assert max(line["rollout/mismatch_max"] or 0 for line in lines[1:] if "rollout/mismatch_max" in line) < 1e-4
    assert all(line["train/skipped_steps"] == 0 for line in lines[1:])


def test_run_folder_holds_what_the_contract_names(straight):
    folder, result = straight
    names = {path.name for path in (folder / "run").iterdir()}
    assert {"config.yaml", "environment.json", "metrics.jsonl", "checkpoints", "report.html", "wandb"} <= names
    assert "held-out greedy accuracy" in result.stdout and str(folder / "run" / "report.html") in result.stdout
    assert "Traceback" not in result.stderr
    resolved = yaml.safe_load((folder / "run" / "config.yaml").read_text())
    assert resolved["objective"]["beta_gal"] == 1.0, "defaults are written out"


def test_evaluate_finds_on_the_checkpoint_what_training_found(straight):
    """Greedily, by the same engine with the same weights: the same share and length."""
    folder, _ = straight
    config, last = str(folder / "config.yaml"), metrics(folder / "run")[-1]
    assert last["eval/gsm8k/pass@1"] > 0.25, "else nothing was learnt that could be measured"
    result = torchrun(2, "evaluate", config, "--suite", "gsm8k", "evaluation.limit=20")
    assert result.returncode == 0, result.stderr
    out = folder / "run" / "evaluation" / f"step_{STEPS}"
    found = json.loads((out / "results.json").read_text())["gsm8k"]
    assert found["figures"]["pass@1"]["value"] == last["eval/gsm8k/pass@1"]
    assert found["response_tokens"] == last["eval/gsm8k/response_tokens"]
    assert f"{found['figures']['pass@1']['value']:.1%} [" in result.stdout and "gsm8k: 20/20 responses" in result.stdout
    assert len((out / "gsm8k.jsonl").read_text().splitlines()) == 21


@pytest.mark.faults
def test_a_resume_with_turns_on_the_device_is_bit_equal(straight, tmp_path):
    """Resumed from its checkpoint of half the steps, now with ``trainer.offload``, it equals the uninterrupted run.

    Metrics, recorded rollouts and weights are bit-equal.
    """
    folder, _ = straight
    for name in ("run", "rollouts"):
        shutil.copytree(folder / name, tmp_path / name)
    shutil.rmtree(tmp_path / f"run/checkpoints/step_{STEPS}")
    for step in range(STEPS // 2 + 1, STEPS + 1):
        (tmp_path / f"rollouts/step_{step:06d}.jsonl").unlink()
    here = [f"trainer.run_dir={tmp_path / 'run'}", f"rollout.record={tmp_path / 'rollouts'}", "logging.wandb=off"]
    result = torchrun(2, "train", str(folder / "config.yaml"), *here, "trainer.offload=true")
    assert result.returncode == 0, result.stderr
    assert f"{tmp_path / 'run'} resumes after step {STEPS // 2}" in result.stdout
    lines = metrics(tmp_path / "run")
    assert all((line["time/offload"] > 0) == (line["step"] > STEPS // 2) for line in lines[1:])
    assert without_times(lines) == without_times(metrics(folder / "run"))
    for step in range(1, STEPS + 1):
        name = f"rollouts/step_{step:06d}.jsonl"
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name
    final = f"run/checkpoints/step_{STEPS}"
    ours, theirs = (run_ranks(1, checkpoint_digests, str(path / final))[0] for path in (tmp_path, folder))
    assert any("exp_avg" in name for name in ours) and any("reference" in name for name in ours)
    assert ours == theirs


def test_replayed_rollouts_train_alike_at_another_layout(straight, tmp_path):
    folder, _ = straight
    layout = ["parallel.tensor=2", "parallel.sequence_parallel=true"]
    overrides = [
        f"rollout.replay={folder / 'rollouts'}",
        "rollout.engine=replay",
        f"trainer.run_dir={tmp_path / 'run'}",
    ]
    config = str(copy_task(tmp_path))
    shutil.copy(folder / "train.jsonl", tmp_path / "train.jsonl")
    run_ranks(2, train_here, config, [*overrides, *layout, "trainer.steps=10", "trainer.save_every=0"])
    for ours, theirs in zip(metrics(tmp_path / "run"), metrics(folder / "run")[1:11], strict=True):
        for name in ("reward/mean", "dypo/offline_ratio", "dypo/mid_frac"):
            assert ours[name] == theirs[name]
        for name in ("loss/total", "train/grad_norm", "grad_share/sft"):
            assert ours[name] == pytest.approx(theirs[name], rel=2e-3, abs=1e-6), (name, ours["step"])


def spoil(folder, target, steps: dict[int, float]) -> None:
    """Copy recorded rollouts, replacing the first reward of some steps."""
    shutil.copytree(folder / "rollouts", target)
    for step, reward in steps.items():
        path = target / f"step_{step:06d}.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        lines[0]["responses"][0]["reward"] = reward
        path.write_text("\n".join(map(json.dumps, lines)))


def test_non_finite_reward_skips_the_step_and_many_in_a_row_stop_the_run(straight, tmp_path):
    folder, _ = straight
    spoil(folder, tmp_path / "spoilt", {2: float("nan"), 4: float("inf"), 5: float("nan"), 6: float("nan")})
    config = str(copy_task(tmp_path))
    overrides = ["rollout.engine=replay", f"rollout.replay={tmp_path / 'spoilt'}", "trainer.max_skipped_steps=2"]
    with pytest.raises(
        AssertionError, match=r"TrainingError: 3 steps in a row were skipped; the last: prompt .*non-finite"
    ):
        run_ranks(2, train_here, config, [*overrides, "trainer.save_every=0"])
    lines = metrics(tmp_path / "run")
    assert [line["train/skipped_steps"] for line in lines] == [0, 1, 1, 2, 3, 4]
    assert "train/grad_norm" not in lines[1] and lines[2]["train/grad_norm"] > 0


@pytest.mark.faults
def test_a_killed_rank_takes_the_job_down(tmp_path):
    config = copy_task(tmp_path, rollout__engine="transformers", trainer__steps=100_000)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = subprocess.Popen(
        [*launcher, "-m", "megatron_dypo", "train", str(config)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    ranks = []
    try:
        wait_for(lambda: (tmp_path / "run" / "metrics.jsonl").exists() and len(metrics(tmp_path / "run")) > 2, 120)
        ranks = [
            child for child in psutil.Process(process.pid).children() if "megatron_dypo" in " ".join(child.cmdline())
        ]
        assert len(ranks) == 2
        ranks[1].kill()
        killed = time.monotonic()
        _, errors = process.communicate(timeout=60)
        assert process.returncode != 0 and time.monotonic() - killed < 60
        assert "SIGKILL" in errors
        wait_for(lambda: not any(rank.is_running() and rank.status() != "zombie" for rank in ranks), 10)
    finally:
        for rank in ranks:
            if rank.is_running():
                rank.kill()
        process.kill()


def wait_for(condition, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.2)
