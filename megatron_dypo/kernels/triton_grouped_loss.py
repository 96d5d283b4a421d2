"""The grouped loss in Triton: one program per sequence, LANES tokens at a time, no atomics.

Operations and their order match the torch version. Exponentials are computed in float64 and rounded once, and
multiply-adds are not fused, so float32 results equal torch's except for an occasional rounding of its exponentials.

Legend: S sequences, C coefficients, M sums, L lanes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_dypo.kernels.grouped_loss import LossRule, lower_end
from megatron_dypo.kernels.token_functions import LARGEST

OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


def grouped_loss(
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
    """Return (summands [t], dL/dlogp [t], with ``rule.entropy`` dL/dentropy [t]).

    ``kernels.grouped_loss`` has checked the arguments; t > 0.
    """
    logp_t = logp_t.contiguous()
    streams = [None if x is None else x.contiguous() for x in (old_t, rollout_t, reference_t, entropy_t, advantage_t)]
    table = (cu_seqlens, coefficients_CS.contiguous(), sums_MSL)
    results = tuple(torch.empty_like(logp_t) for _ in range(2 + rule.entropy))
    absent = () if rule.entropy else (None,)
    sizes = (first, len(logp_t), len(cu_seqlens) - 1)
    _one_sequence[(len(cu_seqlens) - 1,)](
        logp_t, *streams, *table, *results, *absent, *sizes, **constants(rule), LANES=sums_MSL.shape[2], **OPTIONS
    )
    return results


def constants(rule: LossRule) -> dict:
    """Return the kernel's compile-time arguments."""
    return {
        "TOKEN_RATIO": rule.ratio_level == "token",
        "OLD_BASE": rule.ratio_base == "old",
        "CORRECTION": rule.correction,
        "CAP_LOW": float(lower_end(rule.cap, rule.floor)),
        "CAP": float(rule.cap),
        "CLIP_LOW": 1.0 - rule.clip_low,
        "CLIP_HIGH": 1.0 + rule.clip_high,
        "KL_COEF": float(rule.kl_coef),
        "SHAPE": rule.shape,
        "SHAPE_GAMMA": float(rule.shape_gamma),
        "SURROGATE": rule.surrogate,
        "TAU_POS": float(rule.sapo_tau_pos),
        "TAU_NEG": float(rule.sapo_tau_neg),
        "TILT": rule.tilt,
        "LARGEST": LARGEST,
    }


