"""Stateless draws: every random choice is a hash of what it is about, not of when or where it is made.

A resumed run, another layout or another order of prompts draws the same numbers, with nothing to save.
"""

from __future__ import annotations

import hashlib
import random

import torch


def stable_hash(*parts: object) -> int:
    """63-bit hash of the parts' text, the same in every process and on every machine."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def choose(seed_parts: tuple[object, ...], population: int, count: int) -> tuple[int, ...]:
    """``count`` different indices below ``population``, uniformly, in the order drawn; at most all of them."""
    return tuple(random.Random(stable_hash(*seed_parts)).sample(range(population), min(count, population)))


def generator(*parts: object) -> torch.Generator:
    """A CPU generator seeded by the hash of ``parts``."""
    return torch.Generator().manual_seed(stable_hash(*parts))
