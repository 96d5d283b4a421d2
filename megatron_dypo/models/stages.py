"""Say which pipeline stage has which layers: the one table for building, gathering and checking a model.

A virtual stage v is chunk v // pp of pipeline rank v % pp; layers go to virtual stages in order.
"""

from __future__ import annotations

from itertools import chain, repeat


def stage_layers(num_layers: int, pp: int, vpp: int) -> tuple[int, ...]:
    """Return the number of layers of every virtual stage, first to last."""
    return (num_layers // (pp * vpp),) * (pp * vpp)


def layer_owners(num_layers: int, pp: int, vpp: int) -> tuple[int, ...]:
    """Return the pipeline rank of every layer."""
    sizes = stage_layers(num_layers, pp, vpp)
    return tuple(chain.from_iterable(repeat(stage % pp, size) for stage, size in enumerate(sizes)))
