"""Stages of one run: each trains like a separate run from the previous weights, and all of them resume as one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from megatron_dypo import run_folder
from megatron_dypo.checkpoint.catalog import prefetched_file, step_folder
from megatron_dypo.checkpoint.manager import Counters
from megatron_dypo.config import load_config
from megatron_dypo.config.load import dump, fingerprint
from megatron_dypo.config.schema import walk
from megatron_dypo.config.stages import joined, leaves, parts, stage_at, stage_keys, stages_of
from megatron_dypo.data.dataset import batch_indices
from megatron_dypo.errors import UserError
from megatron_dypo.models.shape import model_shape
from megatron_dypo.monitor.health import Health
from megatron_dypo.monitor.run_data import read_runs
from megatron_dypo.monitor.tables import facts
from megatron_dypo.planner.placement import place_reference
from megatron_dypo.planner.show_plan import heaviest, work_of
from megatron_dypo.preflight import check_inputs
from megatron_dypo.runtime.distributed import Layout
from megatron_dypo.show import show
from tests.batches import make_config, make_groups, trace_ids
from tests.launch import checkpoint_digests, copy_task, metrics, train_here, without_times
from tests.ranks import run_ranks
from tests.test_checkpoint import DISTRIBUTED, SEQUENCE, join

SFT = {"objective": {"method": "sft"}, "optimizer": {"lr": 5e-5}, "trainer": {"steps": 3}}
RL = {"objective": {"method": "grpo"}, "trainer": {"steps": 4}}
BASE = {"model": {"preset": "tiny"}, "data": {"train": "rows.jsonl"}, "trainer": {"run_dir": "runs/x"}}


def staged(folder: Path, *stages: object, **sections: dict) -> Path:
    """Write a file of ``BASE``, with ``sections`` and stages."""
    tree = {name: BASE.get(name, {}) | sections.get(name, {}) for name in BASE | sections}
    path = folder / "staged.yaml"
    path.write_text(json.dumps(tree | {"stages": list(stages)}))
    return path


def complaint(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(path, list(overrides))
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(f"{path}: ")


# --- the configuration


def test_a_step_has_the_stage_that_its_number_falls_into_and_that_stage_s_rate(tmp_path):
    config = load_config(staged(tmp_path, SFT, RL))
    stages = stages_of(config)
    assert config.trainer.steps == 7
    of_step = [stage_at(stages, step) for step in range(1, 8)]
    assert [stage.index for stage in of_step] == [0, 0, 0, 1, 1, 1, 1]
    assert [stage.lr(step) for step, stage in enumerate(of_step, 1)] == [5e-5] * 3 + [1e-6] * 4
    assert [stage.own(step) for step, stage in enumerate(of_step, 1)] == [1, 2, 3, 1, 2, 3, 4]
    assert stage_at(stages, 0).index == 0 and stage_at(stages, 99).index == 1


def test_a_stage_s_schedule_begins_with_it(tmp_path):
    decaying = {"optimizer": {"lr": 0.4, "schedule": "linear", "schedule_steps": 4, "warmup_steps": 2}}
    stages = stages_of(load_config(staged(tmp_path, SFT, RL | decaying)))
    rates = [stage_at(stages, step).lr(step) for step in range(3, 8)]
    assert rates == pytest.approx([5e-5, 0.2, 0.4, 0.2, 0.0])


def test_a_stage_is_configured_as_a_run_of_its_own_would_be(tmp_path):
    """Except for the run's own keys; keys read only by other stages have their defaults."""
    common = {"objective": {"alpha": 0.3}, "rollout": {"temperature": 0.7}, "reward": {"format": "boxed"}}
    common["reward"]["format_penalty"] = 0.1
    sft, dypo = SFT | {"data": {"train": "a.jsonl"}}, {"trainer": {"steps": 4}}
    stages = [stage.config for stage in stages_of(load_config(staged(tmp_path, sft, dypo, **common)))]
    path = tmp_path / "alone.yaml"
    for config, own in zip(stages, (sft, common | dypo), strict=True):
        path.write_text(yaml.safe_dump({name: BASE.get(name, {}) | own.get(name, {}) for name in BASE | own}))
        alone = load_config(path)
        for section in ("data", "rollout", "objective", "optimizer"):
            assert getattr(config, section) == getattr(alone, section), section
    assert stages[0].reward == stages[1].reward and stages[0].model is stages[1].model


