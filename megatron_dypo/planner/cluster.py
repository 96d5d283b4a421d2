"""Inputs of a plan: GPUs by data sheet, shapes of released models, a step's workload, one candidate layout.

``rates.py`` has the efficiency that training and sampling reach of the data sheet's figures. Shapes of released
models, by hub name, allow planning a run without having the model.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_dypo.config.schema import Model
from megatron_dypo.errors import UserError
from megatron_dypo.models.shape import ModelShape, model_shape, of_weights
from megatron_dypo.planner.rates import MEASURED, Rates


@dataclass(frozen=True)
class Gpu:
    """Data-sheet figures of a GPU, in one direction each.

    Dense bf16 ``flops`` per second; bytes per second to its ``memory``, to GPUs of its ``node``, of another node (its
    share of the ``network``), and to ``host`` memory.
    """

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
    """Return the GPU's figures; raise UserError if it is not in the table."""
    if name not in GPUS:
        raise UserError(f"--gpu: {name!r} is not known; known: {', '.join(GPUS)}")
    return GPUS[name]


_QWEN2 = {"family": "qwen2", "rope_base": 1e6, "norm_eps": 1e-6, "vocab_size": 152064, "head_dim": 128}
_QWEN3 = {"family": "qwen3", "rope_base": 1e6, "norm_eps": 1e-6, "vocab_size": 151936, "head_dim": 128}
_QWEN3_MOE = _QWEN3 | {"family": "qwen3_moe", "num_experts": 128, "router_topk": 8}
_LLAMA = {"family": "llama", "rope_base": 5e5, "norm_eps": 1e-5, "vocab_size": 128256, "head_dim": 128}


def _shape(
    base: dict, layers: int, hidden: int, ffn: int, heads: int, groups: int, positions: int, **more
) -> ModelShape:
    return ModelShape(
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        num_query_groups=groups,
        max_position=positions,
        **base | more,
    )


RELEASED = {
    "Qwen/Qwen2.5-Math-7B": _shape(_QWEN2, 28, 3584, 18944, 28, 4, 4096, rope_base=1e4),
    "Qwen/Qwen2.5-7B": _shape(_QWEN2, 28, 3584, 18944, 28, 4, 131072),
    "Qwen/Qwen2.5-32B": _shape(_QWEN2, 64, 5120, 27648, 40, 8, 131072),
    "Qwen/Qwen3-4B-Base": _shape(_QWEN3, 36, 2560, 9728, 32, 8, 32768, tied_embeddings=True),
    "Qwen/Qwen3-8B-Base": _shape(_QWEN3, 36, 4096, 12288, 32, 8, 32768),
    "Qwen/Qwen3-32B": _shape(_QWEN3, 64, 5120, 25600, 64, 8, 40960),
    "Qwen/Qwen3-30B-A3B": _shape(_QWEN3_MOE, 48, 2048, 768, 32, 4, 40960),
    "Qwen/Qwen3-235B-A22B": _shape(_QWEN3_MOE, 94, 4096, 1536, 64, 4, 40960),
    "meta-llama/Llama-3.1-8B": _shape(_LLAMA, 32, 4096, 14336, 32, 8, 131072),
    "meta-llama/Llama-3.1-70B": _shape(_LLAMA, 80, 8192, 28672, 64, 8, 131072),
}


def planned_shape(config: Model) -> ModelShape:
    """Return the shape of `model.hf` or `model.preset`; a released model's from the table, without a download.

    Raises UserError as ``model_shape`` does.
    """
    if config.hf not in RELEASED:
        return model_shape(config)
    return of_weights(RELEASED[config.hf], config)


@dataclass(frozen=True)
class Cluster:
    """The GPUs; ``memory``: bytes of one GPU; ``rates``: how much of the data sheet is reached."""

    gpus: int
    memory: float
    gpu: Gpu
    per_node: int = 8
    rates: Rates = MEASURED


