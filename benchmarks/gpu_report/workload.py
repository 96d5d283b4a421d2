"""Make what the stages train and sample: models of real shapes with weights made on the device, and graded groups.

Each table has the real size and, under ``tiny``, one that runs on a CPU in a second. Legend: T tokens of all sequences.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core import parallel_state as mpu
from torch import Tensor

from megatron_dypo.config.schema import Config, Data, Model, Objective, Parallel, Rollout, Shape, Trainer
from megatron_dypo.models.families import hf_shapes
from megatron_dypo.models.shape import ModelShape
from megatron_dypo.records import Group, Kind, Prompt, Regime, Response, Sequence, Teacher
from megatron_dypo.runtime import distributed
from megatron_dypo.runtime.distributed import Layout, device
from megatron_dypo.training.minibatch import MiniBatch

_COMMON = {"head_dim": 128, "vocab_size": 151936, "tied_embeddings": True, "max_position": 32768}
_COMMON |= {"init_std": 0.02, "rope_base": 1e6, "norm_eps": 1e-6}
_TINY = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 128, "num_attention_heads": 4, "num_query_groups": 2}
_TINY |= {"head_dim": 32, "vocab_size": 128, "tied_embeddings": True, "max_position": 256}
MODELS = {
    "qwen2.5-1.5b": _COMMON
    | {"family": "qwen2", "num_layers": 28, "hidden_size": 1536, "ffn_hidden_size": 8960}
    | {"num_attention_heads": 12, "num_query_groups": 2},
    "qwen3-4b": _COMMON
    | {"family": "qwen3", "num_layers": 36, "hidden_size": 2560, "ffn_hidden_size": 9728}
    | {"num_attention_heads": 32, "num_query_groups": 8},
}
TINY_MODELS = {name: _TINY | {"family": shape["family"]} for name, shape in MODELS.items()}


@dataclass(frozen=True)
class Batch:
    """Prompts, responses per prompt, their mean and longest lengths, and a micro-batch's budget, in tokens."""

    prompts: int
    samples: int
    mean: int
    longest: int
    prompt_tokens: int
    budget: int


TINY_BATCH = Batch(prompts=4, samples=2, mean=24, longest=64, prompt_tokens=8, budget=128)


def real_batch(budget: int) -> Batch:
    return Batch(prompts=8, samples=8, mean=2048, longest=8192, prompt_tokens=200, budget=budget)


def model(name: str, tiny: bool) -> Model:
    """Return the model section of the configuration, over a preset with every size replaced."""
    return Model(preset="tiny", shape=Shape(**(TINY_MODELS if tiny else MODELS)[name]))


def update_config(name: str, batch: Batch, tiny: bool) -> Config:
    return Config(
        model=model(name, tiny),
        data=Data(
            train="none",
            prompts_per_step=batch.prompts,
            max_prompt_tokens=batch.prompt_tokens,
            max_tokens_per_microbatch=batch.budget,
        ),
        rollout=Rollout(samples_per_prompt=batch.samples, max_response_tokens=batch.longest),
        objective=Objective(reference="initial"),
        trainer=Trainer(steps=1, run_dir="none"),
    )


def weights_on_device(shape: ModelShape) -> Callable[[str], Tensor]:
    """Draw weights as ``models.sharding.random_weights``, but on the device: seconds where a host takes minutes."""
    shapes, draw = hf_shapes(shape), torch.Generator(device()).manual_seed(0)

    def read(name: str) -> Tensor:
        if name.endswith("norm.weight"):
            return torch.ones(shapes[name])
        if name.endswith(".bias"):
            return torch.zeros(shapes[name])
        return torch.randn(shapes[name], generator=draw, device=device()) * shape.init_std

    return read


def make_groups(batch: Batch, vocabulary: int) -> list[Group]:
    """Make groups of lognormal lengths: every fourth is Hard, with a teacher; the others are half right."""
    random = np.random.default_rng(0)

    def ids(length: int) -> np.ndarray:
        return random.integers(0, vocabulary, length).astype(np.int32)

    groups, most = [], batch.longest - batch.prompt_tokens
    for q in range(batch.prompts):
        hard = q % 4 == 3
        lengths = random.lognormal(np.log(batch.mean) - 0.32, 0.8, batch.samples).astype(int).clip(2, most)
        responses = [
            Response(ids(n), np.full(n, -np.log(vocabulary), np.float32), "stop", float(not hard and i % 2))
            for i, n in enumerate(lengths)
        ]
        prompt = Prompt(f"p{q}", "1", (Teacher("a", "x"), Teacher("b", "y")))
        regime, drawn = (Regime.HARD, (0,)) if hard else (Regime.MID, None)
        groups.append(Group(prompt, ids(batch.prompt_tokens), responses, regime, drawn))
    return groups


def trace(batch: Batch, vocabulary: int) -> Callable[[Group, int], np.ndarray]:
    """Return a function giving each teacher's trace, as long as the mean response."""
    ids_T = np.random.default_rng(1).integers(0, vocabulary, batch.mean).astype(np.int32)
    return lambda group, teacher: ids_T


def forward_flops(shape: ModelShape, sequences: list[Sequence]) -> float:
    """Return model FLOPs of a forward pass: two per weight and token, head included, plus causal attention."""
    embedding = 0 if shape.tied_embeddings else shape.vocab_size * shape.hidden_size
    tokens, squares = sum(s.length for s in sequences), sum(s.length**2 for s in sequences)
    attention = 2 * shape.num_layers * shape.num_attention_heads * shape.head_dim
    return 2.0 * (shape.active_parameters - embedding) * tokens + attention * squares


def sequences_of(minibatches: list[MiniBatch], kind: Kind | None = None) -> list[Sequence]:
    return [sequence for work in minibatches for sequence in work.sequences if kind in (None, sequence.kind)]


def join(parallel: Parallel) -> Layout:
    """Build the process groups, replacing those of an earlier stage in this process."""
    if mpu.model_parallel_is_initialized():
        mpu.destroy_model_parallel()
    return distributed.init(parallel)


# --- time and memory


def now() -> float:
    """Return the time in seconds, once the device is idle."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds_of(function: Callable[[], object]) -> float:
    began = now()
    function()
    return now() - began


def gib(size: float) -> float:
    return size / 2**30


def device_gib() -> float:
    """Return GiB in use on the device, by any process and library; 0 on a CPU."""
    if not torch.cuda.is_available():
        return 0.0
    free, total = torch.cuda.mem_get_info()
    return gib(total - free)


def matrix_peak() -> float:
    """Return FLOP/s of the fastest of a few square products in the training dtype: what MFU is a share of."""
    cuda = torch.cuda.is_available()
    sizes, repeats, dtype = ((8192, 12288, 16384), 10, torch.bfloat16) if cuda else ((256,), 3, torch.float32)
    best = 0.0
    for size in sizes:
        a, b = (torch.randn(size, size, device=device(), dtype=dtype) for _ in range(2))
        out = torch.mm(a, b)

        def products(a: Tensor = a, b: Tensor = b, out: Tensor = out) -> None:
            for _ in range(repeats):
                torch.mm(a, b, out=out)

        products()
        best = max(best, *(2.0 * size**3 * repeats / seconds_of(products) for _ in range(3)))
    return best
