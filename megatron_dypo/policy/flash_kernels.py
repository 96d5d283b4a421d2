"""Use FlashAttention 4 or 3 for torch's flash attention, if one is installed and agrees with torch's own."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from megatron_dypo.policy.accelerations import flash_kernels, on_this_machine
from megatron_dypo.policy.attention import Segments, flash
from megatron_dypo.runtime.distributed import device

log = logging.getLogger(__name__)
_LENGTHS = 1, 130, 333  # tokens of the trial sequences
_TOLERANCE = 0.02  # relative to a tensor's norm; two bf16 kernels differ by a few thousandths
# raised by packages that do not support this torch, or these heads: each checks in its own way
_FAILURES = (RuntimeError, ValueError, TypeError, AssertionError, ImportError, AttributeError, KeyError, OSError)


def use_best_flash_kernel(heads: int, groups: int, width: int) -> str:
    """Activate the first installed kernel that takes such heads and agrees, for this process; return its name.

    ``heads`` and ``groups`` are this rank's query and key heads. An installed package that cannot be used is logged,
    with the reason.
    """
    if active := nn.attention.current_flash_attention_impl():
        return active
    reasons = flash_kernels(on_this_machine(), torch.cuda.get_device_capability(), width)
    name, failed = activate((name for name, why in reasons.items() if not why), lambda: _pass(heads, groups, width))
    for other, why in failed.items():
        log.warning("%s is installed but not used: %s", other, why)
    log.info("flash attention: %s", name)
    return name


def activate(names: Iterable[str], trial: Callable[[], list[Tensor]], registry=nn.attention) -> tuple[str, dict]:
    """Activate the first of ``names`` that reproduces ``trial``; return (its name or FA2, why not the others).

    torch leaves it to a kernel's package to support this torch, so only running it proves that it does.
    """
    failed = {}
    wanted = None
    for name in names:
        wanted = trial() if wanted is None else wanted
        try:
            registry.activate_flash_attention_impl(name)
            pairs = list(zip(trial(), wanted, strict=True))
        except _FAILURES as error:
            failed[name] = f"{type(error).__name__}: {error}"
        else:
            gap = max(float((ours - theirs).norm() / theirs.norm()) for ours, theirs in pairs)
            if gap <= _TOLERANCE:
                return name, failed
            failed[name] = f"its attention is {gap:.2g} of the norm away from torch's own"
        if registry.current_flash_attention_impl() is not None:
            registry.restore_flash_attention_impl()
    return "FA2", failed


def _pass(heads: int, groups: int, width: int) -> list[Tensor]:
    """Return the output and gradients of packed random sequences, in fp32."""
    draw = torch.Generator(device()).manual_seed(0)
    tokens = sum(_LENGTHS)
    query, key, value = (
        torch.randn(tokens, count, width, generator=draw, device=device(), dtype=torch.bfloat16).requires_grad_()
        for count in (heads, groups, groups)
    )
    ends = torch.tensor(_LENGTHS).cumsum(0).tolist()
    out = flash(query, key, value, Segments([0, *ends], device()), width**-0.5)
    slopes = torch.randn(out.shape, generator=draw, device=device(), dtype=torch.bfloat16)
    return [x.float() for x in (out.detach(), *torch.autograd.grad(out, (query, key, value), slopes))]
