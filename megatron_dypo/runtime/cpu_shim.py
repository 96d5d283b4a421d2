"""Run Megatron-Core on CPU ranks; the only module that knows mcore assumes CUDA.

mcore asks ``torch.cuda`` for the current device, RNG state and streams. Without CUDA, ``install()`` replaces the *name*
``torch`` inside the imported ``megatron.core`` modules with a proxy that answers for the CPU. Two changes reach
further: ``Tensor.cuda`` becomes the identity and, within ``cuda_type_names``, ``Tensor.type()`` returns CUDA names.
With CUDA, ``install()`` does nothing.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
import types

import torch

# Modules that mcore imports lazily would keep the real torch, so they are imported before the name is replaced.
_LAZY_MODULES = (
    "megatron.core.dist_checkpointing.strategies.torch",
    "megatron.core.dist_checkpointing.strategies.filesystem_async",
    "megatron.core.dist_checkpointing.strategies.fully_parallel",
    "megatron.core.distributed",
    "megatron.core.models.gpt.gpt_model",
    "megatron.core.optimizer",
    "megatron.core.optimizer.distrib_optimizer",
    "megatron.core.optimizer_param_scheduler",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.transformer.moe.moe_layer",
    "megatron.core.transformer.transformer_layer",
)
_FACTORIES = [
    "arange",
    "empty",
    "empty_like",
    "eye",
    "full",
    "full_like",
    "linspace",
    "ones",
    "ones_like",
    "rand",
    "randn",
    "tensor",
    "zeros",
    "zeros_like",
]
_CUDA_NAMES = {
    torch.float32: "torch.cuda.FloatTensor",
    torch.float16: "torch.cuda.HalfTensor",
    torch.bfloat16: "torch.cuda.BFloat16Tensor",
}
_TESTED = ("0.16", "0.17", "0.18", "0.19")
_real_type = torch.Tensor.type


def on_cpu(device: object) -> object:
    """Map cuda in any spelling (``"cuda"``, ``"cuda:0"``, index, device) to cpu; return anything else unchanged."""
    is_cuda = isinstance(device, int) or str(device).startswith("cuda")
    return torch.device("cpu") if is_cuda else device


def _on_cpu_factory(factory):
    @functools.wraps(factory)
    def build(*args, **kwargs):
        if kwargs.get("device") is not None:
            kwargs["device"] = on_cpu(kwargs["device"])
        return factory(*args, **kwargs)

    return build


class _Proxy(types.ModuleType):
    """A module whose own attributes take precedence over those of the module it wraps."""

    def __init__(self, behind: types.ModuleType, **own: object):
        super().__init__(behind.__name__)
        self.__dict__.update(own, _behind=behind)

    def __getattr__(self, name: str) -> object:
        return getattr(self._behind, name)


class _Stream:
    """The CPU's only stream, which also stands for each of its events."""

    def wait_stream(self, other: object) -> None: ...

    def wait_event(self, event: object) -> None: ...

    def record_stream(self, other: object) -> None: ...

    def record_event(self) -> _Stream:
        return self

    def synchronize(self) -> None: ...


def _cuda_proxy() -> _Proxy:
    nothing = lambda *args, **kwargs: None  # noqa: E731
    return _Proxy(
        torch.cuda,
        current_device=lambda: torch.device("cpu"),
        current_stream=lambda *args: _Stream(),
        default_stream=lambda *args: _Stream(),
        stream=lambda stream: contextlib.nullcontext(),
        Stream=lambda *args, **kwargs: _Stream(),
        synchronize=nothing,
        empty_cache=nothing,
        get_rng_state=lambda *args: torch.get_rng_state(),
        set_rng_state=lambda state, *args: torch.set_rng_state(state),
        manual_seed=torch.manual_seed,
    )


def _uneven_all_gather(outputs: list[torch.Tensor], mine: torch.Tensor, group=None, **options) -> object:
    """Gather tensors of different lengths, as gloo cannot: expert-parallel ranks hold different numbers of tokens."""
    sizes = {len(output) for output in outputs}
    if len(sizes) == 1:
        return torch.distributed.all_gather(outputs, mine, group=group, **options)
    padded = mine.new_zeros(max(sizes), *mine.shape[1:])
    padded[: len(mine)] = mine
    gathered = [torch.empty_like(padded) for _ in outputs]
    torch.distributed.all_gather(gathered, padded, group=group)
    for output, part in zip(outputs, gathered, strict=True):
        output.copy_(part[: len(output)])
    return None


def _uneven_reduce_scatter(mine: torch.Tensor, parts: list[torch.Tensor], group=None, **options) -> object:
    """Reduce-scatter parts of different lengths: the reverse of ``_uneven_all_gather``."""
    if len({len(part) for part in parts}) == 1:
        return torch.distributed.reduce_scatter(mine, parts, group=group, **options)
    whole = torch.cat(parts)
    torch.distributed.all_reduce(whole, group=group)
    mine.copy_(whole.split([len(part) for part in parts])[torch.distributed.get_rank(group)])
    return None


def _as_moved_from_cuda(tensor: object, as_numpy: bool = False, record_stream: bool = False) -> object:
    """Return an array if mcore asks for sizes as numpy; it would convert only a tensor that it moves from CUDA."""
    return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor


def install() -> bool:
    """Make the imported Megatron-Core run without CUDA. Idempotent; returns whether the shim is active."""
    if torch.cuda.is_available():
        return False
    import megatron.core

    if not megatron.core.__version__.startswith(_TESTED):
        raise RuntimeError(
            f"the CPU shim is for megatron-core {_TESTED[0]} to {_TESTED[-1]}, found {megatron.core.__version__}"
        )
    for name in _LAZY_MODULES:
        importlib.import_module(name)
    factories = {name: _on_cpu_factory(getattr(torch, name)) for name in _FACTORIES}
    uneven = _Proxy(torch.distributed, all_gather=_uneven_all_gather, reduce_scatter=_uneven_reduce_scatter)
    proxy = _Proxy(torch, cuda=_cuda_proxy(), distributed=uneven, **factories)
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and getattr(module, "torch", None) is torch:
            vars(module)["torch"] = proxy
    from megatron.core.tensor_parallel import random as mcore_random

    mcore_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    mcore_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    from megatron.core.transformer.moe import token_dispatcher

    token_dispatcher.maybe_move_tensor_to_cpu = _as_moved_from_cuda
    return True


@contextlib.contextmanager
def cuda_type_names():
    """Wrap optimizer construction and steps: mcore recognises dtypes by the ``tensor.type()`` names of CUDA tensors."""
    if torch.cuda.is_available():
        yield
        return

    def named(self, *args, **kwargs):
        return _real_type(self, *args, **kwargs) if args or kwargs else _CUDA_NAMES.get(self.dtype, _real_type(self))

    torch.Tensor.type = named
    try:
        yield
    finally:
        torch.Tensor.type = _real_type