def test_a_stage_has_its_own_of_a_section_within_a_section(tmp_path):
    chord = {"objective": {"method": "chord", "mix": {"peak": 0.5}}, "data": {"experts": "e.jsonl"}}
    chord |= {"trainer": {"steps": 2}}
    first, second = stages_of(load_config(staged(tmp_path, chord, chord), ["stages.1.objective.mix.valley=0.1"]))
    assert first.config.objective.mix.model_dump() == second.config.objective.mix.model_dump() | {"valley": 0.05}
    assert second.config.objective.mix.valley == 0.1


def test_engine_and_evaluation_have_room_for_the_longest_of_all_stages(tmp_path):
    long = {"rollout": {"max_response_tokens": 300}}, {"data": {"max_prompt_tokens": 50}}
    config = load_config(staged(tmp_path, RL | long[0], RL | long[1], rollout={"max_response_tokens": 200}))
    assert config.window == 1024 + 300


def test_a_resolved_configuration_with_stages_says_the_same(tmp_path):
    config = load_config(staged(tmp_path, SFT, RL, objective={"kl_coef": 0.1}))
    text = dump(config)
    path = tmp_path / "config.yaml"
    path.write_text(text)
    assert load_config(path).model_dump() == config.model_dump() and dump(load_config(path)) == text
    *_, own = trees = [part for _, part in parts(yaml.safe_load(text))]
    assert len(trees) == 3 and leaves(own) == leaves(trees[1]) == set(stage_keys())
    assert leaves(trees[0]) == {name for name, _ in walk()} - {"stages"} - leaves(own)


@pytest.mark.parametrize(
    ("overrides", "rates"),
    [
        (["stages.1.optimizer.lr=0.5"], [5e-5, 0.5]),
        (["stages.1.optimizer.lr=0.5", "stages.1.optimizer.lr=0.25"], [5e-5, 0.25]),
        (["stages.1={trainer: {steps: 1}, optimizer: {lr: 0.125}, objective: {method: grpo}}"], [5e-5, 0.125]),
        (["stages=[{trainer: {steps: 1}}]"], [1e-6]),
        (["optimizer.lr=0.5", "stages=[{trainer: {steps: 1}}, {trainer: {steps: 1}, optimizer: {lr: 1}}]"], [0.5, 1]),
        (["stages=null", "trainer.steps=3", "optimizer.lr=0.5"], [0.5]),
        (["more.yaml"], [0.5, 0.75]),
    ],
    ids=str,
)
def test_overrides_reach_into_stages(tmp_path, monkeypatch, overrides, rates):
    more = [{"trainer": {"steps": 1}}, {"trainer": {"steps": 1}, "optimizer": {"lr": 0.75}}]
    monkeypatch.chdir(tmp_path)
    Path("more.yaml").write_text(yaml.safe_dump({"stages": more, "optimizer": {"lr": 0.5}}, sort_keys=False))
    stages = stages_of(load_config(staged(tmp_path, SFT, RL), overrides))
    assert [stage.config.optimizer.lr for stage in stages] == rates


