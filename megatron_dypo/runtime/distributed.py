"""Process groups and this rank's coordinates in them. Every collective has a deadline."""

from __future__ import annotations

import datetime
import ipaddress
import os
from dataclasses import dataclass
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

from megatron_dypo.config.schema import Parallel
from megatron_dypo.errors import UserError
from megatron_dypo.runtime import cpu_shim
from megatron_dypo.runtime.failure import error_record


def is_loopback(host: str) -> bool:
    """Return whether the host is reachable from this machine only; False for any name other than ``localhost``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def all_here(urls: list[str]) -> bool:
    return all(is_loopback(urlsplit(url).hostname or "") for url in urls)


ALONE = Parallel()
_LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo", "VLLM_HOST_IP": "127.0.0.1"}


@dataclass(frozen=True)
class Layout:
    """This rank's coordinates. ``dp`` counts data-parallel replicas; a replica is tensor x pipeline x context ranks.

    ``vpp`` is the number of model chunks per pipeline rank: chunk c of rank p is virtual stage c * pp + p. Experts are
    sharded separately: within a pipeline stage, each group of ``etp`` x ``ep`` ranks holds all experts once.
    """

    rank: int = 0
    world: int = 1
    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    dp: int = 1
    ep: int = 1
    etp: int = 1
    tp_rank: int = 0
    pp_rank: int = 0
    cp_rank: int = 0
    dp_rank: int = 0
    ep_rank: int = 0
    etp_rank: int = 0

    def __str__(self) -> str:
        virtual = f" (virtual {self.vpp})" if self.vpp > 1 else ""
        context = f" x context {self.cp}" if self.cp > 1 else ""
        cut = f" x tensor {self.etp}" if self.etp > 1 else ""
        experts = f", experts {self.ep}{cut}" if self.ep * self.etp > 1 else ""
        return f"{self.world} ranks: tensor {self.tp} x pipeline {self.pp}{virtual}{context} x data {self.dp}{experts}"

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp - 1

    @property
    def owns_logprobs(self) -> bool:
        """Return whether this rank's log-probs count in sums over ranks.

        One tensor-parallel rank of the last stage counts; context-parallel ranks all do, each for its own tokens.
        """
        return self.is_last_stage and self.tp_rank == 0

    @property
    def micro_batch_multiple(self) -> int:
        """Return the multiple that an interleaved schedule needs of micro-batches: one per pipeline rank."""
        return self.pp if self.vpp > 1 else 1

    def tensor(self, expert: bool) -> tuple[int, int]:
        """Return (size, rank) of the group that shards a weight: an expert's, or any other."""
        return (self.etp, self.etp_rank) if expert else (self.tp, self.tp_rank)

    @property
    def packing(self) -> dict[str, int]:
        """Return this rank's part of packed tokens, as keyword arguments of ``MicroBatch.pack``."""
        return {"tensor": self.tp, "context": self.cp, "context_rank": self.cp_rank}


def world_size() -> int:
    """Return the number of ranks started by the launcher (1 under plain python)."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def require_launcher() -> None:
    """Raise UserError, on every rank, if the environment describes several ranks but no launcher started them.

    Kubernetes' training operators set RANK and WORLD_SIZE in a pod's environment; launchers set LOCAL_RANK too.
    """
    if "RANK" in os.environ and "LOCAL_RANK" not in os.environ and world_size() > 1:
        error = UserError(
            f"the environment has RANK={launch_rank()} and WORLD_SIZE={world_size()} but no LOCAL_RANK: "
            "no launcher started this process. Start it by torchrun or launch/, or unset RANK and WORLD_SIZE"
        )
        error_record(error).first = True  # every rank reports its own; none is caused by rank 0
        raise error


def launch_rank() -> int:
    return int(os.environ.get("RANK", "0"))


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def device_kind() -> str:
    """Return ``cuda`` where this process sees a GPU, else ``cpu``; touches no device."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def training_dtype(name: str, kind: str | None = None) -> torch.dtype:
    """Return the dtype of ``model.dtype`` on a device of ``kind`` (default: this machine's).

    bf16 matmuls are 6 to 90 times slower than fp32 on CPUs, hence ``auto``.
    """
    if name == "auto":
        return torch.bfloat16 if (kind or device_kind()) == "cuda" else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]