@dataclass(frozen=True)
class StepWorkload:
    """One step: prompts, samples of each, mean and longest lengths in tokens, and what becomes of the groups.

    ``mid`` and ``hard`` are shares of the prompts; the rest is Easy and trains nothing. ``budget``: a micro-batch's
    tokens. ``passes``: of log-probs over the rollouts, 2 with a reference. ``overlap``: servers sample meanwhile.
    ``balanced``: with policy.aux_loss. ``reference``: as model.reference_on where a copy of the weights is kept, else
    ``none``. ``side``: the second model that is trained at the same layout (``critic``, ``prm``), by ``side_updates``
    updates. ``saves``: checkpoints are written meanwhile. ``experts``: traces of data.experts.
    """

    prompts: int
    samples: int
    prompt_tokens: float
    response_tokens: float
    longest: int
    teacher_tokens: float
    budget: int
    mid: float
    hard: float
    passes: int = 1
    updates: int = 1
    overlap: bool = False
    balanced: bool = False
    reference: str = "none"
    side: str | None = None
    side_updates: int = 1
    saves: bool = False
    experts: int = 0

    @property
    def rollout_trained(self) -> float:
        """Return the tokens, prompts included, of the responses that are trained on."""
        return self.prompts * self.mid * self.samples * self.mean_sequence

    @property
    def trained(self) -> float:
        traces = self.prompts * self.hard + self.experts
        return self.rollout_trained + traces * (self.prompt_tokens + self.teacher_tokens)

    @property
    def mean_sequence(self) -> float:
        return self.prompt_tokens + self.response_tokens


@dataclass(frozen=True)
class Candidate:
    """A layout of the trainer's ranks, and where vLLM runs.

    ``placement``: ``beside`` the policy on every GPU permanently, in ``turns`` with it (trainer.offload), or on
    ``servers`` with ``server_gpus`` of their own. ``engine_tensor``: GPUs per engine, 1 in process. A mixture's experts
    are sharded over ``expert`` x ``expert_tensor`` of a stage's ranks. ``reference``: ``none``, on the ``device`` or
    the ``host``. ``sharded``: the optimizer's state, over the ranks that hold the same weights.
    """

    tensor: int
    pipeline: int
    virtual: int
    context: int
    data: int
    recompute: str
    placement: str
    server_gpus: int = 0
    engine_tensor: int = 1
    expert: int = 1
    expert_tensor: int = 1
    reference: str = "none"
    sharded: bool = True

    @property
    def ranks(self) -> int:
        return self.tensor * self.pipeline * self.context * self.data

    @property
    def copies(self) -> int:
        """Return the number of ranks that hold the same weights."""
        return self.data * self.context

    @property
    def expert_copies(self) -> int:
        """Return the number of ranks that hold the same experts: expert data parallelism."""
        return self.ranks // (self.pipeline * self.expert * self.expert_tensor)

    @property
    def shards(self) -> int:
        """Return the number of ranks that share the optimizer's state."""
        return self.copies if self.sharded else 1

    @property
    def expert_shards(self) -> int:
        """Return the number of ranks that share an expert's optimizer state."""
        return self.expert_copies if self.sharded else 1

    @property
    def on_servers(self) -> bool:
        return self.placement == "servers"

    @property
    def engines(self) -> int:
        return (self.server_gpus or self.ranks) // self.engine_tensor

    def keys(self, engine_memory: float) -> dict[str, str]:
        """Return the configuration keys of this layout, except servers' addresses (launch.py)."""
        keys = {
            "parallel.tensor": self.tensor,
            "parallel.sequence_parallel": self.tensor > 1,
            "parallel.pipeline": self.pipeline,
            "parallel.virtual_pipeline": self.virtual,
            "parallel.context": self.context,
            "parallel.expert": self.expert,
            "parallel.expert_tensor": self.expert_tensor,
            "model.recompute": self.recompute,
            "optimizer.distributed": self.shards > 1,
            "model.reference_on": "auto" if self.reference == "none" else self.reference,
            "trainer.offload": self.placement == "turns",
            "rollout.engine": "server" if self.placement == "servers" else "vllm",
            "rollout.engine_memory": f"{engine_memory:.2f}",
            "rollout.replay": "null",
        }
        if self.placement != "servers":
            keys |= {"rollout.servers": "[]", "rollout.async_rollout": 0}
        return {name: str(value).lower() for name, value in keys.items()}

    def __str__(self) -> str:
        parts = [f"TP{self.tensor}", f"PP{self.pipeline}"]
        parts += [f"VPP{self.virtual}"] * (self.virtual > 1) + [f"CP{self.context}"] * (self.context > 1)
        return " ".join([*parts, f"DP{self.data}", *expert_parts(self.expert, self.expert_tensor)])


def expert_parts(expert: int, expert_tensor: int) -> list[str]:
    """Return the experts' part of a layout's name; empty if they are not sharded."""
    return [f"EP{expert}"] * (expert > 1) + [f"ETP{expert_tensor}"] * (expert_tensor > 1)