@pytest.mark.parametrize(
    ("stages", "overrides", "words"),
    [
        ([], [], "stages: must be a list of at least one stage"),
        ([3], [], "stages.0: must be a mapping of sections"),
        ([SFT, {"objective": {"method": "grpo"}}], [], "stages.1.trainer.steps: required key is missing"),
        ([SFT, RL], ["trainer.steps=9"], "trainer.steps: not beside stages, each of which has its own"),
        ([SFT, RL], ["stages.1.model.hf=x"], "stages.1.model.hf: cannot change between stages"),
        ([SFT, RL], ["stages.1.model.shape.num_layers=3"], "stages.1.model.shape.num_layers: cannot change between"),
        ([SFT, RL], ["stages.0.parallel.tensor=2"], "stages.0.parallel.tensor: cannot change between stages"),
        ([SFT, RL], ["stages.0.policy.aux_loss=1"], "stages.0.policy.aux_loss: cannot change between stages"),
        ([SFT, RL], ["stages.0.trainer.run_dir=x"], "stages.0.trainer.run_dir: cannot change between stages"),
        ([SFT, RL], ["stages.0.rollout.engine=vllm"], "stages.0.rollout.engine: cannot change between stages"),
        ([SFT, RL], ["stages.0.optimizer.distributed=true"], "stages.0.optimizer.distributed: cannot change"),
        ([SFT, RL], ["stages.0.reward.function=choice"], "stages.0.reward.function: cannot change between stages"),
        ([SFT, RL], ["stages.0.stages=[]"], "stages.0.stages: cannot change between stages"),
        ([SFT, RL], ["stages.1.objective.alph=1"], "stages.1.objective.alph: unknown key; the nearest known key is"),
        ([SFT, RL], ["stages.1.learning_rate=1"], "stages.1.learning_rate: unknown key; here it is optimizer.lr"),
        ([SFT, RL], ["stages.1.rollout.overlap=true"], "stages.1.rollout.overlap is now rollout.async_rollout"),
        ([SFT, RL], ["stages.1.optimizer.lr=-1"], "stages.1.optimizer.lr: input should be greater than 0 (got -1"),
        ([SFT, RL], ["stages.1.trainer.steps=0"], "stages.1.trainer.steps: input should be greater than or equal"),
        ([SFT, RL], ["stages.1.optimizer=null"], "stages.1.optimizer: input should be a valid dictionary"),
        ([SFT, RL], ["stages.1.data.train=$NO_SUCH/x"], "stages.1.data.train: $NO_SUCH/x: the environment variable"),
        ([SFT, RL], ["stages.1.data.train=' '"], "stages.1.data.train: is empty"),
        ([SFT, RL], ["stages.1.objective.gamma=2"], "stages.1.objective.gamma: 2.0 is not read with objective.method"),
        ([SFT, RL], ["stages.0.rollout.temperature=2"], "stages.0.rollout.temperature: 2.0 is not read with"),
        ([SFT, RL], ["objective.beta_gal=2"], "objective.beta_gal: 2.0 is not read with objective.method: sft"),
        ([SFT, RL], ["stages.1.rollout.samples_per_prompt=1"], "stages.1: rollout.samples_per_prompt: objective.met"),
        ([SFT, RL], ["rollout.engine=server"], "rollout.servers: rollout.engine: server needs"),
        ([SFT, RL], ["optimizer.lr=1"], "override optimizer.lr: a stage sets its own; give stages.0.optimizer.lr="),
        ([SFT, RL], ["objective={alpha: 1}"], "override objective: a stage sets its own; give stages.0.objective.met"),
        ([SFT, RL], ["stages.1.objective.mix.peak=0.5"], "stages.1.objective.mix.peak: 0.5 is not read with object"),
        ([SFT, RL], ["stages.1.objective.mix.pea=0.5"], "stages.1.objective.mix.pea: unknown key; the nearest known"),
        ([SFT, RL], ["stages.1.objective=3"], "stages.1.objective: input should be a valid dictionary"),
        ([SFT, RL], ["stages.1.objective.method=prime"], "stages.1.objective.method: prime has a second model, and"),
        ([SFT, RL], ["stages={}"], "stages: must be a list of at least one stage"),
    ],
)  # fmt: skip
def test_stages_that_cannot_be_are_refused_by_stage_and_key(tmp_path, stages, overrides, words):
    assert complaint(staged(tmp_path, *stages), *overrides).startswith(words)


@pytest.mark.parametrize("override", ["stages.2.optimizer.lr=1", "stages.x.optimizer.lr=1", "stages.-1.optimizer.lr=1"])
def test_an_override_of_a_stage_that_is_not_there_is_refused(tmp_path, override):
    with pytest.raises(UserError, match="the configuration has 2 stages, counted from 0"):
        load_config(staged(tmp_path, SFT, RL), [override])


def test_a_value_that_no_stage_takes_is_refused(tmp_path):
    """If all stages set their own, or those that do not do not read it; not if an override has caused it."""
    dead = "optimizer.lr: never read: every stage that reads it sets its own"
    assert complaint(staged(tmp_path, SFT, RL | {"optimizer": {"lr": 1.0}}, optimizer={"lr": 2.0})) == dead
    load_config(staged(tmp_path, SFT, RL, optimizer={"lr": 2.0}), ["stages.1.optimizer.lr=1"])
    dypo = {"objective": {"alpha": 0.2}, "trainer": {"steps": 1}}
    assert complaint(staged(tmp_path, SFT, dypo, objective={"alpha": 0.3})).startswith("objective.alpha: never read")