def claim_device() -> None:
    """Make this rank's GPU the current device."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))


def stay_on_loopback(reaches_out: bool = False) -> None:
    """Bind to the loopback interface if all ranks are on this machine; the environment overrides it.

    ``reaches_out``: leave NCCL alone, because it sends weights to servers on other machines.
    """
    if os.environ.get("LOCAL_WORLD_SIZE", "1") == str(world_size()):
        for name, value in _LOOPBACK.items():
            if not (reaches_out and name.startswith("NCCL")):
                os.environ.setdefault(name, value)


def training_backend() -> str:
    """Return the backend of the training ranks' groups; all of Megatron-Core's default to the first group's."""
    return "nccl" if torch.cuda.is_available() else "gloo"


def join(timeout: float = ALONE.timeout, backend: str = "gloo", reaches_out: bool = False) -> None:
    """Join the job's ranks, unless that is already done; under plain python a group of one.

    ``timeout`` (seconds) is the deadline of every collective. torch gets no ``device_id``: with one, each group that
    Megatron-Core creates would open an NCCL communicator, with its buffers, whether it is used or not. Raises
    RuntimeError if the ranks have already joined with another backend.
    """
    if dist.is_initialized():
        if dist.get_backend() != backend:
            raise RuntimeError(f"the ranks have joined with {dist.get_backend()}, but {backend} is needed")
        return
    require_launcher()
    if backend == "nccl":
        claim_device()
    deadline = datetime.timedelta(seconds=timeout)
    stay_on_loopback(reaches_out)
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=deadline)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=deadline)


def init(parallel: Parallel = ALONE, reaches_out: bool = False) -> Layout:
    """Join the job and build mcore's process groups; under plain python a group of one.

    ``parallel.timeout`` is the deadline of every collective. Installs the CPU shim if there is no CUDA. Raises
    UserError if this process has its groups already: they, and vLLM's, last as long as the process.
    """
    cpu_shim.install()
    from megatron.core import parallel_state as mpu
    from megatron.core import tensor_parallel

    if mpu.model_parallel_is_initialized():
        raise UserError("this process has trained or evaluated already: start the next run in a new process")
    backend = training_backend()
    join(parallel.timeout, backend, reaches_out)
    mpu.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
        distributed_timeout_minutes=max(1, round(parallel.timeout / 60)),
        create_gloo_process_groups=backend == "nccl",
    )
    tensor_parallel.model_parallel_cuda_manual_seed(0)
    return Layout(
        rank=dist.get_rank(),
        world=dist.get_world_size(),
        tp=parallel.tensor,
        pp=parallel.pipeline,
        vpp=parallel.virtual_pipeline,
        cp=parallel.context,
        dp=mpu.get_data_parallel_world_size(),
        ep=parallel.expert,
        etp=parallel.expert_tensor,
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        pp_rank=mpu.get_pipeline_model_parallel_rank(),
        cp_rank=mpu.get_context_parallel_rank(),
        dp_rank=mpu.get_data_parallel_rank(),
        ep_rank=mpu.get_expert_model_parallel_rank(),
        etp_rank=mpu.get_expert_tensor_parallel_rank(),
    )


def gather_objects(value: object) -> list:
    """Return all ranks' Python objects, in rank order, on rank 0, and an empty list on the others."""
    if dist.get_rank() > 0:
        dist.gather_object(value)
        return []
    gathered: list = [None] * dist.get_world_size()
    dist.gather_object(value, gathered)
    return gathered


def all_gather_objects(value: object, group: dist.ProcessGroup | None = None) -> list:
    """Return the Python objects of all ranks of ``group``, in rank order."""
    gathered: list = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, value, group=group)
    return gathered
