"""The token-local loss over packed sequences: summands and analytic dL/dlogp in one pass.

    GRPO  w (-min(rho A, clip(rho) A) + kl (exp(ref - logp) - (ref - logp) - 1))     rho = exp(logp - base)   (Eq. 21)
          with other surrogates of rho in place of the clipped one: token_functions.py
    slope C (constant dL/dlogp; its value is the coefficient pass's: GAL)                                     (Eq. 16)
    nll   -v logp (v of either sign, on any sequence: SFT)                                                    (Eq. 20)
    tilt  -v sg(exp(a H)) logp in its place, H the token's entropy                      (SRFT, arXiv 2506.19767)
    shape -u f(p), p = exp(logp)      f(p): token_functions.py
    bonus -e H

A, w, C, v, a, u and e are per sequence: columns of a table whose rows are declared in ``COEFFICIENTS``, every
normaliser and aggregation included; A may be per token instead (a stream). sg: held constant by the derivative.
The sums behind the metrics are kept per sequence, in float64, as L running sums: on CUDA token j of a
sequence is added to lane j % L; torch adds all to lane 0, in order. So a sum depends neither on where calls split the
sequence nor on what it is packed with.

Legend: t tokens of a call, a range of the packed ones; S sequences, C coefficients, M sums, L lanes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_dypo.kernels.token_functions import LARGEST, SHAPES, SURROGATES, cispo, sapo, shaped

COEFFICIENTS = ("advantage", "grpo", "dlogp_grpo", "slope", "nll", "shaped", "entropy", "tilt")
SUMS = ("grpo", "kl", "dlogp_grpo", "clipped", "logp", "entropy", "shaped", "dlogp_shaped", "tilted", "dlogp_tilted")
LANES = 128  # threads per program


@dataclass(frozen=True)
class LossRule:
    """Settings shared by all tokens. ``ratio_level``: token, or sequence (the ratio is then in the coefficients);
    ``ratio_base``: old or reference; ``correction``: none, truncate, mask or icepop, with its ``cap`` and ``floor``
    (None: 1 / cap); ``surrogate``: clip, cispo or sapo (with its ``sapo_tau_*``); ``shape``: none (the column
    ``shaped`` is not read), luffy (with its ``shape_gamma``), p, nll, phi or sg_p; ``entropy``, ``tilt``: read the
    column of that name."""

    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_coef: float = 0.0
    ratio_level: str = "token"
    ratio_base: str = "old"
    correction: str = "none"
    cap: float = 2.0
    floor: float | None = None
    shape: str = "none"
    shape_gamma: float = 0.1
    entropy: bool = False
    surrogate: str = "clip"
    sapo_tau_pos: float = 1.0
    sapo_tau_neg: float = 1.05
    tilt: bool = False


def grouped_loss(
    logp: Tensor,
    cu_seqlens: Tensor,
    coefficients: Tensor,
    sums: Tensor,
    rule: LossRule,
    *,
    first: int = 0,
    old: Tensor | None = None,
    rollout: Tensor | None = None,
    reference: Tensor | None = None,
    entropy: Tensor | None = None,
    advantage: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, ...]:
    """Return (loss summands [t], dL/dlogp [t]) of the tokens ``first`` to ``first + t`` of a pack.

    With ``rule.entropy`` also dL/dentropy [t]. Log-probs [t] in nats: ``logp`` under the current policy, ``old``,
    ``rollout`` (the engine's) and ``reference``; without ``old`` there is no GRPO term (teacher traces). ``advantage``
    [t], if given, replaces the column of that name per token. cu_seqlens [S + 1] integer offsets of the sequences'
    tokens, from 0; coefficients [C, S] in logp's dtype, rows as in ``COEFFICIENTS`` (objectives.SequenceTerms).
    ``sums``, from ``empty_sums``, is added to; its rows are, as in ``SUMS``: sums of GRPO's summands (KL included), of
    the KL (weighted by w, without kl_coef), of |dL/dlogp| of GRPO, of clipped tokens (cispo: of ratios outside the
    bounds; sapo: none), of logp, of ``entropy``, with a shape of f(p) and df/dlogp, and with a tilt of exp(a H) logp
    and exp(a H).

    backend: ``torch``, ``triton``, or ``auto``: triton on CUDA. Raises ValueError naming an argument that does not fit.
    """
    _check(logp, cu_seqlens, coefficients, sums, rule, old, rollout, reference, entropy, advantage, backend)
    if not len(logp):
        return tuple(torch.empty_like(logp) for _ in range(2 + rule.entropy))
    if backend == "triton" or (backend == "auto" and logp.is_cuda):
        from megatron_dypo.kernels.triton_grouped_loss import grouped_loss as run
    else:
        run = _grouped_loss
    return run(logp, cu_seqlens, coefficients, sums, rule, first, old, rollout, reference, entropy, advantage)


def empty_sums(sequences: int, device: torch.device | str = "cpu") -> Tensor:
    """Return the running sums [M, S, L] of a pack before its first token, float64."""
    lanes = LANES if torch.device(device).type == "cuda" else 1
    return torch.zeros(len(SUMS), sequences, lanes, dtype=torch.float64, device=device)


def read_sums(sums_MSL: Tensor) -> dict[str, Tensor]:
    """Return each sum [S] by name; lanes are added pairwise, in the same order on any device."""
    while sums_MSL.shape[2] > 1:
        half = sums_MSL.shape[2] // 2
        sums_MSL = sums_MSL[..., :half] + sums_MSL[..., half:]
    return dict(zip(SUMS, sums_MSL.squeeze(2), strict=True))


def lower_end(cap: float, floor: float | None) -> float:
    """Return the lowest ratio that a correction by a band keeps."""
    return 1 / cap if floor is None else floor


def correction_weight(log_ratio: Tensor, kind: str, cap: float, floor: float | None = None) -> Tensor:
    """Return the weight of a token (or response) from its log(old policy / engine's policy) in nats, elementwise."""
    ratio = log_ratio.clamp(max=LARGEST).exp()
    if kind == "truncate":
        return ratio.clamp(max=cap)
    if kind in ("mask", "icepop"):
        inside = ((ratio >= lower_end(cap, floor)) & (ratio <= cap)).to(ratio.dtype)
        return inside if kind == "mask" else inside * ratio
    return torch.ones_like(ratio)


def _grouped_loss(
    logp_t: Tensor,
    cu_seqlens: Tensor,
    coefficients_CS: Tensor,
    sums_MSL: Tensor,
    rule: LossRule,
    first: int,
    old_t: Tensor | None,
    rollout_t: Tensor | None,
    reference_t: Tensor | None,
    entropy_t: Tensor | None,
    advantage_t: Tensor | None,
) -> tuple[Tensor, ...]:
    """The torch implementation; the Triton kernel does the same operations in the same order."""
    tokens = len(logp_t)
    pieces_S = cu_seqlens.clamp(first, first + tokens).diff()
    sequence_t = torch.repeat_interleave(pieces_S, output_size=tokens)
    column_t, weight_t, grpo_slope_t, slope_t, nll_t, shaped_t, bonus_t, tilt_t = coefficients_CS.index_select(
        1, sequence_t
    )
    advantage_t = column_t if advantage_t is None else advantage_t
    zero_t = torch.zeros_like(logp_t)
    grpo_t = kl_t = clipped_t = zero_t

    if old_t is not None:
        if rollout_t is not None and rule.correction != "none":
            weight_t = weight_t * correction_weight(old_t - rollout_t, rule.correction, rule.cap, rule.floor)
        if rule.ratio_level == "token":
            base_t = old_t if rule.ratio_base == "old" else reference_t
            assert base_t is not None, "checked by _check"
            ratio_t = (logp_t - base_t).clamp_(max=LARGEST).exp_()
            if rule.surrogate == "clip":
                free_t = ratio_t * advantage_t
                bounded_t = ratio_t.clamp_(1 - rule.clip_low, 1 + rule.clip_high).mul_(advantage_t)
                clipped_t = bounded_t < free_t
                grpo_t = torch.where(clipped_t, bounded_t, free_t).mul_(weight_t).neg_()
                grpo_slope_t = grpo_t.masked_fill(clipped_t, 0.0).add_(grpo_slope_t)
            else:
                if rule.surrogate == "cispo":
                    value_t, dvalue_t, clipped_t = cispo(ratio_t, advantage_t, logp_t, rule.clip_low, rule.clip_high)
                else:
                    value_t, dvalue_t = sapo(ratio_t, advantage_t, rule.sapo_tau_pos, rule.sapo_tau_neg)
                grpo_t, grpo_slope_t = -(value_t * weight_t), grpo_slope_t - dvalue_t * weight_t
        if reference_t is not None:
            gap_t = reference_t - logp_t
            growth_t = gap_t.clamp(max=LARGEST).expm1_()  # exact where the policies are close
            kl_t = (growth_t - gap_t).mul_(weight_t)  # k3: unbiased, never negative
            if rule.kl_coef:
                grpo_t = grpo_t + kl_t * rule.kl_coef
                grpo_slope_t = grpo_slope_t - weight_t * rule.kl_coef * growth_t

    def add(first_row: str, *values_t: Tensor) -> None:
        """Add the values of consecutive rows to the sums."""
        rows_MS = sums_MSL.narrow(0, SUMS.index(first_row), len(values_t)).select(2, 0)
        rows_MS.scatter_add_(1, sequence_t.long().expand(len(values_t), -1), torch.stack(values_t).double())

    spread_t = zero_t if entropy_t is None else entropy_t
    add("grpo", grpo_t, kl_t, grpo_slope_t.abs(), clipped_t.to(logp_t.dtype), logp_t, spread_t)
    if rule.tilt:
        tilted_t = (tilt_t * spread_t).clamp_(max=LARGEST).exp_()
        add("tilted", tilted_t * logp_t, tilted_t)
        nll_t = nll_t * tilted_t
    summands_t, dlogp_t = grpo_t - nll_t * logp_t, grpo_slope_t + slope_t - nll_t
    if rule.shape != "none":
        f_t, df_t = shaped(logp_t, rule.shape, rule.shape_gamma)
        add("shaped", f_t, df_t)
        summands_t, dlogp_t = summands_t - shaped_t * f_t, dlogp_t - shaped_t * df_t
    if rule.entropy:
        summands_t = summands_t - bonus_t * entropy_t
    return (summands_t, dlogp_t, -bonus_t) if rule.entropy else (summands_t, dlogp_t)


def _check(logp, cu_seqlens, coefficients, sums, rule, old, rollout, reference, entropy, advantage, backend) -> None:
    if backend not in ("auto", "torch", "triton"):
        raise ValueError(f"backend: {backend!r} is unknown; known: auto, torch, triton")
    for name, value, known in (("surrogate", rule.surrogate, SURROGATES), ("shape", rule.shape, SHAPES)):
        if value not in known:
            raise ValueError(f"rule.{name}: {value!r} is unknown; known: {', '.join(known)}")
    if logp.dim() != 1 or logp.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"logp: expected [t] of float32 or float64, got {list(logp.shape)} of {logp.dtype}")
    streams = {"old": old, "rollout": rollout, "reference": reference, "entropy": entropy, "advantage": advantage}
    for name, stream in streams.items():
        if stream is not None and (stream.shape, stream.dtype, stream.device) != (logp.shape, logp.dtype, logp.device):
            raise ValueError(f"{name}: expected {_like(logp)} as logp, got {_like(stream)}")
    if cu_seqlens.dim() != 1 or not len(cu_seqlens) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens: expected [S + 1] integers, got {_like(cu_seqlens)}")
    sequences = len(cu_seqlens) - 1
    if coefficients.shape != (len(COEFFICIENTS), sequences) or coefficients.dtype != logp.dtype:
        raise ValueError(
            f"coefficients: expected [{len(COEFFICIENTS)}, {sequences}] of {logp.dtype}, got {_like(coefficients)}"
        )
    if sums.shape[:2] != (len(SUMS), sequences) or sums.dtype != torch.float64 or not sums.is_contiguous():
        raise ValueError(f"sums: expected empty_sums({sequences}), got {_like(sums)}")
    if (rule.entropy or rule.tilt) and entropy is None:
        raise ValueError("entropy: needed for its bonus, or for a tilt")
    if old is not None and rollout is None and rule.correction != "none":
        raise ValueError(f"rollout: needed for correction {rule.correction!r}")
    if old is not None and reference is None and rule.ratio_level == "token" and rule.ratio_base == "reference":
        raise ValueError("reference: needed for ratio_base 'reference'")


def _like(x: Tensor) -> str:
    return f"{list(x.shape)} of {x.dtype} on {x.device}"
