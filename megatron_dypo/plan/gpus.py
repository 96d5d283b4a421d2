"""What GPUs can do, from their data sheets; how much of that training and sampling get is in ``steptime.py``."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_dypo.errors import UserError


@dataclass(frozen=True)
class Gpu:
    """Dense bf16 ``flops`` per second; bytes per second of its ``memory``, to its node's others, to another node's
    (its share of the network), and to ``host`` memory. One direction each."""

    flops: float
    memory: float
    node: float
    network: float
    host: float


GPUS = {
    "a100": Gpu(312e12, 2.0e12, 300e9, 25e9, 25e9),
    "a800": Gpu(312e12, 2.0e12, 200e9, 25e9, 25e9),
    "h100": Gpu(989e12, 3.35e12, 450e9, 50e9, 55e9),
    "h800": Gpu(989e12, 3.35e12, 200e9, 50e9, 55e9),
    "h200": Gpu(989e12, 4.8e12, 450e9, 50e9, 55e9),
    "b200": Gpu(2250e12, 8.0e12, 900e9, 50e9, 55e9),
}


def gpu(name: str) -> Gpu:
    """Raises UserError for a name that is not in the table."""
    if name not in GPUS:
        raise UserError(f"--gpu: {name!r} is not known; known: {', '.join(GPUS)}")
    return GPUS[name]