@triton.jit
def _clamp(x, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Clamp like torch: NaN stays NaN, where tl.minimum would return the bound."""
    return tl.where(x < LOW, LOW, tl.where(x > HIGH, HIGH, x))


@triton.jit
def _exp(x, LARGEST: tl.constexpr):
    return tl.exp(tl.where(x > LARGEST, LARGEST, x).to(tl.float64)).to(x.dtype)


@triton.jit
def _expm1(x, LARGEST: tl.constexpr):
    """Return exp(x) - 1 without cancellation (Kahan): the rounding errors of u - 1 and of log u cancel."""
    x64 = tl.where(x > LARGEST, LARGEST, x).to(tl.float64)
    u = tl.exp(x64)
    difference = u - 1.0
    exact = tl.where(difference == -1.0, -1.0, difference * (x64 / tl.log(u)))
    return tl.where(u == 1.0, x64, exact).to(x.dtype)


@triton.jit
def _gates(x):
    """Return sigmoid(x) and sigmoid(-x)."""
    x64 = x.to(tl.float64)
    return (1.0 / (1.0 + tl.exp(-x64))).to(x.dtype), (1.0 / (1.0 + tl.exp(x64))).to(x.dtype)


@triton.jit(do_not_specialize=["first", "tokens", "sequences"])
def _one_sequence(
    logp,
    old,
    rollout,
    reference,
    entropy,
    advantages,
    cu_seqlens,
    coefficients,
    sums,
    summands,
    dlogp_out,
    dentropy_out,
    first,
    tokens,
    sequences,
    TOKEN_RATIO: tl.constexpr,
    OLD_BASE: tl.constexpr,
    CORRECTION: tl.constexpr,
    CAP_LOW: tl.constexpr,
    CAP: tl.constexpr,
    CLIP_LOW: tl.constexpr,
    CLIP_HIGH: tl.constexpr,
    KL_COEF: tl.constexpr,
    SHAPE: tl.constexpr,
    SHAPE_GAMMA: tl.constexpr,
    SURROGATE: tl.constexpr,
    TAU_POS: tl.constexpr,
    TAU_NEG: tl.constexpr,
    TILT: tl.constexpr,
    LARGEST: tl.constexpr,
    LANES: tl.constexpr,
):
    """Process the part of sequence ``program_id`` within tokens ``first`` to ``first + tokens``; it may be empty."""
    s = tl.program_id(0)
    start, stop = tl.load(cu_seqlens + s), tl.load(cu_seqlens + s + 1)
    begin, end = tl.maximum(start, first), tl.minimum(stop, first + tokens)
    if begin < end:
        of_sequence = tl.load(coefficients + s)
        grpo = tl.load(coefficients + sequences + s)
        grpo_constant = tl.load(coefficients + 2 * sequences + s)
        slope = tl.load(coefficients + 3 * sequences + s)
        nll = tl.load(coefficients + 4 * sequences + s)
        if SHAPE != "none":
            shaped = tl.load(coefficients + 5 * sequences + s)
        if dentropy_out is not None:
            bonus = tl.load(coefficients + 6 * sequences + s)
        if TILT:
            tilt = tl.load(coefficients + 7 * sequences + s)

        lane = tl.arange(0, LANES)
        at = sums + s * LANES + lane
        row = sequences * LANES  # of the sums
        grpo_sum, kl_sum = tl.load(at), tl.load(at + row)
        dlogp_sum, clipped_sum = tl.load(at + 2 * row), tl.load(at + 3 * row)
        logp_sum, entropy_sum = tl.load(at + 4 * row), tl.load(at + 5 * row)
        if SHAPE != "none":
            shaped_sum, dlogp_shaped_sum = tl.load(at + 6 * row), tl.load(at + 7 * row)
        if TILT:
            tilted_sum, dlogp_tilted_sum = tl.load(at + 8 * row), tl.load(at + 9 * row)

        for block in range((begin - start) // LANES, tl.cdiv(end - start, LANES)):
            place = start + block * LANES + lane
            here = (place >= begin) & (place < end)
            t = place - first
            now = tl.load(logp + t, here, 0.0)
            summand, dlogp = tl.zeros_like(now), tl.zeros_like(now) + grpo_constant

            if old is not None:
                weight = tl.zeros_like(now) + grpo
                before = tl.load(old + t, here, 0.0)
                if CORRECTION != "none":
                    trust = _exp(before - tl.load(rollout + t, here, 0.0), LARGEST)
                    if CORRECTION == "truncate":
                        weight *= tl.where(trust > CAP, CAP, trust)
                    else:
                        inside = ((trust >= CAP_LOW) & (trust <= CAP)).to(now.dtype)
                        weight *= inside * trust if CORRECTION == "icepop" else inside
                if TOKEN_RATIO:
                    base = before if OLD_BASE else tl.load(reference + t, here, 0.0)
                    ratio = _exp(now - base, LARGEST)
                    if advantages is not None:
                        advantage = tl.load(advantages + t, here, 0.0)
                    else:
                        advantage = tl.zeros_like(now) + of_sequence
                    if SURROGATE == "clip":
                        free = ratio * advantage
                        bounded = _clamp(ratio, CLIP_LOW, CLIP_HIGH) * advantage
                        clipped = bounded < free
                        summand = -(tl.where(clipped, bounded, free) * weight)
                        dlogp = tl.where(clipped, 0.0, summand) + grpo_constant
                        clipped_sum += (clipped & here).to(tl.float64)
                    elif SURROGATE == "cispo":
                        bounded = _clamp(ratio, CLIP_LOW, CLIP_HIGH)
                        summand = -(bounded * advantage * now * weight)
                        dlogp = grpo_constant - bounded * advantage * weight
                        clipped_sum += ((bounded != ratio) & here).to(tl.float64)
                    else:
                        tau = tl.where(advantage > 0.0, tl.zeros_like(now) + TAU_POS, tl.zeros_like(now) + TAU_NEG)
                        gain = tl.where(
                            advantage > 0.0, tl.zeros_like(now) + 4.0 / TAU_POS, tl.zeros_like(now) + 4.0 / TAU_NEG
                        )
                        gate, shut = _gates(tau * (ratio - 1.0))
                        summand = -(gate * gain * advantage * weight)
                        dlogp = grpo_constant - ratio * shut * gate * 4.0 * advantage * weight
                if reference is not None:
                    gap = tl.load(reference + t, here, 0.0) - now
                    growth = _expm1(gap, LARGEST)
                    kl = (growth - gap) * weight
                    if KL_COEF != 0.0:
                        summand += kl * KL_COEF
                        dlogp -= weight * KL_COEF * growth
                    kl_sum += tl.where(here, kl, 0.0).to(tl.float64)
                grpo_sum += tl.where(here, summand, 0.0).to(tl.float64)

            dlogp_sum += tl.where(here, tl.abs(dlogp), 0.0).to(tl.float64)
            logp_sum += now.to(tl.float64)
            if entropy is not None:
                spread = tl.load(entropy + t, here, 0.0)
                entropy_sum += spread.to(tl.float64)
            if TILT:
                tilted = _exp(tilt * spread, LARGEST)
                tilted_sum += tl.where(here, tilted * now, 0.0).to(tl.float64)
                dlogp_tilted_sum += tl.where(here, tilted, 0.0).to(tl.float64)
                leaning = nll * tilted
                summand, dlogp = summand - leaning * now, dlogp + slope - leaning
            else:
                summand, dlogp = summand - nll * now, dlogp + slope - nll
            if SHAPE != "none":
                p = tl.exp(tl.where(now > LARGEST, LARGEST, now).to(tl.float64))
                if SHAPE == "luffy":
                    f64 = p / (p + SHAPE_GAMMA)
                    f, df = f64.to(now.dtype), (f64 * (SHAPE_GAMMA / (p + SHAPE_GAMMA))).to(now.dtype)
                elif SHAPE == "p":
                    f, df = p.to(now.dtype), p.to(now.dtype)
                else:
                    if SHAPE == "nll":
                        df = tl.zeros_like(now) + 1.0
                    elif SHAPE == "phi":
                        df = (p * -_expm1(now.to(tl.float64), LARGEST)).to(now.dtype)
                    else:
                        df = p.to(now.dtype)
                    f = df * now
                summand, dlogp = summand - shaped * f, dlogp - shaped * df
                shaped_sum += tl.where(here, f, 0.0).to(tl.float64)
                dlogp_shaped_sum += tl.where(here, df, 0.0).to(tl.float64)
            if dentropy_out is not None:
                summand -= bonus * spread
                tl.store(dentropy_out + t, tl.zeros_like(now) - bonus, here)
            tl.store(summands + t, summand, here)
            tl.store(dlogp_out + t, dlogp, here)

        tl.store(at, grpo_sum)
        tl.store(at + row, kl_sum)
        tl.store(at + 2 * row, dlogp_sum)
        tl.store(at + 3 * row, clipped_sum)
        tl.store(at + 4 * row, logp_sum)
        tl.store(at + 5 * row, entropy_sum)
        if SHAPE != "none":
            tl.store(at + 6 * row, shaped_sum)
            tl.store(at + 7 * row, dlogp_shaped_sum)
        if TILT:
            tl.store(at + 8 * row, tilted_sum)
            tl.store(at + 9 * row, dlogp_tilted_sum)
