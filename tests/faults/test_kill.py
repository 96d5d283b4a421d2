"""SIGKILL at any moment, and a restart: the run ends bit for bit as if nothing had happened."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_dypo.objectives.recipes import RECIPES
from tests.faults.kills import Kill, kill_until_done, spread
from tests.faults.outcome import assert_same_outcome, reward_workers_of
from tests.faults.points import Point
from tests.faults.task import STEPS, make_task, reference

POLICY = "megatron_dypo.policy.policy"
ENGINE = "megatron_dypo.rollout.hf_engine:HfEngine"
SAVER = "megatron_dypo.checkpoint.manager"
MAIN = (0,)  # what only rank 0 does

START = [
    Kill(Point("phase policy start")),
    Kill(Point("phase checkpoint load", "after")),
    Kill(Point("open run/fingerprint.json", "after"), MAIN),
    Kill(Point("replace run/metrics.jsonl.tmp"), MAIN),
    Kill(Point("replace run/metrics.jsonl.tmp", "after"), MAIN),
]
STEP = [
    Kill(Point("phase rollout")),
    Kill(Point(f"call {ENGINE}._pick", nth=60)),
    Kill(Point("phase reward")),
    Kill(Point("phase rollout exchange", "after")),
    Kill(Point("open rollouts/step_*", "after"), MAIN),
    Kill(Point("replace rollouts/step_*"), MAIN),
    Kill(Point("replace rollouts/step_*", "after"), MAIN),
    Kill(Point("phase log-prob passes")),
    Kill(Point(f"call {POLICY}:Policy._fill", "after", from_step=8)),
    Kill(Point("call megatron.core.transformer.transformer_layer:TransformerLayer.forward", nth=3)),
    Kill(Point("call megatron.core.pipeline_parallel.schedules:backward_step")),
    Kill(Point(f"call {POLICY}:finalize_model_grads", "after")),
    Kill(Point("phase optimizer step")),
    Kill(Point("call torch.optim.adam:adam")),
    Kill(Point("call torch.optim.adam:adam", "after")),
    Kill(Point("phase optimizer step", "after")),
    Kill(Point(f"call {ENGINE}.sync")),
    Kill(Point("call megatron_dypo.rollout.hf_engine:_target", nth=5)),
    Kill(Point("phase weight sync", "after")),
    Kill(Point("phase evaluation", from_step=5)),
    Kill(Point("phase evaluation", "after", from_step=10)),
    Kill(Point("fsync run/metrics.jsonl"), MAIN),
    Kill(Point("fsync run/metrics.jsonl", "after"), MAIN),
    Kill(Point(f"call {POLICY}:Policy.keep_reference", from_step=8)),
    Kill(Point(f"call {POLICY}:Policy.keep_reference", "after", from_step=15)),
]
SAVE = [
    Kill(Point(f"call {SAVER}:snapshot", "after", from_step=3)),
    Kill(Point("mkdir .partial-step_*", "after"), MAIN),
    Kill(Point("open .partial-step_*.distcp", "after")),
    Kill(Point("call torch:save", "after", nth=20)),
    Kill(Point("fsync .partial-step_*.distcp", "after")),
    Kill(Point(f"call {SAVER}:write_index"), MAIN),
    Kill(Point("open .partial-step_*/.metadata", "after"), MAIN),
    Kill(Point("open .partial-step_*/state.json", "after"), MAIN),
    Kill(Point("open .partial-step_*/manifest.json", "after"), MAIN),
    Kill(Point("replace .partial-step_*"), MAIN),
    # The new checkpoint is already named here, so each of these kills moves the run one save further.
    Kill(Point("replace .partial-step_*", "after", from_step=3), MAIN),
    Kill(Point("replace checkpoints/step_*", from_step=9), MAIN),
    Kill(Point("replace checkpoints/step_*", "after", from_step=12), MAIN),
    Kill(Point("unlink .partial-removed-*", "after", nth=2, from_step=15), MAIN),
]
LAST = [
    Kill(Point("phase evaluation", "after", from_step=STEPS)),
    Kill(Point(f"replace .partial-step_{STEPS}-*", from_step=STEPS), MAIN),
    Kill(Point(f"replace .partial-step_{STEPS}-*", "after", from_step=STEPS), MAIN),
]
FEW = [
    Kill(Point(f"call {ENGINE}._pick", nth=60)),
    Kill(Point("call megatron.core.transformer.transformer_layer:TransformerLayer.forward", nth=3)),
    Kill(Point("call torch.optim.adam:adam", "after")),
    Kill(Point(f"call {ENGINE}.sync")),
    Kill(Point("fsync run/metrics.jsonl", "after"), MAIN),
    Kill(Point("call torch:save", "after", nth=20)),
    Kill(Point("open .partial-step_*/manifest.json", "after"), MAIN),
    Kill(Point("unlink .partial-removed-*", "after", nth=2, from_step=15), MAIN),
    LAST[-1],
]


STATE = "megatron_dypo.checkpoint.state"
BLOCKING = [  # a save that the step itself writes, piece by piece, while the other rank may wait in an exchange
    Kill(Point(f"call {STATE}:_on_host", nth=1)),
    Kill(Point(f"call {STATE}:_on_host", "after", nth=15)),
    Kill(Point(f"call {STATE}:_gather_adam", "after", nth=5)),
    Kill(Point("call torch:save", "after", nth=20)),
    Kill(Point("fsync .partial-step_*.distcp", "after")),
    Kill(Point("open .partial-step_*/manifest.json", "after"), MAIN),
    Kill(Point("replace .partial-step_*"), MAIN),
    Kill(Point("replace .partial-step_*", "after", from_step=6), MAIN),
    LAST[-1],
]


def kill_and_compare(
    references: Path, folder: Path, layout: str, kills: list[Kill], record, undisturbed: str | None = None
) -> None:
    """``undisturbed``: the layout of the run to compare with, where it is another."""
    straight = reference(references, undisturbed or layout)
    ledger = kill_until_done(folder, make_task(folder, layout), kills, straight)
    record(f"{layout}: {ledger}")
    assert_same_outcome(folder, straight, STEPS, keeps_reference=layout not in ("sft", "srft"))
    assert reward_workers_of(ledger.pids) == []


def test_killed_here_and_there(references, tmp_path, fault_record):
    """Short form: make one kill of each kind, and two at random instants, on the run with the most state."""
    kill_and_compare(references, tmp_path, "experts", spread([], FEW, 2, STEPS, seed=1), fault_record)


@pytest.mark.faults
@pytest.mark.parametrize("layout", ["data", "tensor", "pipeline", "distributed", "experts"])
def test_killed_everywhere(references, tmp_path, fault_record, layout):
    """Kill at every named point and as many random instants under plain data parallelism; at a selection elsewhere."""
    seed = random.randrange(2**32)
    fault_record(f"{layout}: seed {seed}")
    kills = spread(START, STEP + SAVE + LAST, 25, STEPS, seed) if layout == "data" else spread([], FEW, 5, STEPS, seed)
    assert layout != "data" or len(kills) >= 50
    kill_and_compare(references, tmp_path, layout, kills, fault_record)


@pytest.mark.faults
def test_killed_while_it_saves_without_a_snapshot_it_ends_as_with_one(references, tmp_path, fault_record):
    """``trainer.save_blocking`` changes neither a checkpoint nor what is resumed from it."""
    kill_and_compare(references, tmp_path, "blocking", spread([], BLOCKING, 2, STEPS, 1), fault_record, "distributed")


@pytest.mark.faults
@pytest.mark.parametrize("method", sorted(RECIPES.keys() - {"dypo"}))
def test_every_recipe_is_resumed_bit_for_bit(references, tmp_path, fault_record, method):
    """Cut the power once of each kind and at random instants; skip sampling if nothing is sampled."""
    seed = random.randrange(2**32)
    fault_record(f"{method}: seed {seed}")
    kills = spread([], FEW if RECIPES[method].samples else FEW[1:], 3, STEPS, seed)
    kills = [replace(kill, power_cut=True) for kill in kills]
    kill_and_compare(references, tmp_path, method, kills, fault_record)
