"""``objective CASE.json`` against the trainer: the configuration that it prints, through a real update.

A published case's rewards, prompts and lengths become groups; a tiny Megatron policy trains on them with the printed
``config``. The case with that update's own log-probs and entropies, put to the command again, must give each token the
slopes that the update used. The command computes in float64, the update's streams are float32.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_dypo.cases.command import show
from megatron_dypo.config.load import load_keys
from megatron_dypo.objectives.recipes import recipe
from megatron_dypo.records import Group, Prompt, Response, Teacher
from tests.ranks import run_ranks
from tests.test_cases import CASES, needs_cases
from tests.updates import second_update

REPLAYED = (
    "sft-token-mean", "rl-dr-grpo-clip-entropy", "zoo-grpo-std-kl-entropy", "superrl-gate-advantage-nll-sum",
    "hpt-gate-1-of-2", "luffy-shaped-token-mean", "relift-rl-step", "chord-mu", "chord-phi",
)  # fmt: skip
SINGLE = 2e-6  # of the largest slope: float32, and the exponential of a difference of two log-probs in it
KINDS = {"ROLLOUT": "rollout", "TEACHER": "demo", "EXPERT": "expert"}
STREAMS = {"logp": "logp", "entropy": "entropy", "old": "old_logp", "reference": "ref_logp"}


def printed(case: dict, folder: Path, capsys: pytest.CaptureFixture) -> dict:
    """What the command prints for a case."""
    path = folder / "case.json"
    path.write_text(json.dumps(case))
    show(path, as_table=False)
    return json.loads(capsys.readouterr().out)


def groups_of(case: dict, name: str, scored: bool) -> tuple[list[Group], dict[tuple, int]]:
    """Groups of the case's prompts, and where it lists a group's sequences: (group, source, sample) -> place.

    ``scored``: whether its demos have rewards.
    """
    random = np.random.default_rng(len(name))
    prompts = list(dict.fromkeys(sequence["prompt"] for sequence in case["sequences"]))
    groups, places = [], {}
    for g, prompt in enumerate(prompts):
        members: dict[str, list[dict]] = {"rollout": [], "demo": [], "expert": []}
        for place, sequence in enumerate(case["sequences"]):
            if sequence["prompt"] == prompt:
                places[g, sequence["source"], len(members[sequence["source"]])] = place
                members[sequence["source"]].append(sequence)
        responses = [
            Response(
                random.integers(3, 128, len(rollout["logp"])).astype(np.int32),
                np.full(len(rollout["logp"]), -4.0, np.float32),
                "stop",
                rollout["reward"],
            )
            for rollout in members["rollout"]
        ]
        demos = members["demo"] + members["expert"]
        teachers = tuple(Teacher("t", "x" * len(demo["logp"])) for demo in demos)
        rewards = tuple(1.0 if demo.get("reward") is None else demo["reward"] for demo in demos)
        prompt_ids = random.integers(3, 128, 5).astype(np.int32)
        draw = tuple(range(len(demos)))
        scores = rewards if scored else ()
        is_expert = bool(members["expert"])
        groups.append(Group(Prompt(f"{name}{g}", "", teachers), prompt_ids, responses, None, draw, scores, is_expert))
    return groups, places


def trace_of_its_length(group: Group, i: int) -> np.ndarray:
    random = np.random.default_rng(sum(map(ord, group.prompt.id)) + i)
    return random.integers(3, 128, len(group.prompt.teachers[i].trace)).astype(np.int32)


@needs_cases
@pytest.mark.parametrize("name", REPLAYED)
def test_an_update_by_a_printed_configuration_has_the_slopes_that_the_command_prints(name, tmp_path, capsys):
    case = dict(CASES[name])
    if "step" in case["settings"]:
        case["settings"] = case["settings"] | {"step": 2}  # of the second update
    keys = printed(case, tmp_path, capsys)["config"]
    config = load_keys([f"{key}={json.dumps(value)}" for key, value in keys.items()], "config")
    scored = recipe(config.objective).scores_traces
    (first, _), (second, places) = (groups_of(case, name, scored) for name in ("first", "second"))
    sections = {"objective": config.objective.model_dump()}
    (update,) = run_ranks(1, second_update, sections, first, second, trace_of_its_length)
    sequences = [dict(sequence) for sequence in case["sequences"]]
    slopes = {
        "dlogp": [[0.0] * len(x["logp"]) for x in sequences],
        "dentropy": [[0.0] * len(x["logp"]) for x in sequences],
    }
    for found in update["sequences"]:
        place = places[found["group"], KINDS[found["kind"]], found["sample"]]
        sequences[place] |= {theirs: found[ours] for ours, theirs in STREAMS.items() if ours in found}
        for of, values in slopes.items():
            values[place] = found.get(of, values[place])
    again = printed(case | {"sequences": sequences}, tmp_path, capsys)
    assert again["config"] == keys
    for of, ours in slopes.items():
        theirs = again.get(f"dloss_{of}")
        assert (theirs is None) == (of == "dentropy" and not config.objective.entropy_coef)
        if theirs is None:
            continue
        ours_N, theirs_N = np.concatenate(ours), np.concatenate(theirs)
        assert np.abs(ours_N - theirs_N).max() <= SINGLE * np.abs(theirs_N).max() and np.abs(theirs_N).max() > 1e-5
    assert update["metrics"]["loss/total"] == pytest.approx(again["loss"], rel=1e-5, abs=1e-6)
    ratio_N = [found["logp"] != found["old"] for found in update["sequences"] if "old" in found]
    assert all(ratio_N), "no ratio is 1"


@needs_cases
def test_five_systems_are_replayed():
    assert len({CASES[name]["system"] for name in REPLAYED}) >= 5
