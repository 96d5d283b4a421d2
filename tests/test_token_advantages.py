"""Advantages of single tokens equal the numeric cases of PPO and PRIME, and no cut of the batch changes them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_dypo.objectives.token_advantages import Sums, gae, largest_to_go, leave_one_out, rewards_to_go

CASES = Path(__file__).parents[2] / "shared/cases/seed-systems.json"
by_id = {case["id"]: case for case in json.loads(CASES.read_text())["cases"]} if CASES.is_file() else {}


def doubles(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def summed(responses: list[Tensor]) -> Sums:
    return sum((Sums.of(values_n) for values_n in responses), Sums())


def assert_equal(found: list[Tensor], expected: list[list[float]]) -> None:
    for ours_n, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours_n, doubles(theirs), rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(not by_id, reason="needs ../shared/cases")
@pytest.mark.parametrize("name", ["orz-policy", "simplerl-v0-policy"])
def test_gae_its_returns_and_whitening_equal_the_cases(name: str) -> None:
    case = by_id[name]
    settings, expected = case["settings"], case["expected"]
    raw, returns = [], []
    for sequence, outcome in zip(case["sequences"], settings["rewards_seen"], strict=True):
        rewards_n = -settings["kl_in_reward"] * (doubles(sequence["old_logp"]) - doubles(sequence["ref_logp"]))
        rewards_n[-1] += outcome
        values_n = doubles(sequence["old_value"])
        raw.append(gae(rewards_n, values_n, settings["gamma"], settings["lambda"]))
        returns.append(raw[-1] + values_n)
    assert_equal(raw, expected["advantages_raw"])
    assert_equal(returns, expected["returns"])
    assert_equal([summed(raw).whiten(raw_n) for raw_n in raw], expected["advantages"])


@pytest.mark.skipif(not by_id, reason="needs ../shared/cases")
@pytest.mark.parametrize("rule", ["code", "paper"])
def test_leave_one_out_process_rewards_equal_the_cases(rule: str) -> None:
    case = by_id[f"prime-policy-{rule}"]
    expected = case["expected"]
    ratios = [doubles(sequence["prm_logp"]) - doubles(sequence["ref_logp"]) for sequence in case["sequences"]]
    scale = largest_to_go(ratios) + 1e-6
    process = [ratio_n / scale for ratio_n in ratios]
    outcomes = [sequence["reward"] for sequence in case["sequences"]]
    means = [process_n.mean().item() for process_n in process]
    raw = [
        leave_one_out(
            outcomes[i], process_n, outcomes[:i] + outcomes[i + 1 :], means[:i] + means[i + 1 :], as_code=rule == "code"
        )
        for i, process_n in enumerate(process)
    ]
    assert_equal(process, expected["process_rewards"])
    assert_equal(raw, expected["advantages_raw"])
    assert_equal([summed(raw).whiten(raw_n, sample=True) for raw_n in raw], expected["advantages"])


def test_a_discounted_reward_to_go_is_the_sum_by_hand() -> None:
    rewards_n = doubles([1.0, -2.0, 0.5, 4.0])
    by_hand = [sum(0.9 ** (s - t) * rewards_n[s].item() for s in range(t, 4)) for t in range(4)]
    torch.testing.assert_close(rewards_to_go(rewards_n, 0.9), doubles(by_hand), rtol=1e-14, atol=0)
    torch.testing.assert_close(rewards_to_go(rewards_n), doubles([3.5, 2.5, 4.5, 4.0]), rtol=0, atol=0)


def test_whitening_does_not_depend_on_how_ranks_share_the_responses() -> None:
    drawn = torch.Generator().manual_seed(0)
    responses = [torch.randn(n, dtype=torch.float64, generator=drawn) * 3 + 5 for n in (4, 1, 7, 2)]
    whole = summed(responses)
    parts = summed(responses[:1]) + summed(responses[1:3]) + summed(responses[3:]) + Sums()
    together = torch.cat(responses)
    for sample in (False, True):
        variance = together.var(correction=int(sample))
        for values_n in responses:
            torch.testing.assert_close(whole.whiten(values_n, sample), parts.whiten(values_n, sample))
            expected_n = (values_n - together.mean()) / (variance + 1e-8 * sample).sqrt()
            torch.testing.assert_close(whole.whiten(values_n, sample), expected_n, rtol=1e-10, atol=1e-12)


def test_tokens_that_are_all_alike_have_no_advantage() -> None:
    values_n = doubles([2.0, 2.0, 2.0])
    assert not Sums.of(values_n).whiten(values_n).any() and not Sums.of(values_n[:1]).whiten(values_n[:1], True).any()
