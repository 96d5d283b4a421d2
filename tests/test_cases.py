"""``objective CASE.json``: every published case of a supported system to 1e-12, the others answered in one line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from megatron_dypo.cases.command import result, table
from megatron_dypo.cases.translate import LATER, SYSTEMS
from megatron_dypo.errors import UserError

FILE = Path(__file__).resolve().parents[2] / "shared" / "cases" / "seed-systems.json"
CASES = {case["id"]: case for case in json.loads(FILE.read_text())["cases"]} if FILE.is_file() else {}
needs_cases = pytest.mark.skipif(not CASES, reason=f"{FILE} is not here")


def differences(actual: Any, expected: Any, where: str) -> list[str]:
    """Where two results differ by more than 1e-12, absolutely."""
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
    if case["system"] in LATER:
        with pytest.raises(UserError, match="not yet supported"):
            result(case, "case.json")
        return
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
    """By hand: A = -1/2 and 1/2, a token weighs 1/8 of it, and the trace's derivative is gamma p / (p + gamma)^2."""
    numbers = result(SCORED, "case.json")
    p = [math.exp(-1.0), math.exp(-2.0)]
    expected = [[1 / 16], [-0.2 * x / (x + 0.2) ** 2 / 16 for x in p]]
    assert not differences(numbers["dloss_dlogp"], expected, "dloss_dlogp")
    assert numbers["loss"] == pytest.approx(1 / 16 - sum(x / (x + 0.2) for x in p) / 16, rel=1e-12)
    assert numbers["advantages"] == [-0.5, 0.5] and numbers["config"]["objective.shape_gamma"] == 0.2


BAD = [
    ({"system": "SRFT"}, "system 'SRFT' is not yet supported"),
    ({"system": "TRPO"}, "system 'TRPO' is unknown"),
    ({"settings": {"gama": 0.1}}, "settings.gama: unknown"),
    ({"settings": {"aggregation": "median of tokens"}}, "settings.aggregation: 'median of tokens'"),
    ({"settings": {"constant": 0}}, "objective.aggregation_constant"),
    ({"settings": {"entropy_coef": 0.1}}, "entropy is needed"),
    (
        {"system": "Oat-Zero", "settings": {}, "sequences": [SCORED["sequences"][0] | {"finished": "no"}]},
        r"sequences\[0\].finished: expected true or false, got 'no'",
    ),
    ({"sequences": []}, "sequences: expected a list of objects"),
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
    assert {case["system"] for case in CASES.values()} == {*SYSTEMS, *LATER}
