"""Which sequence goes into which micro-batch of which data-parallel rank. Pure Python, the same on every rank.

Invariants (tests/test_batching.py):
- every sequence is in exactly one micro-batch;
- a micro-batch holds at most ``budget`` tokens, or one single longer sequence;
- every rank has the same number of micro-batches, some perhaps empty: a rank without data still takes part;
- the plan depends on the lengths and their order alone, not on who computes it.
"""

from __future__ import annotations

MicroBatchPlan = list[list[list[int]]]  # [rank][micro-batch][sequence index]

QUADRATIC = 1 / 16384  # attention's share of the cost: as much as the linear part at about this length


def cost(length: int) -> float:
    """Relative time of one sequence: linear layers plus attention."""
    return length * (1 + length * QUADRATIC)


def plan_micro_batches(lengths: list[int], ranks: int, budget: int) -> MicroBatchPlan:
    """Pack sequences of these lengths (tokens) for ``ranks`` data-parallel ranks, balanced by cost.

    First-fit decreasing finds how many micro-batches are needed; they are refilled evenly where that still fits.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    bins = _first_fit(lengths, order, budget)
    count = -(-len(bins) // ranks) * ranks
    bins = _spread(lengths, order, count, budget) or bins + [[] for _ in range(count - len(bins))]
    shares: MicroBatchPlan = [[] for _ in range(ranks)]
    loads = [0.0] * ranks
    for members in sorted(bins, key=lambda members: -sum(cost(lengths[i]) for i in members)):
        rank = min((r for r in range(ranks) if len(shares[r]) < count // ranks), key=lambda r: loads[r])
        shares[rank].append(sorted(members))
        loads[rank] += sum(cost(lengths[i]) for i in members)
    return shares


def _first_fit(lengths: list[int], order: list[int], budget: int) -> list[list[int]]:
    bins: list[list[int]] = []
    room: list[int] = []
    for i in order:
        place = next((b for b, free in enumerate(room) if lengths[i] <= free), None)
        if place is None:
            bins.append([])
            room.append(budget)
            place = len(bins) - 1
        bins[place].append(i)
        room[place] -= lengths[i]
    return bins


def _spread(lengths: list[int], order: list[int], count: int, budget: int) -> list[list[int]] | None:
    """Longest first into the cheapest of ``count`` micro-batches that has room; None where one finds no room."""
    bins: list[list[int]] = [[] for _ in range(count)]
    tokens, costs = [0] * count, [0.0] * count
    for i in order:
        fitting = [b for b in range(count) if tokens[b] + lengths[i] <= budget or not bins[b]]
        if not fitting:
            return None
        place = min(fitting, key=lambda b: (costs[b], b))
        bins[place].append(i)
        tokens[place] += lengths[i]
        costs[place] += cost(lengths[i])
    return bins
