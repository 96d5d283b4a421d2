"""CHORD: the share of experts by step, their rows in files and steps, and whole runs with both.

What a run should have trained on is computed by hand from its files; its losses are compared with the objective's page
in test_objectives.py and test_update_gradient.py, across layouts in test_recipe_layouts.py.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from megatron_dypo.checkpoint.catalog import step_folder
from megatron_dypo.config.schema import Data, Mix, Objective
from megatron_dypo.data.dataset import batch_indices
from megatron_dypo.data.experts import load_experts, usable
from megatron_dypo.data.tokenizer import Tokenizer, arithmetic_backend
from megatron_dypo.errors import UserError
from megatron_dypo.objectives.recipes import shares
from megatron_dypo.objectives.schedule import mu
from megatron_dypo.records import Kind, Prompt, Regime, Teacher
from megatron_dypo.runtime.distributed import Layout
from megatron_dypo.training.metrics import batch_metrics
from megatron_dypo.training.minibatch import build_minibatches
from tests.batches import for_recipe, make_config, make_experts, make_groups, trace_ids
from tests.launch import checkpoint_digests, copy_task, metrics, train_here, without_times
from tests.ranks import run_ranks
from tests.test_training import build, weights_of

# --- the share

CORNERS = [  # (warmup, decay, peak, valley), {step: mu} by hand
    ((0, 0, 0.9, 0.1), {0: 0.1, 1: 0.1, 9: 0.1}),
    ((4, 0, 0.8, 0.1), {0: 0.0, 1: 0.2, 3: 0.6, 4: 0.1, 5: 0.1}),
    ((0, 4, 0.9, 0.1), {0: 0.9, 2: 0.5, 4: 0.1, 5: 0.1, 10**6: 0.1}),
    ((2, 4, 0.6, 0.2), {0: 0.0, 1: 0.3, 2: 0.6, 4: 0.4, 6: 0.2, 7: 0.2}),
    ((2, 2, 0.2, 1.0), {1: 0.1, 2: 0.2, 3: 0.6, 4: 1.0}),
]


@pytest.mark.parametrize(("mix", "expected"), CORNERS)
def test_the_experts_share_is_a_line_up_half_a_cosine_down_and_then_the_valley(mix, expected):
    schedule = Mix(**dict(zip(("warmup", "decay", "peak", "valley"), mix, strict=True)))
    assert {step: mu(schedule, step) for step in expected} == pytest.approx(expected, rel=1e-12)


@given(st.integers(0, 50), st.integers(0, 50), st.floats(0, 1), st.floats(0, 1), st.integers(0, 200))
def test_the_two_shares_are_shares_of_one_loss(warmup, decay, peak, valley, step):
    objective = Objective(method="chord", mix=Mix(warmup=warmup, decay=decay, peak=peak, valley=valley))
    share = shares(objective, step)
    assert share.keys() == {"grpo", "expert"} and all(0 <= value <= 1 + 1e-15 for value in share.values())
    assert sum(share.values()) == pytest.approx(1, rel=1e-15)


# --- the file


def rows_file(folder: Path, *rows: dict) -> str:
    path = folder / "experts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def taught(prompt: str, *traces: str, **fields: str) -> dict:
    return {"prompt": prompt, "teachers": [{"name": "t", "trace": trace} for trace in traces]} | fields


def test_every_trace_of_a_file_is_one_sequence_once_and_needs_no_answer(tmp_path):
    rows = (
        taught("a", "1", "2", id="both"),
        taught("b", "3", ground_truth="9"),
        taught("a", "2", "4"),
        {"prompt": [{"role": "user", "content": "c"}], "target": [{"role": "assistant", "content": "5"}]},
    )
    pairs = load_experts(Data(train="none", experts=rows_file(tmp_path, *rows)), [])
    assert [(pair.id, [teacher.trace for teacher in pair.teachers], pair.ground_truth) for pair in pairs] == [
        ("experts:both:0", ["1"], ""),
        ("experts:both:1", ["2"], ""),
        ("experts:row-2", ["3"], ""),
        ("experts:row-3:1", ["4"], ""),
        ("experts:row-4", ["5"], ""),
    ]


def test_what_is_held_out_is_not_imitated(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    path = rows_file(tmp_path, taught("a", "1", "2"), taught("b", "3"))
    (pair,) = load_experts(Data(train="none", experts=path), [Prompt("v", "1", (), text="a")])
    assert pair.text == "b" and "2 traces of prompts in data.valid left out" in caplog.text


@pytest.mark.parametrize("row", [taught("b"), {"prompt": "b"}, taught("b") | {"teachers": None}])
def test_a_row_without_a_trace_is_named_or_left_out_and_counted(tmp_path, caplog, row):
    path = rows_file(tmp_path, taught("a", "1"), row)
    with pytest.raises(UserError, match=rf"^data\.experts: {path}: row-2 has no trace to imitate"):
        load_experts(Data(train="none", experts=path), [])
    assert len(load_experts(Data(train="none", experts=path, skip_bad_rows=True), [])) == 1
    assert "1 rows without a trace left out, of 2" in caplog.text


def test_what_is_too_long_is_left_out_and_counted_and_too_few_are_refused(tmp_path, caplog):
    backend = arithmetic_backend()
    tokenizer = Tokenizer(backend, backend.eos_token_id)
    experts = [Prompt(f"{n}", "", (Teacher("t", "1" * n),), text="2" * n) for n in (1, 2, 3, 4)]
    data = Data(train="none", experts="file", experts_per_step=2)
    kept = usable(experts, tokenizer, data, lambda prompt: 7 - prompt)  # n + n + 1 tokens, including the end token
    assert [expert.id for expert in kept] == ["1", "2", "3"] and "1 of 4 traces left out: too long" in caplog.text
    with pytest.raises(UserError, match=r"file has 1 traces to train on, fewer than data\.experts_per_step: 2"):
        usable(experts, tokenizer, data, lambda prompt: 3 - prompt)


@given(st.integers(1, 6), st.integers(0, 20), st.integers(0, 5))
def test_experts_have_an_order_of_their_own_that_a_step_alone_decides(per_step, more, seed):
    count = per_step + more
    steps = range(1, 2 * (count // per_step) + 1)
    order = {step: batch_indices(step, per_step, count, seed, "experts") for step in reversed(steps)}
    first = [row for step in steps[: len(steps) // 2] for row in order[step]]
    assert len(set(first)) == len(first) == count // per_step * per_step
    if count > 10:
        assert order != {step: batch_indices(step, per_step, count, seed) for step in steps}


# --- the update


def test_every_mini_batch_has_its_part_of_the_experts_at_their_own_temperature():
    objective = {"method": "chord", "updates_per_rollout": 3, "kl_coef": 0.1}
    config = make_config(objective=objective)
    groups = for_recipe(make_groups() + make_experts(7), config.objective)
    parts = build_minibatches(Layout(), groups, config, trace_ids)
    assert [sum(group.expert for group in part.groups) for part in parts] == [3, 2, 2]
    assert [sum(not group.expert for group in part.groups) for part in parts] == [4, 4, 4]
    assert [group.prompt.id for part in parts for group in part.groups if group.expert] == [f"x0-{i}" for i in range(7)]
    for part in parts:
        kinds = [sequence.kind for sequence in part.sequences]
        assert kinds.count(Kind.EXPERT) == sum(group.expert for group in part.groups) and Kind.TEACHER not in kinds
        for batch in part.batches:
            temperatures = {part.sequences[place].kind == Kind.ROLLOUT for place in batch.places}
            wanted = {0.8 if is_rollout else 1.0 for is_rollout in temperatures}
            assert {round(x, 6) for x in batch.temperature_N.tolist()} == wanted


def test_experts_are_not_among_the_prompts_of_any_statistic():
    config = make_config(objective={"method": "chord"})
    groups = for_recipe(make_groups(), config.objective)
    ordinary = [group for group in groups if not group.expert]
    with_experts, without = (
        batch_metrics(ordinary, build_minibatches(Layout(), each, config, trace_ids), config.objective)
        for each in (groups, ordinary)
    )
    differing = {name for name in with_experts if with_experts[name] != without[name]}
    assert differing == {"tokens", "source_share/rollout", "source_share/expert"}
    tokens = sum(len(trace_ids(group, 0)) for group in groups if group.expert)
    assert tokens and with_experts["tokens"] - without["tokens"] == tokens
    assert with_experts["dypo/offline_ratio"] == 0.0
    alone = [group for group in groups if group.expert]
    trained = batch_metrics(ordinary, build_minibatches(Layout(), alone, config, trace_ids), config.objective)
    assert trained["dypo/offline_ratio"] is None and trained["source_share/expert"] == 1, "no prompt was trained on"


def one_update(tied: bool, step: int, objective: dict) -> dict:
    """Make one update of ``step`` on a forked rank; ``tied``: on prompts without an advantage, and experts."""
    from megatron_dypo.training.step import StepContext, update_policy

    config, policy = build({}, objective={"method": "chord", "kl_coef": 0.0} | objective)
    groups = make_groups()
    if tied:
        groups = [group for group in groups if group.regime != Regime.MID]
    before = weights_of(policy)
    groups = for_recipe(groups, config.objective)
    result = update_policy(policy, groups, config, trace_ids, StepContext(step, 1e-3))
    changed = any((tensor != before[name]).any().item() for name, tensor in policy.named_tensors())
    return result.metrics | {"changed": changed, "empty": result.empty}


def test_where_no_response_has_an_advantage_the_experts_train_alone_with_their_share():
    mix = {"warmup": 4, "decay": 0, "peak": 0.8}
    (found,) = run_ranks(1, one_update, True, 2, {"mix": mix})
    assert found["changed"] and not found["empty"]
    assert found["objective/mu"] == pytest.approx(0.4) and found["loss/grpo"] == 0 and found["loss/expert"] > 1
    assert found["loss/total"] == pytest.approx(0.4 * found["loss/expert"], rel=1e-6)
    assert "policy/entropy" not in found, "no response was trained on"


def test_all_updates_of_a_rollout_have_the_share_of_its_step():
    mix = {"warmup": 10, "decay": 0, "peak": 1.0}
    (found,) = run_ranks(1, one_update, False, 3, {"mix": mix, "updates_per_rollout": 3})
    assert found["objective/mu"] == pytest.approx(0.3, rel=1e-12)
    parts = 0.7 * found["loss/grpo"] + 0.3 * found["loss/expert"]
    assert found["loss/total"] == pytest.approx(parts, rel=1e-5)


# --- whole runs

STEPS, PER_STEP = 6, 5
MIX = {"warmup": 2, "decay": 6, "peak": 0.9, "valley": 0.05}
REWARD = """def compute(data_source, solution_str, ground_truth, extra_info=None):
    return float(len(solution_str) % 2 == int(ground_truth) % 2)
