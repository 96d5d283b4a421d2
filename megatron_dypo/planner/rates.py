"""Measured efficiencies: how much of a GPU's data sheet training and sampling reach. ``plan --calibrate`` fits them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rates:
    """Constants of the time estimates.

    ``train``, ``forward``, ``prefill``: fractions of peak FLOPs (Megatron-Core pre-trains at 0.41-0.48 on H100);
    ``stream``: fraction of the peak memory bandwidth in decoding; ``link``: fraction of a link's bandwidth in a
    collective; ``decode_step``: seconds of a decoding step besides memory and arithmetic (scheduling, sampling,
    launch); ``hop``: seconds of one small all-reduce in a node, two per layer and decoding step with tensor
    parallelism; ``load_tensor``: seconds that vLLM spends on each tensor of a weight sync besides its bytes, measured
    on a CPU (benchmarks/loaded_tensors.py). A mixture reaches w / (w + ``narrow``) of the fractions of FLOPs, w the
    harmonic sum of hidden size and an expert's width: pre-training with Megatron-Core (FP8) reaches 0.12 of an H100's
    bf16 peak for Qwen3-30B-A3B, 0.24 for 235B-A22B.
    """

    train: float = 0.40
    forward: float = 0.45
    prefill: float = 0.50
    stream: float = 0.65
    link: float = 0.70
    decode_step: float = 0.004
    hop: float = 20e-6
    load_tensor: float = 75e-6
    narrow: float = 1000.0


MEASURED = Rates()
