"""Self-test on two ranks: a collective, and a tensor-parallel policy whose weights are sharded and gathered again.

torchrun --nproc-per-node 2 -m megatron_dypo.doctor.selftest
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from importlib.metadata import entry_points

DEADLINE = 120.0  # seconds; it takes about ten, most of them imports


def run(devices: int) -> tuple[bool, str]:
    """Run the self-test, on the CPU with fewer than two ``devices``; return (passed, one line of result)."""
    meeting = ["--standalone"]
    if entry_points(group="torchrun.handlers", name="loopback"):  # ours, unreachable from other machines
        meeting = ["--rdzv-backend", "loopback", "--rdzv-endpoint", "localhost"]
    launcher = [sys.executable, "-m", "torch.distributed.run", *meeting, "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    if devices < 2:
        environment["CUDA_VISIBLE_DEVICES"] = ""  # two ranks cannot share one
    began = time.monotonic()
    try:
        ran = subprocess.run(
            [*launcher, "-m", "megatron_dypo.doctor.selftest"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=DEADLINE,
        )
    except subprocess.TimeoutExpired:
        return False, f"two ranks did not finish within {DEADLINE:g} s"
    if ran.returncode == 0:
        said = next(line for line in ran.stdout.splitlines() if line.startswith("selftest: "))
        return True, f"{said.removeprefix('selftest: ')} ({time.monotonic() - began:.0f} s)"
    errors = [line for line in ran.stderr.splitlines() if "Error" in line]
    return False, f"two ranks failed: {errors[0].strip() if errors else f'exit code {ran.returncode}'}"


def main() -> None:
    import warnings

    warnings.filterwarnings("ignore")
    import torch
    import torch.distributed as dist

    from megatron_dypo.config.schema import Config, Data, Model, Parallel, Trainer
    from megatron_dypo.models.shape import model_shape
    from megatron_dypo.models.sharding import random_weights
    from megatron_dypo.policy.policy import Policy
    from megatron_dypo.runtime import distributed

    config = Config(
        model=Model(preset="tiny", dtype="fp32"),
        data=Data(train="none"),
        parallel=Parallel(tensor=2, sequence_parallel=True, timeout=60.0),
        trainer=Trainer(steps=1, run_dir="none"),
    )
    shape = model_shape(config.model)
    layout = distributed.init(config.parallel)
    read = random_weights(shape, 0)
    policy = Policy(config, shape, layout, read)
    total = torch.tensor([float(layout.rank + 1)], device=distributed.device())
    dist.all_reduce(total)
    if total.item() != 3.0:
        raise RuntimeError(f"Error: an all-reduce of 1 and 2 gives {total.item()}")
    gathered = dict(policy.named_tensors())
    for name, tensor in gathered.items():
        if not torch.equal(tensor.cpu(), read(name)):
            raise RuntimeError(f"Error: {name} differs after it was sharded and gathered")
    if layout.is_main:
        print(f"selftest: 2 ranks, tensor parallel, {len(gathered)} tensors sharded and gathered", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