# --- before anything is built, and on resume


@pytest.fixture
def task(tmp_path, monkeypatch) -> Path:
    """Return a configuration with stages that passes ``check_inputs``."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    return staged_task(tmp_path, SFT, RL, rollout__engine="transformers", model__dtype="fp32")


def staged_task(folder: Path, *stages: dict, **keys: object) -> Path:
    """Run ``copy_task`` with stages; files of those with ``data.train: NAME`` are other halves of its prompts."""
    path = copy_task(folder, **keys)
    tree = yaml.safe_load(path.read_text())
    del tree["trainer"]["steps"], tree["optimizer"]
    rows = (folder / "train.jsonl").read_text().splitlines()
    stages = [{section: dict(values) for section, values in stage.items()} for stage in stages]
    for stage in stages:
        if name := stage.get("data", {}).get("train"):
            (folder / name).write_text("\n".join(rows[1::2]))
            stage["data"]["train"] = str(folder / name)
    path.write_text(json.dumps(tree | {"stages": stages}))
    return path


def refused(config: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        check_inputs(load_config(config, list(overrides)), str(config))
    return str(caught.value)


def other_rows(config: Path, **row: object) -> str:
    """Write a file of eight prompts, the last of which differs."""
    rows = [{"prompt": f"{n}=", "ground_truth": str(n), "teachers": []} for n in range(8)]
    rows[-1] |= row
    path = config.parent / "other.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return f"stages.1.data.train={path}"


def test_every_stage_s_prompts_are_read_and_checked_before_anything_is_built(task):
    good = check_inputs(load_config(task, [other_rows(task)]), str(task))
    good.lock.close()
    assert [len(prompts) for prompts in good.train] == [54, 8]
    assert "ground_truth" in refused(task, other_rows(task, ground_truth=""))
    assert "has 10 tokens; data.max_prompt_tokens is 8" in refused(task, other_rows(task, prompt="123456789="))
    assert "fewer than data.prompts_per_step: 9" in refused(task, other_rows(task), "stages.1.data.prompts_per_step=9")
    assert "fewer than data.prompts_per_step: 55" in refused(task, "stages.1.data.prompts_per_step=55")
    assert "data.max_prompt_tokens is 2" in refused(task, "stages.1.data.max_prompt_tokens=2")
    assert refused(task, "stages.1.data.train=no_such.jsonl") == "data: no_such.jsonl: no such file"
    assert "exceeds the model's limit" in refused(task, "stages.1.rollout.max_response_tokens=100000")


def at_step(config: Path, monkeypatch, step: int, *overrides: str) -> None:
    """Pretend that the run folder has a checkpoint of ``step``, as ``run_folder`` sees it."""
    loaded = load_config(config, list(overrides))
    run_dir = Path(loaded.trainer.run_dir)
    run_dir.mkdir(exist_ok=True)
    run_folder.describe(loaded, run_dir)
    monkeypatch.setattr(run_folder, "complete_steps", lambda folder: [step] if step else [])


def not_resumed(config: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        run_folder.checkpoints(load_config(config, list(overrides)))
    return str(caught.value)


@pytest.mark.parametrize(
    ("step", "override", "words"),
    [
        (3, "stages.0.objective.gamma=2.5", "stages.0.objective.gamma (was 1.0, now 2.5)"),
        (3, "stages.0.trainer.steps=2", "stages.0.trainer.steps (was 3, now 2)"),
        (4, "stages.0.trainer.steps=4", "stages.0.trainer.steps (was 3, now 4)"),
        (4, "stages.0.objective.gamma=2.5", "stages.0.objective.gamma (was 1.0, now 2.5)"),
        (4, "stages.1.optimizer.lr=0.5", "stages.1.optimizer.lr (was 1e-06, now 0.5)"),
        (4, f"stages=[{json.dumps(SFT)}]", "stages.1 (is missing)"),
        (1, "trainer.seed=4", "trainer.seed (was 0, now 4)"),
    ],
)  # fmt: skip
def test_a_stage_that_has_begun_is_what_it_was(task, monkeypatch, step, override, words):
    at_step(task, monkeypatch, step)
    assert not_resumed(task, override).endswith(f"belongs to another run; differing: {words}")


@pytest.mark.parametrize(
    ("step", "override"),
    [
        (2, "stages.0.trainer.steps=2"),
        (3, "stages.0.trainer.steps=5"),
        (3, "stages.1.optimizer.lr=0.5"),
        (3, "stages.1.data.train=OTHER"),
        (5, "stages.1.trainer.steps=9"),
        (3, f"stages=[{json.dumps(SFT)}]"),
        (2, "stages.1.trainer.spike_factor=3"),
    ],
)
def test_what_is_to_come_may_change(task, monkeypatch, step, override):
    at_step(task, monkeypatch, step)
    override = other_rows(task) if override.endswith("OTHER") else override
    assert run_folder.checkpoints(load_config(task, [override])) == [step]


def test_a_run_without_stages_and_one_with_are_two(task, monkeypatch):
    at_step(task, monkeypatch, 3)
    line = not_resumed(task, "stages=null", "trainer.steps=7", "objective.method=sft", "optimizer.lr=5e-5")
    assert "differing: " in line and "stages (was 2 of them, now none)" in line


@pytest.mark.parametrize("stage", [0, 1])
def test_prompts_of_any_stage_that_changed_since_the_start_are_refused_by_stage(task, monkeypatch, stage):
    files = [other_rows(task), f"stages.0.data.train={task.parent / 'train.jsonl'}"]
    tree = yaml.safe_load(task.read_text())
    tree["data"].pop("train")
    task.write_text(yaml.safe_dump(tree))
    at_step(task, monkeypatch, 2, *files)
    assert run_folder.checkpoints(load_config(task, files)) == [2]
    path = task.parent / ("train.jsonl", "other.jsonl")[stage]
    path.write_text("\n".join(path.read_text().splitlines()[::-1]))
    assert not_resumed(task, *files).startswith(f"stages.{stage}.data.train: {path} has changed since the run of")


def test_the_prompts_of_a_run_of_one_stage_are_compared_too(task, monkeypatch):
    files = [f"stages=[{json.dumps(SFT)}]", f"data.train={task.parent / 'train.jsonl'}"]
    at_step(task, monkeypatch, 2, *files)
    path = task.parent / "train.jsonl"
    path.write_text("\n".join(path.read_text().splitlines()[::-1]))
    assert not_resumed(task, *files).startswith(f"stages.0.data.train: {path} has changed since the run of")


@pytest.mark.parametrize("stages", [3, [3], [{}], [{"trainer.steps": "x"}], {}])
def test_a_fingerprint_with_stages_of_no_known_form_is_refused(task, monkeypatch, stages):
    at_step(task, monkeypatch, 2)
    path = Path(load_config(task).trainer.run_dir) / "fingerprint.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"stages": stages}))
    assert not_resumed(task) == f"{path}: holds no fingerprint of a run"


def test_a_fingerprint_holds_every_key_once(tmp_path):
    plain, config = fingerprint(make_config()), load_config(staged(tmp_path, SFT, RL))
    found = fingerprint(config)
    own = [stage.keys() for stage in found.pop("stages")]
    assert own[0] == own[1] and own[0] | found.keys() == plain.keys() | {"trainer.steps"}
    assert not own[0] & found.keys()


def test_a_plan_is_of_the_stage_that_takes_most(tmp_path):
    """One with a reference before one that samples more, with room for the longest of all."""
    long = {"rollout": {"max_response_tokens": 2000, "samples_per_prompt": 32}}
    kept = {"objective": {"method": "grpo", "kl_coef": 0.1}, "rollout": {"samples_per_prompt": 4}}
    config = load_config(staged(tmp_path, SFT, RL | long, RL | kept, rollout={"max_response_tokens": 500}))
    config.model.dtype = "fp32"
    work = work_of(config, None, None, 0.5, 0.25)
    assert (work.samples, work.passes, work.reference, work.longest) == (4, 2, "auto", 1024 + 2000)
    lighter = load_config(staged(tmp_path, SFT, RL | long, RL))
    assert (work_of(lighter, None, None, 0.5, 0.25).samples, heaviest(lighter).objective.kl_coef) == (32, 0.0)
    _, said = place_reference(config, model_shape(config.model), Layout(), None, 0.0)
    assert "with the weights" in said
    assert place_reference(lighter, model_shape(config.model), Layout(), None, 0.0) == ("auto", "")


def test_every_stage_s_prompts_are_shown(task, capsys):
    show(load_config(task, [other_rows(task)]), 1, as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert [(entry["stage"], entry["prompt"]) for entry in found] == [
        ("stage 0: steps 1 to 3, sft", "first 0="),
        ("stage 1: steps 4 to 7, grpo", "0="),
    ]
    show(load_config(task), 2, as_json=False)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("#")]
    assert lines == ["##### stage 0: steps 1 to 3, sft", "##### stage 1: steps 4 to 7, grpo"]


def test_the_report_says_what_the_stages_are(tmp_path):
    config = load_config(staged(tmp_path, SFT, RL, data={"prompts_per_step": 4}))
    (tmp_path / "config.yaml").write_text(dump(config))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "stage": 0}\n')
    (run,) = read_runs([tmp_path])
    assert {"method sft, then grpo", "learning rate 5e-05, then 1e-06", "data rows.jsonl"} <= set(facts(run))
    assert run.setting("objective", "method") == "grpo" and run.setting("trainer", "seed") == 0


def test_what_a_run_counts_of_a_stage_begins_anew_with_the_next():
    counters = Counters(5, 9, 0, 2, 1, 1, [1.0], [2.0], [("a", (0,))])
    counters.begin_stage(9)
    kept = {"step": 5, "weight_version": 9, "skipped_steps": 2, "empty_steps": 1, "skipped_in_a_row": 1}
    assert counters == Counters(**kept, stage_version=9)


def test_health_begins_anew_with_a_stage():
    """A loss and a norm of another recipe are not spikes; the run's counts continue."""
    level = {"loss/total": 1.0, "train/grad_norm": 1.0, "train/empty_steps": 1}
    jump = {"loss/total": 90.0, "train/grad_norm": 90.0, "train/empty_steps": 1}
    for stage, warnings in ((0, 2), (1, 0)):
        health = Health()
        for step in range(30):
            assert health.check(step, level | {"stage": 0}) == []
        assert len(health.check(30, jump | {"stage": stage})) == warnings
    health = Health()
    said = [health.check(step, {"train/empty_steps": step, "stage": int(step > 10)}) for step in range(1, 30)]
    assert sum(map(len, said)) == 1, "20 empty steps in a row, across the boundary"


