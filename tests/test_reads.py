"""Unread keys: the table is correct, the loader refuses or names them, and runs work without them."""

from __future__ import annotations

import itertools
import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_dypo import run_folder
from megatron_dypo.config import load_config, render
from megatron_dypo.config.load import dump, fingerprint, still_read
from megatron_dypo.config.reads import (
    CRITIC,
    DEFAULTS,
    EXPERTS,
    GROUPED,
    IMITATING,
    KINDS,
    MIDDLE,
    PAIRS,
    PROCESS,
    QUEUEING,
    RATIO,
    READ_WITH,
    RELATIVE,
    ROUTED,
    SAMPLING,
    SHAPED,
    SIDED,
    TEACHERS,
    TILTED,
    lookup,
    read_with,
    unread,
    uses_reference,
    uses_sums,
)
from megatron_dypo.config.schema import Config, Objective, walk
from megatron_dypo.errors import UserError
from megatron_dypo.objectives.coefficients import needs_reference, needs_sums
from megatron_dypo.objectives.correction import Correction
from megatron_dypo.objectives.recipes import ALL, RECIPES, recipe
from megatron_dypo.records import Kind, Regime
from megatron_dypo.training.minibatch import draw_teachers
from tests import test_objectives as ours
from tests.test_config import SMALLEST, complaint

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*/config.yaml"))
ANOTHER = {  # a value that is not the default, and does not make the others of these idle
    "alpha": 0.25, "beta_gal": 2.0, "gamma": 3.0, "clip_low": 0.05, "clip_high": 0.01, "kl_coef": 0.3,
    "hard_max_solved": 1, "easy_min_solved": 3, "teachers_per_prompt": 2,
    "aggregation": "token_mean", "aggregation_constant": 5,
    "gal_length_normalize": False, "sft_length_normalize": False, "ratio_base": "reference", "ratio_level": "sequence",
    "advantage_std": "none", "gate": "advantage", "shape": "sg_p", "shape_gamma": 0.3, "demo_aggregation": "token_mean",
    "mask_truncated": True,
    "entropy_coef": 0.2,
    "tilt_demo": 0.5, "tilt_right": 0.5, "weight_right": 0.7, "tilt_level": "sequence",
    "surrogate": "cispo", "sapo_tau_pos": 2.0, "sapo_tau_neg": 2.0,
    "mix.warmup": 2, "mix.decay": 2, "mix.peak": 0.3, "mix.valley": 0.3,
}  # fmt: skip


def file(folder: Path, **sections: dict[str, Any]) -> Path:
    """Write a file of the four required keys and ``sections``."""
    tree = {name: SMALLEST.get(name, {}) | sections.get(name, {}) for name in SMALLEST | sections}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


# --- the table is true


def test_every_row_is_of_keys_that_there_are_and_the_methods_are_the_recipes():
    keys = dict(walk()).keys()
    assert READ_WITH.keys() <= keys and all(deciding(dotted) <= keys for dotted in READ_WITH)
    assert set(SAMPLING) == {name for name, recipe in RECIPES.items() if recipe.samples}
    assert set(PAIRS) == {name for name, recipe in RECIPES.items() if "gal" in [term.rule for term in recipe.terms]}
    sources = {name: {term.source for term in recipe.terms} for name, recipe in RECIPES.items()}
    tokens = {name: {term.token for term in recipe.terms} for name, recipe in RECIPES.items()}
    imitates = {name: {term.column == "nll" for term in recipe.terms} for name, recipe in RECIPES.items()}
    assert set(IMITATING) == {name for name in RECIPES if True in imitates[name]}
    assert set(TILTED) == {name for name in RECIPES if "tilted" in tokens[name]}
    assert set(RATIO) == {name for name in RECIPES if "surrogate" in tokens[name]}
    assert set(SHAPED) == {name for name in RECIPES if "shaped" in tokens[name]}
    regimes = {name: {term.when for term in recipe.terms} for name, recipe in RECIPES.items()}
    assert set(ROUTED) == {name for name in RECIPES if regimes[name] != {ALL}}
    rules = {name: {term.rule for term in recipe.terms} for name, recipe in RECIPES.items()}
    assert set(RELATIVE) == {name for name in RECIPES if "advantage" in rules[name]}
    sides = {name: recipe.side for name, recipe in RECIPES.items() if recipe.side}
    assert set(PROCESS) == {name for name, side in sides.items() if side == "prm"}
    assert set(CRITIC) == {name for name, side in sides.items() if side == "critic"}
    assert set(SIDED) == set(sides)
    assert set(MIDDLE) == {
        name
        for name, recipe in RECIPES.items()
        if any((Regime.MID in term.when) != (Regime.EASY in term.when) for term in recipe.terms)
    }
    alone = {name for name, recipe in RECIPES.items() if recipe.scores_traces or recipe.side == "critic"}
    assert set(GROUPED) == {name for name, recipe in RECIPES.items() if recipe.samples} - alone
    assert set(QUEUEING) == {name for name, recipe in RECIPES.items() if recipe.defers}
    assert set(TEACHERS) == {name for name, kinds in sources.items() if Kind.TEACHER in kinds}
    assert set(EXPERTS) == {name for name, kinds in sources.items() if Kind.EXPERT in kinds}


