"""PPO's critic: its loss and values, resuming with both models' moments, and the Hugging Face folder and back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_dypo.config import load_config
from megatron_dypo.config.schema import Parallel
from megatron_dypo.convert.import_export import export_folder, import_folder
from megatron_dypo.errors import UserError
from megatron_dypo.objectives.value_loss import ValueStreams, value_loss
from tests.launch import checkpoint_digests, metrics, train_here
from tests.ranks import run_ranks
from tests.test_side_model import HALF, STEPS, prime_task, resumed_digests

PPO = {
    "objective__method": "ppo",
    "objective__updates_per_rollout": 2,
    "objective__kl_in_reward": 0.05,
    "objective__gae_lambda": 0.95,
    "side__updates": 3,
}


def ppo_task(folder: Path, **overrides: object) -> Path:
    return prime_task(folder, **PPO | overrides)


def doubles(seed: int, n: int = 200) -> torch.Tensor:
    return torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("clip", [None, 0.3])
def test_a_value_s_slope_is_the_derivative_of_its_loss(clip):
    values_N, old_N, returns_N, weight_N = doubles(0), doubles(1), doubles(2), doubles(3).abs()
    h = 1e-6
    above, below = (value_loss(values_N + d, old_N, returns_N, weight_N, clip)[0] for d in (h, -h))
    _, slope_N = value_loss(values_N, old_N, returns_N, weight_N, clip)
    torch.testing.assert_close(slope_N, (above - below) / (2 * h), rtol=1e-6, atol=1e-8)
    attached_N = values_N.clone().requires_grad_()
    streams = ValueStreams(old_N, returns_N, weight_N, clip)
    streams.loss(attached_N).backward()
    torch.testing.assert_close(attached_N.grad, slope_N, rtol=1e-12, atol=0)
    assert (streams.clipped > 0) == (clip is not None)


def test_the_clip_holds_a_value_on_its_way_to_the_return_and_not_on_its_way_back():
    """With old value 0, return 1 and clip 0.2, moving past 0.2 gains nothing; below -0.2 the loss still pulls back."""
    values_N, zero_N = torch.tensor([0.1, 0.5, -0.5]), torch.zeros(3)
    summands_N, slope_N = value_loss(values_N, zero_N, zero_N + 1, zero_N + 1, 0.2)
    torch.testing.assert_close(slope_N, torch.tensor([-0.9, 0.0, -1.5]))
    torch.testing.assert_close(summands_N, torch.tensor([0.405, 0.32, 1.125]))


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    """Return the folder of an uninterrupted run on one rank."""
    folder = tmp_path_factory.mktemp("ppo")
    run_ranks(1, train_here, str(ppo_task(folder)), [])
    return folder


def test_the_critic_learns_the_returns_and_gives_each_token_its_advantage(straight):
    lines = metrics(straight / "run")
    assert len(lines) == STEPS and all(line["train/skipped_steps"] == 0 for line in lines)
    assert all(line["side/grad_norm"] > 0 and line["loss/grpo"] != 0 for line in lines)
    assert abs(lines[0]["side/value_mean"]) < 0.3 and lines[0]["side/explained_variance"] < 0.1, "a fresh head"
    assert lines[-1]["side/loss"] < lines[0]["side/loss"]
    assert all(0 <= line["side/clip_frac"] < 1 for line in lines)


def test_a_resume_is_bit_equal_in_policy_and_critic(straight, tmp_path):
    ours = resumed_digests(straight, tmp_path)
    head = [
        f"side.{kind}output_layer.weight" for kind in ("", "optimizer.state.exp_avg.", "optimizer.state.exp_avg_sq.")
    ]
    assert ours.keys() >= set(head)
    first = run_ranks(1, checkpoint_digests, str(straight / f"run/checkpoints/step_{HALF}"))[0]
    assert all(first[name] != ours[name] for name in head), "it learns"


def values_of(checkpoint: str, config: str, ids: list[int]) -> list[float]:
    """Return the critic's values of all tokens of a text but the last, loaded by mcore itself."""
    from megatron_dypo.checkpoint.catalog import SIDE
    from megatron_dypo.checkpoint.state import restore
    from megatron_dypo.models.shape import model_shape
    from megatron_dypo.models.sharding import random_weights
    from megatron_dypo.policy.critic import Critic
    from megatron_dypo.policy.micro_batch import MicroBatch
    from megatron_dypo.records import Kind, Sequence
    from megatron_dypo.runtime import distributed
    from megatron_dypo.training.side_model import side_config

    own = side_config(load_config(config))
    layout, shape = distributed.init(own.parallel), model_shape(own.model).critic
    critic = Critic(own, shape, layout, random_weights(shape, 7))
    restore(critic, Path(checkpoint), SIDE)
    sequence = Sequence(np.array(ids, np.int32), 1, Kind.ROLLOUT, 0, 0)
    (values_N,) = critic.values([MicroBatch.pack([sequence], [0], 1.0, **layout.packing)])
    return values_N.tolist()