# --- updates, as the training loop drives them

STEPS = 3  # per stage
STAGES = (
    {"objective": {"method": "sft", "kl_coef": 0.0}, "optimizer": {"weight_decay": 0.1, "betas": [0.5, 0.6]}},
    {"optimizer": {"betas": [0.9, 0.99], "eps": 1e-6, "clip_grad": 0.05, "lr": 1e-3}},
    {"optimizer": {"lr": 1e-3, "schedule": "linear", "schedule_steps": 3}, "objective": {"reference": "every:2"}},
)


class Loop:
    """The updates of three stages on made-up batches, a checkpoint after each, as in ``trainer.py``."""

    def __init__(self, folder: str, layout: dict, own: tuple[dict, ...] = STAGES, weights: dict | None = None):
        from megatron_dypo.checkpoint.manager import Counters, Saver
        from megatron_dypo.config.schema import Parallel
        from megatron_dypo.models.shape import model_shape
        from megatron_dypo.models.sharding import random_weights
        from megatron_dypo.policy.policy import Policy

        trainer = {"steps": STEPS, "save_every": 1, "keep_checkpoints": 100, "run_dir": folder}
        configs = []
        for stage in own:
            optimizer = stage["optimizer"] | layout.get("optimizer", {})
            configs.append(make_config("deep", **layout | stage | {"optimizer": optimizer, "trainer": trainer}))
        config = joined(configs)
        self.stages, self.counters, self.metrics = stages_of(config), Counters(), {}
        shape, ranks = model_shape(config.model), join(tuple(layout.get("parallel", {}).items()))
        assert config.parallel == Parallel(**layout.get("parallel", {}))
        read = weights.__getitem__ if weights else random_weights(shape, seed=1)
        self.policy = Policy(config, shape, ranks, read)
        self.saver = Saver(config, self.policy)

    def run(self, until: int, batches: int = 0, skipped: int | None = None) -> None:
        """Continue to step ``until``; step s trains on batch s + ``batches``, or does nothing if ``skipped``."""
        for step in range(self.counters.step + 1, until + 1):
            stage = stage_at(self.stages, step)
            if stage.own(step) == 1:
                self.policy.begin_stage(stage.config)
                self.counters.begin_stage(self.policy.version)
            self.policy.refresh_reference(stage.own(step))
            norms = [] if step == skipped else self._update(step, step + batches, stage)
            self.counters.count(step, self.policy.version, step == skipped, False, norms)
            self.saver.after_step(self.counters, None)
        self.saver.finish(self.counters)

    def _update(self, step: int, batch: int, stage) -> list[float]:
        from megatron_dypo.training.step import StepContext, update_policy

        context = StepContext(stage.own(step), stage.lr(step), grad_norms=self.counters.grad_norms)
        groups = make_groups(seed=batch)
        for response in (response for group in groups for response in group.responses):
            response.weight_version = self.policy.version
        result = update_policy(self.policy, groups, stage.config, trace_ids, context)
        self.metrics[batch] = result.metrics
        return result.grad_norms

    def resume(self, step: int) -> None:
        from megatron_dypo.checkpoint.manager import load_newest

        self.counters = load_newest(Path(self.stages[0].config.trainer.run_dir), [step], self.policy)

    def weights(self) -> dict:
        return {name: tensor.clone() for name, tensor in self.policy.named_tensors()}


