"""What is planned for: GPUs, the work of a step, and one candidate of how to lay it out."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_dypo.plan.gpus import Gpu


@dataclass(frozen=True)
class Cluster:
    """``memory`` in bytes, of one GPU."""

    gpus: int
    memory: float
    gpu: Gpu
    per_node: int = 8


@dataclass(frozen=True)
class Work:
    """One step: prompts, samples of each, mean and longest lengths in tokens, and what becomes of the groups.

    ``mid`` and ``hard`` are shares of the prompts; the rest is Easy and trains nothing. ``budget``: a micro-batch's
    tokens. ``passes``: of log-probs over the rollouts, 2 with a reference. ``overlap``: servers sample meanwhile.
    ``balanced``: with policy.aux_loss. ``reference``: as model.reference_on where a copy of the weights is kept, else
    ``none``. ``saves``: checkpoints are written meanwhile.
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
    saves: bool = False

    @property
    def rollout_trained(self) -> float:
        """Tokens, prompts included, of the responses that are trained on."""
        return self.prompts * self.mid * self.samples * self.mean_sequence

    @property
    def trained(self) -> float:
        return self.rollout_trained + self.prompts * self.hard * (self.prompt_tokens + self.teacher_tokens)

    @property
    def mean_sequence(self) -> float:
        return self.prompt_tokens + self.response_tokens


@dataclass(frozen=True)
class Candidate:
    """A layout of the trainer's ranks, and where vLLM is.

    ``placement``: ``beside`` the policy on every GPU for good, in ``turns`` with it (trainer.offload), or on
    ``servers``: ``server_gpus`` of their own. ``engine_tensor`` GPUs to an engine: 1 in process. A mixture's experts
    lie on ``expert`` x ``expert_tensor`` of a stage's ranks. ``reference``: ``none``, on the ``device`` or the
    ``host``. ``sharded``: the optimizer's state, over the ranks that hold the same weights.
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
        """Ranks that hold the same weights."""
        return self.data * self.context

    @property
    def expert_copies(self) -> int:
        """Ranks that hold the same experts: expert data parallelism."""
        return self.ranks // (self.pipeline * self.expert * self.expert_tensor)

    @property
    def shards(self) -> int:
        """Ranks that share the optimizer's state."""
        return self.copies if self.sharded else 1

    @property
    def expert_shards(self) -> int:
        """Ranks that share an expert's."""
        return self.expert_copies if self.sharded else 1

    @property
    def on_servers(self) -> bool:
        return self.placement == "servers"

    @property
    def engines(self) -> int:
        return (self.server_gpus or self.ranks) // self.engine_tensor

    def keys(self, engine_memory: float) -> dict[str, str]:
        """Configuration keys that make this layout, whatever the file has; but for servers' addresses (launch.py)."""
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
    """How a layout's name says where experts are; nothing where they are not cut."""
    return [f"EP{expert}"] * (expert > 1) + [f"ETP{expert_tensor}"] * (expert_tensor > 1)
