"""examples/systems: the published settings of each system, and the same recipes on the quickstart's task."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from benchmarks.systems import RESULT, rows, systems
from megatron_dypo.cli import main
from megatron_dypo.config import load_config
from megatron_dypo.config.checks import warnings
from megatron_dypo.config.reads import lookup
from megatron_dypo.config.stages import stages_of
from megatron_dypo.models.limits import check_layout
from megatron_dypo.objectives.recipes import RECIPES
from megatron_dypo.planner.cluster import planned_shape

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "examples/systems"
TOY = FOLDER / "quickstart"
BASE = [ROOT / "examples/quickstart/config.yaml", TOY / "common.yaml"]
OFF = 1e9  # no upper clip
COLUMNS = (
    "objective.method", "data.prompts_per_step", "rollout.samples_per_prompt", "objective.updates_per_rollout",
    "optimizer.lr", "optimizer.betas", "optimizer.weight_decay", "optimizer.clip_grad", "objective.clip_high",
    "objective.advantage_std", "objective.aggregation", "rollout.temperature", "rollout.max_response_tokens",
)  # fmt: skip
NEW, OLD = [0.9, 0.999], [0.9, 0.95]
# The published values in our keys; None: the method does not read the key.
PUBLISHED = {
    "sft": ("sft", 64, None, 1, 5e-5, OLD, 0.0, 1.0, None, None, None, None, 8192),
    "rl": ("grpo", 128, 8, 2, 1e-6, NEW, 0.01, 1 / 64, 0.2, "none", "constant", 1.0, 8192),
    "superrl": ("switch", 128, 8, 2, 1e-6, NEW, 0.01, 1.0, 0.2, "sample", "scale", 1.0, 8192),
    "luffy": ("luffy", 128, 7, 2, 1e-6, NEW, 0.01, 1 / 64, OFF, "none", "constant", 1.0, 8192),
    "hpt": ("switch", 128, 8, 2, 5e-6, NEW, 0.01, 1 / 64, OFF, "none", "constant", 1.0, 8192),
    "simplerl_zoo": ("grpo", 1024, 8, 4, 5e-7, NEW, 0.01, 1.0, 0.2, "sample", "token_mean", 1.0, 3072),
    "oat_zero": ("grpo", 128, 8, 8, 1e-6, OLD, 0.0, 1.0, 0.2, "none", "constant", 1.0, 3000),
    "relift": ("relift", 128, 8, 2, 1e-6, NEW, 0.01, 0.7 / 64, OFF, "none", "constant", 1.0, 8192),
    "srft": ("srft", 128, 7, 2, 1e-6, NEW, 0.01, 1 / 64, None, "sample", "constant", 1.0, 8192),
    "chord": ("chord", 32, 8, 1, 1e-6, NEW, 0.0, 1.0, 0.2, "sample", "token_mean", 1.0, 10240),
    "dypo": ("dypo", 128, 8, 1, 1e-6, OLD, 0.0, 1.0, 0.2, "population", "scale", 1.0, 8192),
    "orz": ("ppo", 128, 64, 1, 1e-6, OLD, 0.0, 1.0, 0.2, None, "token_mean", 1.0, 8000),
    "simplerl_v0": ("ppo", 1024, 8, 64, 5e-7, OLD, 0.0, 1.0, 0.2, None, "scale", 0.6, 3000),
    "prime": ("prime", 256, 4, 4, 5e-7, NEW, 0.01, 1.0, 0.2, None, "token_mean", 1.0, 3072),
}
FURTHER = {
    "sft": {"optimizer.schedule": "cosine", "optimizer.warmup_steps": 216, "objective.demo_aggregation": "token_mean"},
    "rl": {"objective.aggregation_constant": 8192, "objective.entropy_coef": 0.001 * 4 / 64},
    "luffy": {"objective.shape": "luffy", "objective.shape_gamma": 0.1, "objective.teachers_per_prompt": 1},
    "hpt": {"trainer.max_grad_norm_to_apply": 80 / 64, "objective.gamma": 1.0, "objective.hard_max_solved": 0},
    "simplerl_zoo": {"objective.kl_coef": 1e-4, "objective.entropy_coef": 0.001},
    "oat_zero": {"objective.aggregation_constant": 3000, "rollout.reward_unfinished": 0.0},
    "superrl": {"objective.gate": "reward", "objective.hard_max_solved": 0, "objective.entropy_coef": 0.0},
    "relift": {"objective.queue_size": 128, "objective.demo_aggregation": "token_mean", "objective.gamma": 0.7 / 64},
    "srft": {"objective.gamma": 0.5, "objective.tilt_demo": -1.0, "objective.tilt_right": 1.0}
    | {"objective.weight_right": 0.1, "objective.shape": "p", "objective.demo_aggregation": "token_mean"},
    "chord": {"data.experts_per_step": 64, "objective.mix.warmup": 0, "objective.mix.decay": 200}
    | {"objective.mix.peak": 0.9, "objective.mix.valley": 0.05, "objective.demo_aggregation": "token_mean"},
    "dypo": {"objective.alpha": 0.5, "objective.beta_gal": 1.0, "objective.gamma": 1.0},
    "orz": {"objective.gae_gamma": 1.0, "objective.gae_lambda": 1.0, "objective.kl_in_reward": 0.0}
    | {"objective.value_clip": 0.2, "rollout.reward_unfinished": 0.0, "side.lr": 5e-6, "side.updates": 12}
    | {"optimizer.warmup_steps": 50, "data.max_prompt_tokens": 2048},
    "simplerl_v0": {"objective.gae_gamma": 1.0, "objective.gae_lambda": 0.95, "objective.kl_in_reward": 0.01}
    | {"objective.value_clip": 0.2, "objective.scale": "token", "side.lr": 9e-6, "side.updates": 64}
    | {"side.schedule": "cosine", "side.min_lr": 9e-7, "side.warmup_steps": 5},
    "prime": {"objective.process_beta": 0.05, "objective.process_baseline": "code", "side.lr": 1e-6}
    | {
        "objective.hard_max_solved": 0,
        "objective.easy_min_solved": 4,
        "side.clip_grad": 10.0,
        "side.weight_decay": 0.0,
    },
}
STAGED = {"sft_then_rl": ("sft", "rl")}  # systems whose stages are other systems
SINGLE = sorted(PUBLISHED)
SYSTEMS = sorted(path.stem for path in FOLDER.glob("*.yaml"))
# Keys whose values on the quickstart's task differ: sizes, lengths in steps, what depends on the gradient's scale.
SIZES = {"objective.aggregation_constant", "objective.entropy_coef", "objective.mix", "objective.queue_size"}
SCALED = {
    "relift": {"objective.gamma"},  # there it is part of the gradient's clip
    "simplerl_v0": {"objective.updates_per_rollout"},  # 64 cannot be cut from the quickstart's 16 prompts
}
FEWER = {"orz": 8}  # responses a prompt on the quickstart's task, where the published number is too many for it


def test_every_system_has_its_published_values_and_a_recipe_over_the_quickstart():
    assert set(PUBLISHED) == set(FURTHER) == set(SYSTEMS) - set(STAGED)
    assert {path.stem for path in TOY.glob("*.yaml")} == {*SYSTEMS, "common", "warm_start"}


@pytest.mark.parametrize("system", SINGLE)
def test_a_system_s_file_has_the_published_values_and_holds_no_key_that_it_does_not_read(system):
    config = load_config(FOLDER / f"{system}.yaml")  # refuses keys that are not read
    expected = dict(zip(COLUMNS, PUBLISHED[system], strict=True)) | FURTHER[system]
    expected = {name: value for name, value in expected.items() if value is not None}
    assert {name: lookup(config, name) for name in expected} == expected
    assert warnings(config) == []
    text = (FOLDER / f"{system}.yaml").read_text()
    assert "declared" in text and ("arXiv" in text or "README.md" in text)


@pytest.mark.parametrize(("system", "stages"), STAGED.items())
def test_a_staged_system_s_stages_are_those_systems(system, stages):
    """Compare all keys of objective and optimizer, and steps, on 7B; the objective's on the quickstart's task."""
    found = stages_of(load_config(FOLDER / f"{system}.yaml"))
    toy = stages_of(load_config(BASE[0], [str(BASE[1]), str(TOY / f"{system}.yaml")]))
    assert [len(found), len(toy)] == [len(stages)] * 2
    for stage, small, other in zip(found, toy, stages, strict=True):
        theirs = load_config(FOLDER / f"{other}.yaml")
        for section in ("objective", "optimizer"):
            assert getattr(stage.config, section) == getattr(theirs, section), (section, other)
        assert stage.config.trainer.steps == theirs.trainer.steps
        assert stage.config.data.prompts_per_step == theirs.data.prompts_per_step
        alone = load_config(BASE[0], [str(BASE[1]), str(TOY / f"{other}.yaml")])
        assert small.config.objective == alone.objective


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_system_s_file_fits_16_gpus(system, capsys):
    path = FOLDER / f"{system}.yaml"
    config = load_config(path)
    shape = planned_shape(config.model)
    check_layout(config.parallel, shape, 16, str(path))
    assert config.window <= shape.max_position
    assert config.data.max_prompt_tokens + (config.data.max_teacher_tokens or 0) <= shape.max_position
    assert main(["plan", str(path), "--gpus", "16", "--gpu-memory", "80"]) == 0
    assert "best (" in capsys.readouterr().out


@pytest.mark.parametrize("system", SINGLE)
def test_the_recipe_on_the_quickstart_s_task_is_the_published_one(system):
    """All keys of ``objective`` are equal except for sizes."""
    config = load_config(BASE[0], [str(BASE[1]), str(TOY / f"{system}.yaml")])
    published = load_config(FOLDER / f"{system}.yaml")
    ours, theirs = config.objective.model_dump(), published.objective.model_dump()
    differing = {f"objective.{name}" for name in ours if ours[name] != theirs[name]}
    assert differing <= SIZES | SCALED.get(system, set()), differing
    assert config.rollout.samples_per_prompt == FEWER.get(system, published.rollout.samples_per_prompt)
    assert config.rollout.reward_unfinished == published.rollout.reward_unfinished


def test_the_page_shows_the_stored_figures_of_every_system():
    results = json.loads(RESULT.read_text())["results"]
    assert list(results) == systems() == SYSTEMS
    assert rows(results) in (ROOT / "docs/systems.md").read_text(), "run `python -m benchmarks.systems`"
    for system, found in results.items():
        trained = {source for source, share in found["trained_tokens"].items() if share}
        methods = [PUBLISHED[each][0] for each in STAGED.get(system, (system,))]
        sources = {term.source.name.lower() for method in methods for term in RECIPES[method].terms}
        assert trained == sources, system


@pytest.fixture
def started(tmp_path: Path) -> tuple[dict[str, str], Path]:
    """Return an environment whose ``torchrun`` and ``python`` record their arguments."""
    log = tmp_path / "log"
    for name in ("torchrun", "python"):
        (tmp_path / name).write_text(f'#!/bin/sh\necho "{name} $*" >> {log}\n')
        (tmp_path / name).chmod(0o755)
    return os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "VENV": "none"}, log


def test_run_sh_makes_the_start_once_and_lays_the_recipe_over_the_quickstart(started):
    environment, log = started
    ran = subprocess.run(
        [FOLDER / "run.sh", "luffy", "trainer.steps=3"], env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    *start, run = log.read_text().splitlines()
    quickstart, here = "train examples/quickstart/config.yaml", "examples/systems/quickstart"
    assert run.endswith(
        f"{quickstart} {here}/common.yaml {here}/luffy.yaml trainer.run_dir=runs/systems/luffy trainer.steps=3"
    )
    if start:  # this checkout has no start yet
        assert start[0].endswith(f"{quickstart} {here}/warm_start.yaml") and "convert export" in start[1]


@pytest.mark.parametrize("system", [[], ["ppo"], ["common"], ["../quickstart/rl"]])
def test_run_sh_names_the_systems_where_it_gets_another(started, system):
    ran = subprocess.run([FOLDER / "run.sh", *system], env=started[0], capture_output=True, text=True)
    assert ran.returncode == 2 and all(name in ran.stderr for name in SYSTEMS), ran.stderr


def test_simplerl_v0_s_rewards_are_1_minus_a_half_and_minus_1():
    from megatron_dypo.runtime.user_code import load_function

    config = load_config(FOLDER / "simplerl_v0.yaml")
    score = load_function(config.reward.function)
    given = [r"so \boxed{\frac{1}{2}}", r"\boxed{0.5}", r"\boxed{2}", "it is 1/2"]
    assert [score("math", text, "1/2", {}) for text in given] == [1.0, 1.0, -0.5, -1.0]