def alike(one: Loop, other: Loop) -> bool:
    """Return whether weights, counts and the metrics of every batch that both trained on are bit-equal."""
    ours, theirs = one.weights(), other.weights()
    return (
        all((ours[name] == theirs[name]).all() for name in ours)
        and one.policy.adam_steps == other.policy.adam_steps
        and all(one.metrics[batch] == other.metrics[batch] for batch in other.metrics)
    )


def in_stages(folder: str, layout: dict, skipped: int | None) -> tuple[list[bool], list[bool]]:
    """Compare an unbroken run with a separate run of each stage from the previous weights, and with its resumes."""
    whole, alone, resumed, last = Loop(f"{folder}/all", layout), [], [], STEPS * len(STAGES)
    for index, own in enumerate(STAGES):
        before = whole.weights()
        whole.run(STEPS * (index + 1), skipped=skipped)
        other = Loop(f"{folder}/{index}", layout, (own,), before)
        other.run(STEPS, batches=STEPS * index, skipped=skipped and skipped - STEPS * index)
        alone.append(alike(whole, other) and whole.counters.grad_norms == other.counters.grad_norms)
    for step in (2, 3, 4, 5, 6):
        other = Loop(f"{folder}/all", layout, weights=whole.weights())
        other.resume(step)
        other.run(last, skipped=skipped)
        resumed.append(alike(whole, other) and whole.counters == other.counters)
    return alone, resumed


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (1, {}),
        (2, {"optimizer": DISTRIBUTED}),
        pytest.param(2, {"parallel": SEQUENCE}, marks=pytest.mark.faults),
        pytest.param(2, {"parallel": {"pipeline": 2}, "optimizer": DISTRIBUTED}, marks=pytest.mark.faults),
    ],
    ids=str,
)
def test_a_stage_trains_as_a_run_that_starts_from_its_weights_and_resumes_at_either_side(tmp_path, ranks, layout):
    """Fresh moments, step count, schedule and reference, its own settings; resumed at, before and after its start.

    Bit for bit.
    """
    for alone, resumed in run_ranks(ranks, in_stages, str(tmp_path), layout, None):
        assert alone == [True] * 3
        assert resumed == [True] * 5


