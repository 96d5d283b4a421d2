"""Assign sequences to micro-batches and data-parallel ranks. Pure Python, the same on every rank.

Invariants (tests/test_minibatches.py):
- every sequence is in exactly one micro-batch;
- a micro-batch holds at most ``budget`` tokens, or one single longer sequence;
- every rank has the same number of micro-batches, some possibly empty: a rank without data still takes part;
- that number is a multiple of ``multiple``, and 0 without sequences;
- a rank's micro-batches are sorted by cost, costliest first: neighbours in a pipeline take about equally long,
  and what does not fit into memory fails at once;
- the plan depends only on the lengths and their order, not on the rank that computes it.

Time is O(n log n) for n sequences: 65,536 take a fraction of a second.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from heapq import heappop, heappush, heapreplace

MicroBatchPlan = list[list[list[int]]]  # [rank][micro-batch][sequence index]

QUADRATIC = 1 / 16384  # attention's share of the cost: it equals the linear part at about this length


def cost(length: int) -> float:
    """Return the relative time of one sequence: linear layers plus attention."""
    return length * (1 + length * QUADRATIC)


def plan_micro_batches(lengths: list[int], ranks: int, budget: int, multiple: int = 1) -> MicroBatchPlan:
    """Pack sequences of these lengths (tokens) for ``ranks`` data-parallel ranks, balanced by cost.

    ``multiple``: required divisor of the number of micro-batches in an interleaved pipeline. Best-fit decreasing finds
    how many are needed. Sequences are spread evenly over ranks, and each rank's over that many micro-batches; if that
    does not fit, because nearly every slot is needed, the best-fit micro-batches are dealt out unchanged.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    packed = _best_fit(lengths, order, budget)
    count = -(-len(packed) // (ranks * multiple)) * multiple
    shares = _spread(lengths, order, ranks, count * budget)
    tried = [_spread(lengths, share, count, budget) for share in shares or ()]
    plan = [share for share in tried if share is not None]
    if len(plan) < ranks:
        plan = _deal(lengths, packed, ranks, count)
    return [
        [sorted(members) for members in sorted(share, key=lambda members: -_total(lengths, members))] for share in plan
    ]


def _total(lengths: list[int], members: list[int]) -> float:
    return sum(cost(lengths[i]) for i in members)


def _best_fit(lengths: list[int], order: list[int], budget: int) -> list[list[int]]:
    """Pack longest first, each into the fullest micro-batch that has room."""
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (free tokens, micro-batch), sorted, while anything fits
    for i in order:
        at = bisect_left(rooms, (lengths[i], 0))
        if at < len(rooms):
            room, b = rooms.pop(at)
        else:
            room, b = budget, len(bins)
            bins.append([])
        bins[b].append(i)
        if room - lengths[i] >= lengths[order[-1]]:
            insort(rooms, (room - lengths[i], b))
    return bins


def _deal(lengths: list[int], packed: list[list[int]], ranks: int, count: int) -> MicroBatchPlan:
    """Deal ``count`` micro-batches per rank, costliest first: one each per turn, the costliest to the lightest rank."""
    empty: list[list[int]] = [[] for _ in range(ranks * count - len(packed))]
    costliest_first = sorted(packed, key=lambda members: -_total(lengths, members)) + empty
    plan: MicroBatchPlan = [[] for _ in range(ranks)]
    loads = [0.0] * ranks
    for m in range(0, len(costliest_first), ranks):
        lightest_first = sorted(range(ranks), key=loads.__getitem__)
        for rank, members in zip(lightest_first, costliest_first[m : m + ranks], strict=True):
            plan[rank].append(members)
            loads[rank] += _total(lengths, members)
    return plan


def _spread(lengths: list[int], order: list[int], count: int, budget: int) -> list[list[int]] | None:
    """Place longest first into the cheapest of ``count`` bins that has room; None if a sequence finds no room."""
    bins: list[list[int]] = [[] for _ in range(count)]
    room = [budget] * count
    cheapest = [(0.0, b) for b in range(count)]  # heap of (cost, bin)
    too_full: list[tuple[int, float, int]] = []  # heap of (-room, cost, bin), until lengths have dropped to the room
    for i in order:
        length = lengths[i]
        while too_full and -too_full[0][0] >= length:
            _, load, b = heappop(too_full)
            heappush(cheapest, (load, b))
        while cheapest and room[cheapest[0][1]] < length and bins[cheapest[0][1]]:
            load, b = heappop(cheapest)
            heappush(too_full, (-room[b], load, b))
        if not cheapest:
            return None
        load, b = cheapest[0]
        heapreplace(cheapest, (load + cost(length), b))
        bins[b].append(i)
        room[b] -= length
    return bins
