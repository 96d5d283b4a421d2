"""Measure how full micro-batches are, how evenly work is distributed, and how much computation is padding.

python -m benchmarks.packing

It depends on no clock: made-up lengths go through the planner that training uses. SEEDS batches are planned per
setting; "filled" is their tokens over the planned micro-batches' budgets, "computed" their tokens over the tokens that
go through the model. Packing fills up for tensor- and context-parallel ranks only; with padding each batch is as wide
as its longest sequence.

Writes benchmarks/results/packing.json; ``python -m benchmarks.tables`` puts it into benchmarks/README.md.
"""

from __future__ import annotations

import itertools
import json
import math
import random
from statistics import fmean
from typing import Any

from benchmarks.machine import RESULTS
from megatron_dypo.policy.micro_batch import aligned_to
from megatron_dypo.training.packing import MicroBatchPlan, cost, plan_micro_batches

MEAN, CAP, SIGMA = 2500, 8192, 0.8
RESPONSES = 8
SEEDS = 10
BUDGETS = (16384, 8192)
# (prompts, data-parallel ranks, number of micro-batches a multiple of)
BATCHES = [(64, 1, 1), (64, 2, 1), (64, 4, 1), (64, 8, 1), (64, 4, 4), (512, 32, 1), (512, 32, 4), (8, 8, 1)]
LAYOUTS = [(1, 1), (8, 1), (1, 2), (8, 2), (8, 8)]  # (tensor, context) ranks


def lognormal_lengths(count: int, mean: float, cap: int, seed: int) -> list[int]:
    """Return lengths in tokens, lognormal with this mean before they are capped."""
    generator, mu = random.Random(seed), math.log(mean) - SIGMA**2 / 2
    return [min(cap, max(1, round(generator.lognormvariate(mu, SIGMA)))) for _ in range(count)]


def packed_tokens(lengths: list[int], plan: MicroBatchPlan, tensor: int, context: int) -> int:
    """Return tokens computed: segments padded to context-parallel slices, micro-batches to tensor-parallel ranks."""
    align = aligned_to(context)
    total = 0
    for members in itertools.chain.from_iterable(plan):
        filled = sum(-(-lengths[i] // align) * align for i in members) or 1
        total += -(-filled // (align * tensor)) * align * tensor
    return total


def padded_tokens(lengths: list[int], budget: int) -> int:
    """Return tokens computed if consecutive sequences fill batches of at most ``budget`` tokens, padding included."""
    total = rows = longest = 0
    for length in lengths:
        if (rows + 1) * max(longest, length) > budget:
            total += rows * longest
            rows = longest = 0
        rows, longest = rows + 1, max(longest, length)
    return total + rows * longest


def spread_of(values: list[float]) -> float:
    """Return the largest value over the mean."""
    return max(values) / fmean(values)


def planned(prompts: int, ranks: int, multiple: int, budget: int) -> dict[str, Any]:
    """Return means over the seeds, and the worst of them."""
    counts, filled, perfect, over_ranks, over_batches = [], [], [], [], []
    for seed in range(SEEDS):
        lengths = lognormal_lengths(prompts * RESPONSES, MEAN, CAP, seed)
        plan = plan_micro_batches(lengths, ranks, budget, multiple)
        costs = [[sum(cost(lengths[i]) for i in members) for members in share] for share in plan]
        step, used = ranks * multiple, sum(lengths) / budget
        counts.append(len(plan[0]))
        filled.append(used / (ranks * len(plan[0])))
        perfect.append(used / (math.ceil(used / step) * step))
        over_ranks.append(spread_of([sum(share) for share in costs]))
        over_batches.append(spread_of(list(itertools.chain.from_iterable(costs))))
    figures = {
        "micro_batches_a_rank": fmean(counts),
        "filled": fmean(filled),
        "filled_least": min(filled),
        "filled_if_perfect": fmean(perfect),
        "busiest_rank": fmean(over_ranks),
        "busiest_rank_worst": max(over_ranks),
        "costliest_micro_batch": fmean(over_batches),
    }
    setting = {"prompts": prompts, "responses": RESPONSES, "ranks": ranks, "multiple": multiple, "budget": budget}
    return setting | {name: round(value, 4) for name, value in figures.items()}


def computed(budget: int, prompts: int = 64, ranks: int = 8) -> dict[str, Any]:
    """Return tokens over computed tokens, by tensor x context ranks, and of padded batches under the same budget."""
    tokens, totals = 0, dict.fromkeys([f"{t}x{c}" for t, c in LAYOUTS] + ["padded", "padded_sorted"], 0)
    for seed in range(SEEDS):
        lengths = lognormal_lengths(prompts * RESPONSES, MEAN, CAP, seed)
        plan = plan_micro_batches(lengths, ranks, budget)
        tokens += sum(lengths)
        for tensor, context in LAYOUTS:
            totals[f"{tensor}x{context}"] += packed_tokens(lengths, plan, tensor, context)
        totals["padded"] += padded_tokens(lengths, budget)
        totals["padded_sorted"] += padded_tokens(sorted(lengths), budget)
    return {"budget": budget} | {name: round(tokens / total, 4) for name, total in totals.items()}


def report() -> dict[str, Any]:
    return {
        "lengths": {"mean": MEAN, "cap": CAP, "sigma": SIGMA, "seeds": SEEDS},
        "plans": [planned(*batch, budget) for budget in BUDGETS for batch in BATCHES],
        "computed": [computed(budget) for budget in BUDGETS],
    }


def main() -> None:
    (RESULTS / "packing.json").write_text(json.dumps(report(), indent=1) + "\n")


if __name__ == "__main__":
    main()