def test_master_weights_go_on_into_a_stage_whose_first_step_was_skipped(tmp_path):
    """Use bf16: a run started from the weights has other master weights; its checkpoint holds them unchanged."""
    layout = {"optimizer": DISTRIBUTED, "model": {"dtype": "bf16"}}
    for _, resumed in run_ranks(2, in_stages, str(tmp_path), layout, 4):
        assert resumed == [True] * 5


# --- whole runs


OFF_POLICY = {"async_rollout": 1, "correction": "truncate"}
RUN = (
    {"objective": {"method": "sft"}, "optimizer": {"lr": 4e-3, "warmup_steps": 2}, "trainer": {"steps": 2}},
    {
        "objective": {"kl_coef": 0.01, "teachers_per_prompt": 2},
        "optimizer": {"lr": 2e-3, "schedule": "linear", "schedule_steps": 5},
        "rollout": OFF_POLICY,
        "trainer": {"steps": 3},
    },
    {
        "objective": {"method": "grpo", "entropy_coef": 0.01},
        "rollout": OFF_POLICY,
        "data": {"train": "half.jsonl"},
        "optimizer": {"lr": 1e-3},
        "trainer": {"steps": 2},
    },
)
LAST = 7


def whole_task(folder: Path) -> Path:
    keys = {"trainer__save_every": 1, "trainer__keep_checkpoints": 9, "trainer__eval_every": 0}
    config = staged_task(folder, *RUN, rollout__engine="transformers", rollout__record=str(folder / "rollouts"), **keys)
    tree = yaml.safe_load(config.read_text())
    del tree["objective"]
    config.write_text(json.dumps(tree | {"optimizer": {"distributed": True}}))
    return config


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    """Return the folder of an unbroken run of three stages on two ranks."""
    folder = tmp_path_factory.mktemp("straight")
    run_ranks(2, train_here, str(whole_task(folder)), [])
    return folder


