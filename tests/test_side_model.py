"""A second model alongside the policy: it learns, a resume is bit-equal with both, and it is exported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megatron_dypo.config import load_config
from megatron_dypo.convert.import_export import export_folder
from megatron_dypo.errors import UserError
from megatron_dypo.training.side_model import side_config
from tests.batches import make_config
from tests.launch import checkpoint_digests, copy_task, metrics, train_here, without_times
from tests.ranks import run_ranks

STEPS, HALF = 6, 3
PRIME = {
    "objective__method": "prime",
    "objective__kl_coef": 0.0,
    "objective__teachers_per_prompt": 1,
    "objective__updates_per_rollout": 2,
    "objective__aggregation": "token_mean",
    "side__lr": 1e-3,
    "rollout__engine": "transformers",
    "rollout__temperature": 1.0,
    "data__valid": None,
    "reward__function": "tests.test_side_model:half_right",
    "trainer__steps": STEPS,
    "trainer__save_every": HALF,
    "trainer__eval_every": 0,
}


def half_right(data_source, solution_str, ground_truth, extra_info) -> float:
    """Return a reward that an untrained policy gets now and then: for an even number of characters."""
    return float(len(solution_str) % 2 == 0)


def prime_task(folder: Path, **overrides: object) -> Path:
    return copy_task(folder, **PRIME | overrides)


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    """Return the folder of an uninterrupted run on one rank."""
    folder = tmp_path_factory.mktemp("prime")
    run_ranks(1, train_here, str(prime_task(folder)), [])
    return folder


def test_the_second_model_learns_and_gives_each_token_its_advantage(straight):
    lines = metrics(straight / "run")[1:]
    trained = [line for line in lines if "side/loss" in line]
    assert len(trained) >= HALF and any(line["loss/grpo"] != 0 for line in trained)
    assert all(line["side/grad_norm"] > 0 and line["train/skipped_steps"] == 0 for line in trained)
    assert trained[0]["side/loss"] == pytest.approx(0.6931, abs=0.05)  # log 2: it starts as the reference


def resumed_digests(straight: Path, folder: Path) -> dict[str, str]:
    """Resume a run at half its steps, on one rank, and return the digests of its last checkpoint.

    Metrics and checkpoint must equal the uninterrupted run's.
    """
    shutil.copytree(straight / "run", folder / "run")
    shutil.rmtree(folder / f"run/checkpoints/step_{STEPS}")
    run_ranks(1, train_here, str(straight / "config.yaml"), [f"trainer.run_dir={folder / 'run'}"])
    assert without_times(metrics(folder / "run")) == without_times(metrics(straight / "run"))
    ours, theirs = (
        run_ranks(1, checkpoint_digests, str(each / f"run/checkpoints/step_{STEPS}"))[0] for each in (folder, straight)
    )
    assert ours == theirs
    return ours


def test_a_resume_is_bit_equal_in_both_models_and_their_moments(straight, tmp_path):
    ours = resumed_digests(straight, tmp_path)
    moments = [name for name in ours if name.startswith("side.optimizer.state.exp_avg_sq.")]
    assert moments and len(moments) == len([name for name in ours if name.startswith("optimizer.state.exp_avg_sq.")])
    sides = {name.removeprefix("side."): digest for name, digest in ours.items() if name.startswith("side.decoder")}
    assert any(ours[name] != digest for name, digest in sides.items()), "two models, not one"


def test_the_second_model_s_routers_choose_for_themselves():
    """Another model does not replay the policy's choices, just as the reference does not."""
    config = make_config("qwen3_moe", objective={"method": "prime"}, policy={"routing_replay": "old"})
    assert side_config(config).policy.routing_replay == "off" and config.policy.routing_replay == "old"


def exported(checkpoint: str, out: str, side: bool) -> dict[str, str]:
    import hashlib

    from safetensors.torch import load_file

    export_folder(Path(checkpoint), Path(out), None, None, 10**9, side)
    tensors = load_file(Path(out) / "model.safetensors")
    return {name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in tensors.items()}


def test_either_model_is_exported_to_a_hugging_face_folder(straight, tmp_path):
    checkpoint = str(straight / f"run/checkpoints/step_{STEPS}")
    policy, side = (run_ranks(1, exported, checkpoint, str(tmp_path / str(it)), it)[0] for it in (False, True))
    assert policy.keys() == side.keys() and policy != side
    stored = run_ranks(1, checkpoint_digests, checkpoint)[0]
    assert side["model.norm.weight"] == stored["side.decoder.final_layernorm.weight"]
    assert json.loads((tmp_path / "True/config.json").read_text())["vocab_size"]


def test_a_checkpoint_without_a_second_model_is_refused_by_name(straight, tmp_path):
    run_ranks(
        1,
        train_here,
        str(prime_task(tmp_path, objective__method="grpo", trainer__steps=1, trainer__save_every=1, side__lr=1e-6)),
        [],
    )
    with pytest.raises(AssertionError, match="holds no second model"):
        run_ranks(1, exported, str(tmp_path / "run/checkpoints/step_1"), str(tmp_path / "out"), True)


@pytest.mark.parametrize(
    ("overrides", "about"),
    [
        ({"objective__method": "grpo"}, "side.lr: 0.001 is not read with objective.method: grpo"),
        ({"rollout__samples_per_prompt": 1}, "rollout.samples_per_prompt"),
        ({"objective__easy_min_solved": 6}, "objective.easy_min_solved: 6 leaves no Mid group"),
        ({"objective__easy_min_solved": 1}, "objective.easy_min_solved: 1 leaves no Mid group"),
        ({"objective__ratio_level": "sequence"}, "objective.ratio_level: sequence is not read with"),
    ],
)
def test_keys_that_do_not_fit_are_one_line(tmp_path, overrides, about):
    with pytest.raises(UserError, match=about) as caught:
        load_config(prime_task(tmp_path, **overrides))
    assert "\n" not in str(caught.value)
