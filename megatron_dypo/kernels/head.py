"""The output head: log-prob, entropy and log-normaliser of each token's target, and token-local losses.

Legend: T tokens, H hidden size, V_local this tensor-parallel rank's padded vocabulary rows, t tokens of one chunk.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dypo.kernels.vocab import VocabShard

# (summands, dloss/dlogp) of a chunk's tokens, optionally with dloss/dentropy
TokenLoss = Callable[[Tensor, Tensor | None, slice], tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor | None]]
# imported on first use: triton exists only on CUDA
_BACKENDS = {"chunked": "chunked", "reference": "reference", "triton": "triton_head"}


class LogProbs(NamedTuple):
    """Results in fp32 and nats of softmax(z / temperature): ``logp`` [T], ``entropy`` [T] or None, ``lse`` [T]."""

    logp: Tensor
    entropy: Tensor | None
    lse: Tensor


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    tp_group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    vocab_size: int | None = None,
    entropy: bool = False,
    backend: str = "auto",
) -> LogProbs:
    """Return log softmax(hidden @ weight.T / temperature)[target], differentiable in ``hidden`` and ``weight``.

    hidden [T, H] (with ``sequence_parallel`` this rank's T / TP rows; the results always cover all T); weight
    [V_local, H]; targets [T] global ids; temperature a number or [T]. Columns from ``vocab_size`` on are padding and
    are ignored. Under ``tp_group`` each rank holds one shard of the vocabulary and every rank gets the same result;
    the gradient of ``hidden`` is complete on every rank.

    Raises ValueError naming the argument for shapes or dtypes that do not fit, and for a target outside the vocabulary.
    """
    shard, temperature_T = _check(hidden, weight, targets, temperature, tp_group, sequence_parallel, vocab_size)
    results = _backend(backend, hidden).logprob(
        hidden, weight, targets, temperature_T, shard, sequence_parallel, entropy
    )
    logp_T, entropy_T, lse_T = results
    return LogProbs(logp_T, entropy_T if entropy else None, lse_T)


def linear_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_loss: TokenLoss,
    *,
    temperature: float | Tensor = 1.0,
    tp_group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    vocab_size: int | None = None,
    entropy: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, LogProbs]:
    """Return sum_t token_loss(logp_t, entropy_t), its gradients formed in the forward pass: three matrix products.

    ``token_loss(logp[t], entropy[t] | None, slice) -> (summands[t], dloss/dlogp[t])`` is called once per chunk with the
    chunk's position in the batch; it must be token-local. It may return dloss/dentropy[t] as a third item, which
    needs ``entropy=True``; None, or two items, cost nothing more. Tokens whose slopes are all 0 get no gradient and
    cost nothing. Other arguments as in ``linear_logprob``. Returns the scalar loss (differentiable in ``hidden`` and
    ``weight``) and the detached LogProbs.

    Raises ValueError as ``linear_logprob`` does, and for an invalid result of ``token_loss``, naming it.
    """
    shard, temperature_T = _check(hidden, weight, targets, temperature, tp_group, sequence_parallel, vocab_size)
    results = _backend(backend, hidden).loss(
        hidden, weight, targets, _with_entropy_slope(token_loss), temperature_T, shard, sequence_parallel, entropy
    )
    loss, logp_T, entropy_T, lse_T = results
    return loss, LogProbs(logp_T, entropy_T if entropy else None, lse_T)


def _with_entropy_slope(token_loss: TokenLoss) -> Callable[..., tuple[Tensor, Tensor, Tensor | None]]:
    """Wrap ``token_loss`` to always return (summands, dloss/dlogp, dloss/dentropy or None), checked."""

    def checked(logp_t: Tensor, entropy_t: Tensor | None, chunk: slice) -> tuple[Tensor, Tensor, Tensor | None]:
        summands_t, dlogp_t, *rest = token_loss(logp_t, entropy_t, chunk)
        if len(rest) > 1:
            raise ValueError(
                f"token_loss: returned {2 + len(rest)} items; "
                "expected summands and dloss/dlogp, and optionally dloss/dentropy"
            )
        dentropy_t = rest[0] if rest else None
        if dentropy_t is not None and entropy_t is None:
            raise ValueError("token_loss: returned a third item, dloss/dentropy: call linear_loss with entropy=True")
        for name, slope_t in (("dloss/dlogp", dlogp_t), ("dloss/dentropy", dentropy_t)):
            if slope_t is not None and slope_t.shape != logp_t.shape:
                raise ValueError(
                    f"token_loss: {name} has shape {list(slope_t.shape)}, expected that of logp, {list(logp_t.shape)}"
                )
        return summands_t, dlogp_t, dentropy_t

    return checked


def _backend(name: str, hidden: Tensor) -> ModuleType:
    """Return the backend's module; ``auto`` is triton on CUDA if it is installed, else chunked."""
    installed = importlib.util.find_spec("triton") is not None
    if name == "auto":
        name = "triton" if hidden.is_cuda and installed else "chunked"
    if name not in _BACKENDS:
        raise ValueError(f"backend: {name!r} is unknown; known: auto, {', '.join(_BACKENDS)}")
    if name == "triton" and not installed:
        raise ValueError("backend: 'triton' is not installed")
    return importlib.import_module(f"megatron_dypo.kernels.{_BACKENDS[name]}")


def _check(hidden, weight, targets, temperature, tp_group, sequence_parallel, vocab_size) -> tuple[VocabShard, Tensor]:
    if hidden.dim() != 2 or weight.dim() != 2 or targets.dim() != 1:
        raise ValueError(
            f"hidden, weight, targets: expected 2, 2 and 1 dimensions, "
            f"got {hidden.dim()}, {weight.dim()}, {targets.dim()}"
        )
    if not hidden.is_floating_point() or hidden.dtype != weight.dtype:
        raise ValueError(f"hidden, weight: expected one floating-point dtype, got {hidden.dtype} and {weight.dtype}")
    if not hidden.device == weight.device == targets.device:
        raise ValueError(
            f"hidden, weight, targets: expected one device, got {hidden.device}, {weight.device}, {targets.device}"
        )
    if hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"weight: {weight.shape[1]} columns for hidden states of width {hidden.shape[1]}")
    if targets.dtype != torch.int64:
        raise ValueError(f"targets: expected int64, got {targets.dtype}")
    shard = VocabShard.of(weight.shape[0], tp_group, vocab_size)
    tokens = hidden.shape[0] * (shard.ranks if sequence_parallel else 1)
    if targets.shape[0] != tokens:
        raise ValueError(f"targets: {targets.shape[0]} ids for {tokens} tokens")
    if tokens and not (int(targets.min()) >= 0 and int(targets.max()) < shard.vocab_size):
        raise ValueError(
            f"targets: ids from {int(targets.min())} to {int(targets.max())} for a vocabulary of {shard.vocab_size}"
        )
    temperature_T = torch.as_tensor(temperature, dtype=torch.float32, device=hidden.device)
    if not bool((temperature_T > 0).all()):
        raise ValueError("temperature: expected numbers above 0")
    if temperature_T.shape not in ((), (tokens,)):
        raise ValueError(f"temperature: expected a number or [{tokens}], got {list(temperature_T.shape)}")
    return shard, temperature_T.expand(tokens)