def deciding(dotted: str) -> set[str]:
    return {key for condition in READ_WITH.get(dotted, ()) for key in condition.keys}


@pytest.mark.parametrize("dotted", READ_WITH)
def test_what_decides_of_a_deciding_key_decides_of_the_key_too(dotted):
    """Otherwise an idle key at its default would make another one idle."""
    for decider in deciding(dotted):
        assert deciding(decider) <= deciding(dotted) | {dotted}


def outcome(objective: Objective) -> list[float]:
    """Return loss, metric sums and every token's gradient of made-up groups, by the training code."""
    rewards = [
        [1, 1, 1, 1],
        [0, 0, 0, 0],
        [1, 1, 0, 0],
        [0, 1, 1, 1],
        [1, 0, 0, 0],
        [0.9, 0.5, 0.5, 0.1],
        [0.3, 0.1, 0, 0],
    ]
    two = objective.model_copy(update={"teachers_per_prompt": 2})
    batch = ours.make_batch(rewards, two, seed=3, traces=[2] * len(rewards))
    for group in batch.groups:  # as in training/minibatch.py
        if group.expert:
            continue
        draw_teachers(group, [0, 1], 0, 1, objective.teachers_per_prompt)
        group.teacher_rewards = group.teacher_rewards[: objective.teachers_per_prompt]
    correction = Correction("none", 2.0)
    updates = [ours.ours(batch, objective, correction, seed=0)]
    if recipe(objective).defers:
        updates.append(ours.ours(batch.waiting(objective), objective, correction, deferred=True))
    numbers = []
    for found in updates:
        places = sorted(found.gradient, key=str)
        numbers += [found.loss, len(places), *(x for place in places for x in found.gradient[place].flatten().tolist())]
    return numbers


@pytest.mark.parametrize("method", RECIPES)
def test_an_objective_s_key_changes_what_is_trained_exactly_where_the_table_has_it_read(method):
    always = {"kl_coef": 0.1} if method in RATIO else {}
    for name, value in ANOTHER.items():
        sapo = {key: {"surrogate": "sapo"} for key in ("sapo_tau_pos", "sapo_tau_neg")}
        companion = ({"aggregation_constant": {"aggregation": "constant"}} | sapo).get(name, {})
        before = Objective(method=method, **always | companion)
        of_mix, _, leaf = name.rpartition(".")
        value = before.mix.model_copy(update={leaf: value}) if of_mix else value
        after = before.model_copy(update={of_mix or name: value})
        config = Config.model_construct(objective=after)
        reads = f"objective.{name}" not in {
            key
            for key, conditions in READ_WITH.items()
            if key.startswith("objective.") and not all(each.holds(config) for each in conditions)
        }
        assert (outcome(after) != outcome(before)) == reads, (method, name)


def test_the_reference_is_read_where_the_objective_needs_one():
    for method, alpha, kl, base in itertools.product(RECIPES, (0.0, 0.5, 1.0), (0.0, 0.1), ("old", "reference")):
        objective = Objective(method=method, alpha=alpha, kl_coef=kl, ratio_base=base)
        assert uses_reference(Config.model_construct(objective=objective)) == needs_reference(objective)
    for method, alpha, ratio, tilt in itertools.product(
        RECIPES, (0.5, 1.0), ("token", "sequence"), ("token", "sequence")
    ):
        objective = Objective(method=method, alpha=alpha, ratio_level=ratio, tilt_level=tilt)
        assert uses_sums(Config.model_construct(objective=objective)) == needs_sums(objective)