"""
TASK = {
    "objective__method": "chord",
    "objective__mix": MIX,
    "objective__shape": "phi",
    "objective__kl_coef": 0.0,
    "objective__aggregation": "token_mean",
    "objective__demo_aggregation": "token_mean",
    "objective__updates_per_rollout": 2,
    "objective__teachers_per_prompt": 1,
    "data__experts_per_step": PER_STEP,
    "rollout__engine": "transformers",
    "rollout__async_rollout": 1,
    "rollout__correction": "truncate",
    "optimizer__distributed": True,
    "trainer__steps": STEPS,
    "trainer__save_every": 1,
    "trainer__keep_checkpoints": STEPS,
    "trainer__eval_every": 0,
}


def train_watched(config: str, overrides: list[str]) -> list[list[list]]:
    """Train on a forked rank; return each step's experts: prompt, trace and the trained ids."""
    from megatron_dypo import trainer

    seen, update = [], trainer.update_policy

    def watched(policy, groups, loaded, encode_trace, *rest):
        experts = [group for group in groups if group.expert]
        seen.append(
            [[each.prompt.text, each.prompt.teachers[0].trace, encode_trace(each, 0).tolist()] for each in experts]
        )
        return update(policy, groups, loaded, encode_trace, *rest)

    trainer.update_policy = watched
    train_here(config, overrides)
    return seen