def test_a_run_goes_through_its_stages(straight):
    """Step numbers continue; schedule and order start with a stage, and nothing is sampled for it before."""
    lines = metrics(straight / "run")
    assert [line["step"] for line in lines] == list(range(1, LAST + 1))
    assert [line["stage"] for line in lines] == [0, 0, 1, 1, 1, 2, 2]
    assert [line["train/lr"] for line in lines] == pytest.approx([2e-3, 4e-3, 1.6e-3, 1.2e-3, 0.8e-3, 1e-3, 1e-3])
    for step, line in enumerate(lines, 1):
        assert ("reward/mean" in line) == (step > 2) and (line["grad_share/sft"] > 0) == (step < 6), step
        prefetched = prefetched_file(step_folder(straight / "run", step))
        assert (prefetched is not None) == (step in (3, 4, 6)), step
    rows = [json.loads(line)["id"] for line in (straight / "train.jsonl").read_text().splitlines()]
    half = [json.loads(line)["id"] for line in (straight / "half.jsonl").read_text().splitlines()]
    for step, before, data in ((1, 0, rows), (2, 0, rows), (3, 2, rows), (5, 2, rows), (6, 5, half), (7, 5, half)):
        file = straight / f"rollouts/step_{step:06d}.jsonl"
        ids = [json.loads(line)["id"] for line in file.read_text().splitlines()]
        expected = [data[index] for index in batch_indices(step - before, 8, len(data), 0)]
        assert ids == expected, step
    assert (straight / "run/report.html").exists()


@pytest.mark.parametrize("step", [*(pytest.param(step, marks=pytest.mark.faults) for step in (1, 4, 6)), 2, 3, 5])
def test_a_run_that_was_killed_after_a_step_goes_on_bit_for_bit(straight, tmp_path, step):
    shutil.copytree(straight / "run", tmp_path / "run")
    for later in range(step + 1, LAST + 1):
        shutil.rmtree(step_folder(tmp_path / "run", later))
    here = [f"trainer.run_dir={tmp_path / 'run'}", f"rollout.record={tmp_path / 'rollouts'}"]
    run_ranks(2, train_here, str(straight / "config.yaml"), here)
    assert without_times(metrics(tmp_path / "run")) == without_times(metrics(straight / "run"))
    for later in range(step + 1, LAST + 1):
        name = f"rollouts/step_{later:06d}.jsonl"
        assert (tmp_path / name).read_bytes() == (straight / name).read_bytes(), name
    ours, theirs = (
        run_ranks(1, checkpoint_digests, str(step_folder(folder / "run", LAST)))[0] for folder in (tmp_path, straight)
    )
    assert ours == theirs
