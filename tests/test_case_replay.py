"""``objective CASE.json`` against the trainer: the configuration that it prints, in a real update.

A published case's rewards, prompts and lengths become groups; a tiny Megatron policy trains on them with the printed
``config``. The case with that update's own log-probs and entropies, given to the command again, must give each token
the slopes that the update used. The command computes in float64, the update's streams are float32.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_dypo.cases.command import show
from megatron_dypo.config.load import load_keys
from megatron_dypo.config.schema import Config
from megatron_dypo.objectives.recipes import recipe
from megatron_dypo.records import Group, Prompt, Response, Teacher
from megatron_dypo.rollout.sampling import give_unfinished_reward
from tests.ranks import run_ranks
from tests.test_cases import CASES, needs_cases
from tests.updates import second_update

REPLAYED = (
    "sft-token-mean", "rl-dr-grpo-clip-entropy", "zoo-grpo-std-kl-entropy", "superrl-gate-advantage-nll-sum",
    "hpt-gate-1-of-2", "luffy-shaped-token-mean", "relift-rl-step", "oat-dr-grpo-truncated",
    "chord-mu", "chord-phi",
    "srft-paper", "srft-hpt-reimplementation",
)  # fmt: skip
SINGLE = 2e-6  # of the largest slope: float32, and the exponential of a difference of two log-probs in it
SOURCES = {"ROLLOUT": "rollout", "TEACHER": "demo", "EXPERT": "expert"}
STREAMS = {"logp": "logp", "entropy": "entropy", "old": "old_logp", "reference": "ref_logp"}


def printed(case: dict, folder: Path, capsys: pytest.CaptureFixture) -> dict:
    """Return what the command prints for a case."""
    path = folder / "case.json"
    path.write_text(json.dumps(case))
    show(path, as_table=False)
    return json.loads(capsys.readouterr().out)


def groups_of(case: dict, name: str, config: Config) -> tuple[list[Group], dict[tuple, int]]:
    """Return groups of the case's prompts, and the case's index of each sequence: (group, source, sample) -> place."""
    random = np.random.default_rng(len(name))
    scored = recipe(config.objective).scores_traces
    members: dict[int, dict[str, list[int]]] = {}  # places of each prompt's sequences by source
    for place, sequence in enumerate(case["sequences"]):
        members.setdefault(sequence["prompt"], {}).setdefault(sequence["source"], []).append(place)
    groups, places = [], {}
    for g, by_source in enumerate(members.values()):
        places |= {(g, source, i): place for source, of in by_source.items() for i, place in enumerate(of)}
        rollouts, demos, experts = ([case["sequences"][i] for i in by_source.get(of, ())] for of in SOURCES.values())
        responses = [
            Response(
                random.integers(3, 128, len(rollout["logp"])).astype(np.int32),
                np.full(len(rollout["logp"]), -4.0, np.float32),
                "stop" if rollout.get("finished", True) else "length",
                rollout["reward"],
            )
            for rollout in rollouts
        ]
        for response in responses:
            give_unfinished_reward(response, config)
        traces = demos or experts
        teachers = tuple(Teacher("t", "x" * len(trace["logp"])) for trace in traces)
        rewards = tuple(1.0 if trace.get("reward") is None else trace["reward"] for trace in traces * scored)
        prompt = Prompt(f"{name}{g}", "", teachers)
        ids, draw = random.integers(3, 128, 5).astype(np.int32), tuple(range(len(traces)))
        groups.append(Group(prompt, ids, responses, None, draw, rewards, expert=bool(experts)))
    return groups, places


def trace_of_its_length(group: Group, i: int) -> np.ndarray:
    random = np.random.default_rng(sum(map(ord, group.prompt.id)) + i)
    return random.integers(3, 128, len(group.prompt.teachers[i].trace)).astype(np.int32)


@needs_cases
@pytest.mark.parametrize("name", REPLAYED)
def test_an_update_by_a_printed_configuration_has_the_slopes_that_the_command_prints(name, tmp_path, capsys):
    case = CASES[name]
    keys = printed(case, tmp_path, capsys)["config"]
    config = load_keys([f"{key}={json.dumps(value)}" for key, value in keys.items()], "config")
    (first, _), (second, places) = (groups_of(case, name, config) for name in ("first", "second"))
    sections = {"objective": config.objective.model_dump()}
    step = case["settings"].get("step", 2)
    (update,) = run_ranks(1, second_update, sections, first, second, trace_of_its_length, step)
    sequences = [dict(sequence) for sequence in case["sequences"]]
    slopes = {
        "dlogp": [[0.0] * len(x["logp"]) for x in sequences],
        "dentropy": [[0.0] * len(x["logp"]) for x in sequences],
    }
    for found in update["sequences"]:
        place = places[found["group"], SOURCES[found["kind"]], found["sample"]]
        sequences[place] |= {theirs: found[ours] for ours, theirs in STREAMS.items() if ours in found}
        for of, values in slopes.items():
            values[place] = found.get(of, values[place])
    again = printed(case | {"sequences": sequences}, tmp_path, capsys)
    assert again["config"] == keys
    for of, ours in slopes.items():
        theirs = again.get(f"dloss_{of}")
        if of == "dentropy" and not config.objective.entropy_coef:
            assert not np.any(np.concatenate(ours)) and not (theirs and np.any(np.concatenate(theirs)))
            continue
        ours_N, theirs_N = np.concatenate(ours), np.concatenate(theirs)
        assert np.abs(ours_N - theirs_N).max() <= SINGLE * np.abs(theirs_N).max() and np.abs(theirs_N).max() > 1e-5
    assert update["metrics"]["loss/total"] == pytest.approx(again["loss"], rel=1e-5, abs=1e-6)
    ratio_N = [found["logp"] != found["old"] for found in update["sequences"] if "old" in found]
    assert all(ratio_N), "no ratio is 1"


@needs_cases
def test_five_systems_are_replayed():
    assert len({CASES[name]["system"] for name in REPLAYED}) >= 5