def task(folder: Path, straight: Path) -> Path:
    """Write a configuration to ``folder`` with the data and the reward function of ``straight``."""
    paths = {"data__train": "train.jsonl", "data__valid": "valid.jsonl", "data__experts": "experts.jsonl"}
    paths |= {"reward__function": "reward.py:compute"}
    shared = {key: str(straight / name) for key, name in paths.items()}
    return copy_task(folder, rollout__record=str(folder / "rollouts"), **TASK, **shared)


def expert_rows(folder: Path) -> list[dict]:
    """Return two dozen rows with ids of training prompts, and three that are held out."""
    ids = [json.loads(line)["id"] for line in (folder / "train.jsonl").read_text().splitlines()]
    rows = [taught(f"{n % 10}a{n // 10}=", f"{n % 10} \\boxed{{{n % 10}}}", id=ids[n]) for n in range(24)]
    held_out = [json.loads(line) for line in (folder / "valid.jsonl").read_text().splitlines()][:3]
    return rows + held_out


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    """Return the folder of an uninterrupted run on two ranks, one step off-policy; its experts are in seen.json."""
    folder = tmp_path_factory.mktemp("straight")
    (folder / "reward.py").write_text(REWARD)
    config = task(folder, folder)
    rows_file(folder, *expert_rows(folder))
    seen = run_ranks(2, train_watched, str(config), [])
    assert seen[0] == seen[1], "both ranks take the same experts"
    (folder / "seen.json").write_text(json.dumps(seen[0]))
    return folder


