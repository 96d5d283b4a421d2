"""``objective CASE.json``: every published case of a supported system to 1e-12, the others answered in one line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from megatron_dypo.cases.command import result, table
from megatron_dypo.cases.translate import SYSTEMS
from megatron_dypo.errors import UserError

FILE = Path(__file__).resolve().parents[2] / "shared" / "cases" / "seed-systems.json"
CASES = {case["id"]: case for case in json.loads(FILE.read_text())["cases"]} if FILE.is_file() else {}
needs_cases = pytest.mark.skipif(not CASES, reason=f"{FILE} is not here")


def differences(actual: Any, expected: Any, where: str) -> list[str]:
    """Return where two results differ by more than 1e-12, absolutely."""
    if isinstance(expected, dict):
        return [line for key, value in expected.items() for line in differences(actual[key], value, f"{where}.{key}")]
    if isinstance(expected, list):
        assert len(actual) == len(expected), where
        return [line for i, value in enumerate(expected) for line in differences(actual[i], value, f"{where}[{i}]")]
    same = abs(actual - expected) <= 1e-12 if isinstance(expected, float) else actual == expected
    return [] if same else [f"{where}: {actual} is not {expected}"]


@needs_cases
@pytest.mark.parametrize("name", CASES)
def test_every_case_of_a_supported_system_is_met(name: str) -> None:
    case = CASES[name]
    numbers = result(case, "case.json")
    assert not differences(numbers, case["expected"], name)
    assert table(case, numbers)


SCORED = {
    "system": "LUFFY",
    "settings": {"gamma": 0.2, "constant": 4, "advantage_std": "none", "clip": None},
    "sequences": [
        {"name": "r", "prompt": 0, "source": "rollout", "reward": 0.0, "logp": [-0.5], "old_logp": [-0.5]},
        {"name": "d", "prompt": 0, "source": "demo", "reward": 1.0, "logp": [-1.0, -2.0]},
    ],
}


def test_the_trace_is_a_member_of_its_group_and_its_tokens_are_shaped() -> None:
    """By hand, A = -1/2 and 1/2, a token has weight 1/8 of it, the trace's derivative is gamma p / (p + gamma)^2."""
    numbers = result(SCORED, "case.json")
    p = [math.exp(-1.0), math.exp(-2.0)]
    expected = [[1 / 16], [-0.2 * x / (x + 0.2) ** 2 / 16 for x in p]]
    assert not differences(numbers["dloss_dlogp"], expected, "dloss_dlogp")
    assert numbers["loss"] == pytest.approx(1 / 16 - sum(x / (x + 0.2) for x in p) / 16, rel=1e-12)
    assert numbers["advantages"] == [-0.5, 0.5] and numbers["config"]["objective.shape_gamma"] == 0.2


CHORD = {
    "system": "CHORD",
    "settings": {"warmup": 2, "decay": 0, "peak": 0.5, "valley": 0.25, "shape": None, "aggregation": "mean of each"},
    "sequences": [
        {"prompt": 0, "source": "rollout", "reward": reward, "logp": [-0.5], "old_logp": [-0.5]}
        for reward in (1.0, 0.0)
    ]
    + [{"prompt": 0, "source": "expert", "logp": logp} for logp in ([-1.0], [-2.0, -3.0])],
}


def test_experts_are_a_batch_of_their_own_with_the_share_of_the_step() -> None:
    """By hand, mu = 1/4 at step 1; A is 1 and -1 (std 1/2), and each expert has half of their share, by length."""
    numbers = result(CHORD | {"settings": CHORD["settings"] | {"step": 1}}, "case.json")
    A = 0.5 / (0.5 + 1e-6)
    expected = [[-0.75 / 2 * A], [0.75 / 2 * A], [-1 / 8], [-1 / 16, -1 / 16]]
    assert not differences(numbers["dloss_dlogp"], expected, "dloss_dlogp")
    assert numbers["mu"] == 0.25 and numbers["loss"] == pytest.approx(1 / 8 + 5 / 16, rel=1e-12)
    assert "route_of_prompt" not in numbers and len(numbers["advantages"]) == 2


def test_a_schedule_alone_is_a_number_at_a_step_and_a_list_over_steps() -> None:
    case = {"system": "CHORD", "settings": CHORD["settings"]}
    assert result({**case, "settings": case["settings"] | {"step": 0}}, "case.json")["mu"] == 0.0
    assert result({**case, "settings": case["settings"] | {"steps": [0, 1, 2]}}, "case.json")["mu"] == [0.0, 0.25, 0.25]
    with pytest.raises(UserError, match="grpo has no share that changes with the step"):
        result({"system": "RL (GRPO)", "settings": {"steps": [1]}}, "case.json")


BAD = [
    ({"system": "SimpleRL-Zero", "settings": {}}, r"sequences\[0\].old_value: needed by a critic"),
    ({"system": "SimpleRL-Zero", "settings": {"rewards_seen": [1.0]}}, "settings.rewards_seen: expected a number for"),
    ({"system": "TRPO"}, "system 'TRPO' is unknown"),
    ({"settings": {"gama": 0.1}}, "settings.gama: unknown"),
    ({"settings": {"aggregation": "median of tokens"}}, "settings.aggregation: 'median of tokens'"),
    ({"settings": {"constant": 0}}, "objective.aggregation_constant"),
    ({"settings": {"entropy_coef": 0.1}}, "entropy is needed"),
    (
        {"system": "Oat-Zero", "settings": {}, "sequences": [SCORED["sequences"][0] | {"finished": "no"}]},
        r"sequences\[0\].finished: expected true or false, got 'no'",
    ),
    ({"system": "SRFT", "settings": {}}, "sequences: entropy is needed by objective.method: srft"),
    ({"system": "SRFT", "settings": {"clip": 0.2}}, "settings.clip: 0.2: only null is supported"),
    ({"system": "SRFT", "settings": {"entropy_level": "word"}}, "settings.entropy_level: 'word'"),
    (
        {"system": "SRFT", "settings": {"kl_coef": 0.1}},
        "objective.kl_coef: 0.1 is not read with",
    ),
    ({"sequences": []}, "sequences: expected a list of objects"),
    (CHORD | {"settings": {"peak": 1.5}}, r"objective.mix.peak: .*\(got 1.5\)"),
    (CHORD | {"settings": {"step": -1}}, "settings.step: expected a whole number from 0 on, got -1"),
    (CHORD | {"settings": {"shape": "sigma"}}, "settings.shape: 'sigma'"),
    ({"sequences": [{"prompt": 0, "source": "rollout", "logp": [0.1, "x"]}]}, r"sequences\[0\].logp"),
    ({"sequences": [{"prompt": 0, "source": "teacher", "logp": [0.1]}]}, r"sequences\[0\].source: 'teacher'"),
]


@pytest.mark.parametrize(("changes", "line"), BAD, ids=[line for _, line in BAD])
def test_what_is_not_a_case_is_answered_in_one_line_that_names_the_file(changes: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=f"^case.json: .*{line}") as caught:
        result(SCORED | changes, "case.json")
    assert "\n" not in str(caught.value)


@needs_cases
def test_the_cases_systems_are_known() -> None:
    assert {case["system"] for case in CASES.values()} == {*SYSTEMS}