# --- refused, or named


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ["objective.method=grpo", "objective.beta_gal=5", "objective.gamma=3"],
            "objective.beta_gal: 5.0 is not read with objective.method: grpo, only with objective.method: dypo",
        ),
        (
            ["objective.aggregation_constant=7"],
            "objective.aggregation_constant: 7 is not read with objective.aggregation: scale, "
            "only with objective.aggregation: constant",
        ),
        (
            ["objective.alpha=1", "objective.reference=previous"],
            "objective.reference: previous is not read with objective.method: dypo, objective.alpha: 1.0, "
            "objective.kl_coef: 0.0, objective.kl_in_reward: 0.0, objective.ratio_base: old, "
            "only with GAL's term, a process reward model, objective.kl_coef or objective.kl_in_reward above 0, or ",
        ),
        (["rollout.server_timeout=9"], "rollout.server_timeout: 9.0 is not read with rollout.engine: auto, only with"),
        (["rollout.engine=transformers", "rollout.verify_sync=sent"], "rollout.verify_sync: sent is not read with"),
        (["optimizer.min_lr=1e-7"], "optimizer.min_lr: 1e-07 is not read with optimizer.schedule: constant, only with"),
        (["rollout.refill_rounds=5"], "rollout.refill_rounds: 5 is not read with rollout.dynamic_sampling: false, "),
        (["parallel.sequence_parallel=true"], "parallel.sequence_parallel: true is not read with parallel.tensor: 1, "),
        (
            ["parallel.virtual_pipeline=2"],
            "parallel.virtual_pipeline: 2 is not read with parallel.pipeline: 1, only with",
        ),
        (["model.probe=on"], "model.probe: on is not read with model.hf: null, only with model.hf other than null"),
    ],
)
def test_a_key_that_is_not_read_is_refused_with_the_one_that_decides(tmp_path, overrides, line):
    assert complaint(file(tmp_path), *overrides).startswith(line)
    tree: dict = {}
    for override in overrides:
        dotted, _, text = override.partition("=")
        section, _, leaf = dotted.partition(".")
        tree.setdefault(section, {})[leaf] = yaml.safe_load(text) if "e-" not in text and text != "on" else text
    if "e-" not in "".join(overrides):  # a file has the same value as the command line
        assert complaint(file(tmp_path, **tree)).startswith(line)
    asked = overrides[-1:] if len(overrides) > 1 and "=sent" in overrides[-1] else []
    if asked:  # the key on the command line, its condition in the file
        del tree["rollout"]["verify_sync"]
        assert complaint(file(tmp_path, **tree), *asked).startswith(line)


@pytest.mark.parametrize("dotted", READ_WITH)
def test_every_key_at_its_default_is_read_by_every_method_and_engine(tmp_path, dotted):
    """``plan`` and a run folder's ``config.yaml`` name keys at their defaults."""
    value = DEFAULTS[dotted]
    for overrides in (["objective.method=sft"], ["objective.method=grpo"], ["rollout.engine=transformers"]):
        load_config(file(tmp_path), [*overrides, f"{dotted}={json.dumps(value)}"])


DYPO = {
    "parallel": {"tensor": 2, "sequence_parallel": True},
    "objective": {"alpha": 0.3, "gamma": 2.0, "kl_coef": 0.01},
    "rollout": {"top_p": 0.9, "dynamic_sampling": True, "refill_rounds": 5, "async_rollout": 1, "engine_memory": 0.4},
    "reward": {"workers": 4, "format": "boxed", "format_penalty": 0.1},
}


@pytest.mark.parametrize(
    ("overrides", "idle"),
    [
        (
            ["objective.method=sft"],
            {"objective.alpha", "objective.kl_coef", "rollout.top_p", "rollout.dynamic_sampling"}
            | {"rollout.refill_rounds", "rollout.async_rollout", "reward.format", "reward.format_penalty"},
        ),
        (["objective.method=grpo"], {"objective.alpha", "objective.gamma"}),
        (
            ["rollout.engine=replay", "rollout.replay=recorded"],
            {"rollout.top_p", "rollout.dynamic_sampling", "rollout.refill_rounds", "rollout.async_rollout"}
            | {"rollout.engine_memory", "reward.workers", "reward.format", "reward.format_penalty"},
        ),
        (["rollout.engine=transformers"], {"rollout.engine_memory"}),
        (["parallel.tensor=1"], {"parallel.sequence_parallel"}),
        (["rollout.dynamic_sampling=false"], {"rollout.refill_rounds"}),
        ([], set()),
    ],
)
def test_a_key_that_an_override_makes_idle_is_named_in_one_line_and_has_its_default(tmp_path, caplog, overrides, idle):
    caplog.set_level(logging.INFO, "megatron_dypo")
    path = file(tmp_path, **DYPO)
    config = load_config(path, overrides)
    said = caplog.messages
    assert len(said) == bool(idle)
    assert {name for line in said for part in line.split("; ") for name in part.split(": ")[-1].split(", ")} == idle
    assert all(lookup(config, name) == DEFAULTS[name] for name in idle)
    assert not {name for name in unread(config) if lookup(config, name) != DEFAULTS[name]}
    decided = overrides[0].replace("=", ": ") if overrides else ""
    assert all(decided in line for line in said)


