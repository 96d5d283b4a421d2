"""From right and wrong responses to figures: avg@n, pass@k, and how far they can be trusted.

Legend: P problems, n responses of each.
"""

from __future__ import annotations

import math

import numpy as np

RESAMPLES = 2000
CONFIDENCE = 0.95


def pass_at_k(n: int, right: int, k: int) -> float:
    """Chance that at least one of ``k`` of the ``n`` responses, drawn without replacement, is right.

    The unbiased estimate 1 - C(n - right, k) / C(n, k) of Chen et al. 2021 (arXiv 2107.03374, eq. 1).
    """
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def interval(values_P: np.ndarray, seed: int) -> tuple[float, float]:
    """A bootstrap confidence interval (95%, percentiles) of the mean over problems.

    It tells how the figure would differ with other problems of the kind: 30 of AIME leave much open.
    """
    generator = np.random.default_rng(seed)
    count = len(values_P)
    means = [values_P[generator.integers(count, size=count)].mean() for _ in range(RESAMPLES)]
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(means, (tail, 100 - tail))
    return float(low), float(high)


def figures(right_P: list[int], n: int, seed: int) -> dict[str, dict[str, float]]:
    """``pass@1``, ``avg@n`` and ``pass@k`` for k = 2, 4, 8, ... and n, each with its interval.

    ``right_P``: of each problem, how many of its n responses are right. avg@n, their share, is what estimates pass@1.
    """
    ks = sorted({2**power for power in range(n.bit_length())} | {n})
    wanted = {f"avg@{n}": 1} | {f"pass@{k}": k for k in ks}
    found = {}
    for name, k in wanted.items():
        values_P = np.array([pass_at_k(n, right, k) for right in right_P])
        low, high = interval(values_P, seed)
        found[name] = {"value": float(values_P.mean()), "low": low, "high": high}
    return found