def test_an_exported_critic_is_transformers_token_classification_and_comes_back_bit_equal(straight, tmp_path):
    from safetensors.torch import load_file
    from transformers import AutoModelForTokenClassification

    checkpoint, ids = straight / f"run/checkpoints/step_{STEPS}", [5, 9, 3, 7, 11, 4]
    there, imported, again = tmp_path / "hf", tmp_path / "imported", tmp_path / "again"
    run_ranks(1, export_folder, checkpoint, there, None, None, 10**9, True)
    model = AutoModelForTokenClassification.from_pretrained(there, torch_dtype=torch.float32).eval()
    assert type(model).__name__ == "LlamaForTokenClassification" and model.config.num_labels == 1
    with torch.no_grad():
        theirs_N = model(torch.tensor([ids])).logits[0, :-1, 0]
    (ours,) = run_ranks(1, values_of, str(checkpoint), str(straight / "config.yaml"), ids)
    assert theirs_N.abs().max() > 1e-2
    torch.testing.assert_close(torch.tensor(ours), theirs_N, rtol=1e-4, atol=1e-5)
    run_ranks(1, import_folder, str(there), imported, Parallel(), None, False)
    run_ranks(1, export_folder, imported, again, None, None, 10**9)
    first, second = (load_file(folder / "model.safetensors") for folder in (there, again))
    assert first.keys() == second.keys() >= {"score.weight", "score.bias"}
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (there / "config.json").read_bytes() == (again / "config.json").read_bytes()
    assert not first["score.bias"].any() and "lm_head.weight" not in first


def test_a_critic_s_folder_is_no_policy_s_and_its_bias_is_0(straight, tmp_path):
    from safetensors.torch import load_file, save_file

    there = tmp_path / "hf"
    run_ranks(1, export_folder, straight / f"run/checkpoints/step_{STEPS}", there, None, None, 10**9, True)
    from megatron_dypo.config.schema import Model
    from megatron_dypo.models.shape import model_shape

    with pytest.raises(UserError, match="a critic, whose value head gives no log-probs"):
        model_shape(Model(hf=str(there)))
    tensors = load_file(there / "model.safetensors")
    save_file(tensors | {"score.bias": torch.tensor([0.5])}, there / "model.safetensors")
    with pytest.raises(AssertionError, match=r"score.bias: 0.5, but a value head has no bias here"):
        run_ranks(1, import_folder, str(there), tmp_path / "out", Parallel(), None, False)


@pytest.mark.parametrize(
    ("overrides", "about"),
    [
        ({"side__updates": 9}, "side.updates: 9 mini-batches cannot be cut from data.prompts_per_step: 8"),
        (
            {"objective__method": "prime", "objective__kl_in_reward": 0.0, "objective__gae_lambda": 1.0},
            "side.updates: 3 is not read with objective.method: prime",
        ),
        (
            {"objective__method": "grpo", "side__lr": 1e-6, "side__updates": 1},
            "objective.gae_lambda: 0.95 is not read with objective.method: grpo, only with objective.method: ppo",
        ),
        ({"side__schedule": "cosine"}, "side.schedule_steps: needed by side.schedule: cosine"),
        ({"side__betas": [0.9, 1.0]}, r"side.betas: \[0.9, 1.0\] must lie in \[0, 1\)"),
        ({"objective__value_clip": 0}, "objective.value_clip"),
        ({"objective__advantage_std": "none"}, "objective.advantage_std: none is not read with"),
    ],
)
def test_keys_that_do_not_fit_are_one_line(tmp_path, overrides, about):
    with pytest.raises(UserError, match=about) as caught:
        load_config(ppo_task(tmp_path, **overrides))
    assert "\n" not in str(caught.value)