def by_hand(step: int) -> float:
    return 0.45 * step if step < 2 else 0.05 + 0.85 * (1 + math.cos(math.pi * (step - 2) / 6)) / 2


def test_a_run_takes_each_step_s_share_and_rows_and_none_that_is_held_out(straight):
    lines, seen = metrics(straight / "run"), json.loads((straight / "seen.json").read_text())
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1)) and len(seen) == STEPS
    assert [line["objective/mu"] for line in lines] == pytest.approx([by_hand(step) for step in range(1, STEPS + 1)])
    rows = {(row["prompt"], row["teachers"][0]["trace"]) for row in expert_rows(straight)[:24]}
    epoch = [(prompt, trace) for step in seen[: 24 // PER_STEP] for prompt, trace, _ in step]
    assert len(set(epoch)) == len(epoch) == 24 // PER_STEP * PER_STEP and set(epoch) <= rows
    assert all(len(step) == PER_STEP for step in seen)
    assert len({tuple(ids) for step in seen for _, _, ids in step}) == 10, "of ten traces, and no teacher's of that id"
    for line in lines:
        parts = [line[f"grad_share/{name}"] for name in ("grpo", "expert")]
        assert all(part > 0 for part in parts) and line["train/empty_steps"] == line["train/skipped_steps"] == 0
        assert line["dypo/offline_ratio"] == 0 and 0 < line["source_share/expert"] < 1
    recorded = (straight / "rollouts/step_000001.jsonl").read_text().splitlines()
    assert len(recorded) == 8, "experts are not rollouts"


def cut_after(straight: Path, folder: Path, step: int) -> Path:
    """Copy the run as a kill in a later step would leave it; return its configuration."""
    shutil.copytree(straight / "run", folder / "run", ignore=shutil.ignore_patterns("engine"))
    for later in range(step + 1, STEPS + 1):
        shutil.rmtree(step_folder(folder / "run", later))
    return task(folder, straight)


def test_a_killed_run_goes_on_with_its_share_and_its_experts_bit_for_bit(straight, tmp_path):
    after = 2
    seen = run_ranks(2, train_watched, str(cut_after(straight, tmp_path, after)), [])
    assert seen[0] == json.loads((straight / "seen.json").read_text())[after:]
    assert without_times(metrics(tmp_path / "run")) == without_times(metrics(straight / "run"))
    ours, theirs = (
        run_ranks(1, checkpoint_digests, str(step_folder(folder / "run", STEPS)))[0] for folder in (tmp_path, straight)
    )
    assert any("exp_avg" in name for name in ours) and ours == theirs


def test_a_replay_on_one_rank_takes_the_same_experts_from_their_file(straight, tmp_path):
    replay = ["rollout.engine=replay", f"rollout.replay={straight / 'rollouts'}"]
    (seen,) = run_ranks(1, train_watched, str(task(tmp_path, straight)), replay)
    assert seen == json.loads((straight / "seen.json").read_text())
    for here, there in zip(metrics(tmp_path / "run"), metrics(straight / "run"), strict=True):
        for name in ("loss/total", "loss/expert", "loss/grpo", "train/grad_norm", "objective/mu"):
            assert here[name] == pytest.approx(there[name], rel=1e-4, abs=1e-6), name


def test_a_stage_s_share_and_experts_begin_with_it(straight, tmp_path):
    """After two steps of another recipe, share and experts are those of a separate run."""
    config = task(tmp_path, straight)
    tree = yaml.safe_load(config.read_text())
    del tree["trainer"]["steps"]
    tree["stages"] = [{"objective": {"method": "sft"}, "trainer": {"steps": 2}}, {"trainer": {"steps": 3}}]
    config.write_text(yaml.safe_dump(tree))
    (seen,) = run_ranks(1, train_watched, str(config), [])
    assert seen == [[], [], *json.loads((straight / "seen.json").read_text())[:3]]
    lines = metrics(tmp_path / "run")
    assert [line.get("objective/mu") for line in lines] == pytest.approx([None, None, *map(by_hand, (1, 2, 3))])