def test_an_idle_key_on_the_command_line_is_refused_whatever_decides(tmp_path):
    path = file(tmp_path, objective={"method": "sft"})
    assert complaint(path, "objective.alpha=0.3").startswith("objective.alpha: 0.3 is not read with objective.method")
    path = file(tmp_path, objective={"alpha": 0.3})
    assert complaint(path, "objective.method=sft", "objective.alpha=0.2").startswith("objective.alpha: 0.2 is not read")
    with pytest.raises(UserError, match=r"objective\.alpha: 0\.2 is not read"):
        load_config(path, ["objective={method: sft, alpha: 0.2}"])


def test_a_file_that_holds_both_is_refused_whatever_the_command_line_says_of_others(tmp_path):
    path = file(tmp_path, objective={"method": "grpo", "gamma": 2.0})
    assert complaint(path, "optimizer.lr=1").startswith("objective.gamma: 2.0 is not read with objective.method: grpo")
    load_config(path, ["objective.method=dypo"])


# --- run folders


def test_what_a_run_with_idle_keys_writes_is_read_again_and_goes_on(tmp_path):
    path = file(tmp_path, **DYPO, trainer={"run_dir": str(tmp_path / "run")}, data={"train": "none"})
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    config = load_config(path, ["objective.method=sft"])
    assert fingerprint(config)["objective.alpha"] == 0.3, "as written"
    run_folder.describe(config, run_dir)
    again = load_config(run_dir / "config.yaml")
    assert dump(again) == dump(config)
    for resumed in (config, again):
        assert run_folder.checkpoints(resumed) == []
    differing = load_config(path, ["objective.method=dypo"])
    with pytest.raises(UserError, match=r"differing: objective\.method \(was 'sft', now 'dypo'\)$"):
        run_folder.checkpoints(differing)


def test_an_engine_that_reads_less_resumes_a_run_and_hands_it_back(tmp_path):
    path = file(tmp_path, **DYPO, trainer={"run_dir": str(tmp_path / "run")}, data={"train": "none"})
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    for overrides in ([], ["rollout.engine=replay", "rollout.replay=recorded"], []):
        config = load_config(path, overrides)
        assert run_folder.checkpoints(config) == []
        run_folder.describe(config, run_dir)


def test_a_run_folder_s_configuration_of_before_such_keys_were_refused_is_read(tmp_path):
    path = file(tmp_path, objective={"method": "grpo", "gamma": 2.0})
    assert load_config(path, recorded=True).objective.gamma == 1.0


# --- who prints and documents overrides


def overrides_in(text: str) -> list[list[str]]:
    """Return the ``section.key=value`` words of each command or code span that has some."""
    sections = "|".join(Config.model_fields)
    word = rf"(?:{sections})\.[a-z_.]+=[^\s`'\"\\,;)]+"
    spans = re.findall(r"`([^`]+)`", text) + re.sub(r"\\\n", " ", text).splitlines()
    return [found for span in spans if (found := re.findall(word, span))]


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("path", EXAMPLES, ids=[path.parent.name for path in EXAMPLES])
def test_every_example_loads_with_each_of_its_documented_overrides(path):
    own = [page for pattern in ("*.md", "*.sh", "*.yaml") for page in path.parent.glob(pattern)]
    lines = [line for page in PAGES for line in page.read_text().splitlines() if path.parent.name in line]
    for overrides in overrides_in("\n".join([*(page.read_text() for page in own), *lines])):
        load_config(path, overrides)
    for method, engine in itertools.product(RECIPES, (["vllm"], ["transformers"], ["replay", "rollout.replay=folder"])):
        load_config(path, [f"objective.method={method}", f"rollout.engine={engine[0]}", *engine[1:]])


def test_overrides_that_others_make_idle_are_left_out_of_a_printed_command(tmp_path):
    path = file(tmp_path, rollout={"engine": "server", "servers": ["http://a:1"]})
    given = ["rollout.server_timeout=9", "trainer.steps=3", "rollout.engine=vllm", "rollout.servers=[]"]
    assert still_read(path, given) == given[1:]
    load_config(path, given[1:])


def test_help_and_the_page_say_when_a_key_is_read():
    page, reference = render.page(), " ".join(render.key_reference().split())
    for name in READ_WITH:
        assert f"Read with {read_with(name)}." in page.replace("\\|", "|")
        assert f"Read with {read_with(name)}." in reference
    assert read_with("objective.gamma") == "recipes that imitate teachers"
    for kind, methods in KINDS.items():
        assert f"| {kind} | `{'`, `'.join(methods)}` |" in page
        assert f"{kind}: {', '.join(methods)}" in reference
