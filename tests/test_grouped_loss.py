"""The grouped loss kernel: torch against float64 autograd, Triton against torch, equal bits for any split.

Triton runs in its interpreter, in a separate process: the switch is read when triton is imported. It is also compiled
ahead of time for an H100. Legend: t tokens, S sequences, C coefficients, M sums, L lanes.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_dypo.kernels import LossRule, empty_sums, grouped_loss, linear_loss, read_sums
from megatron_dypo.kernels.grouped_loss import COEFFICIENTS, SUMS
from tests import reference_objective as page

COUNTS = [1, 17, 0, 7, 30, 1, 6]  # tokens per sequence; one is empty, every third is a teacher trace
RULES = [
    LossRule(0.15, 0.28, kl_coef, ratio_level, ratio_base, correction, cap=1.4)
    for ratio_level, ratio_base, kl_coef, correction in itertools.product(
        ["token", "sequence"], ["old", "reference"], [0.0, 0.3], ["none", "truncate", "mask"]
    )
]
MODES = [  # every token function, some combined
    LossRule(shape="luffy", shape_gamma=0.3),
    LossRule(kl_coef=0.3, correction="mask", shape="p", entropy=True),
    LossRule(surrogate="cispo", clip_low=0.15, clip_high=0.28, shape="nll"),
    LossRule(surrogate="cispo", kl_coef=0.3, correction="truncate", cap=1.4, ratio_base="reference", tilt=True),
    LossRule(surrogate="sapo", sapo_tau_pos=1.3, sapo_tau_neg=2.1, shape="phi"),
    LossRule(surrogate="sapo", kl_coef=0.3, correction="mask", cap=1.4, shape="sg_p", entropy=True, tilt=True),
    LossRule(tilt=True),
]
BANDS = [LossRule(correction=kind, cap=1.4, floor=0.9) for kind in ("mask", "icepop")]
BANDS += [LossRule(kl_coef=0.3, correction="icepop", cap=1.4)]
RULES += BANDS + MODES
IN_BOTH_DTYPES = [*((torch.float32, rule) for rule in RULES), *((torch.float64, rule) for rule in RULES[::5] + MODES)]
NAMES = [
    "-".join(
        map(
            str,
            (rule.ratio_level, rule.ratio_base, rule.kl_coef, rule.correction, rule.floor, rule.surrogate, rule.shape),
        )
    )
    + "-tilt" * rule.tilt
    for rule in RULES
]
STREAMS = ("logp", "old", "rollout", "reference", "entropy", "advantage")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@dataclass
class Pack:
    """Sequences of ``counts`` tokens, coefficients [C, S] and streams [t], in one dtype."""

    counts: list[int]
    coefficients: Tensor
    logp: Tensor
    old: Tensor | None
    rollout: Tensor | None
    reference: Tensor | None
    entropy: Tensor | None
    advantage: Tensor | None = None  # per token

    @property
    def cu_seqlens(self) -> Tensor:
        return torch.tensor([0, *itertools.accumulate(self.counts)], device=self.logp.device)

    def to(self, device: str) -> Pack:
        present = [name for name in (*STREAMS, "coefficients") if getattr(self, name) is not None]
        return replace(self, **{name: getattr(self, name).to(device) for name in present})

    def part(self, t: slice) -> dict[str, Tensor | None]:
        return {name: None if (x := getattr(self, name)) is None else x[t] for name in STREAMS}


def make_pack(counts: list[int] = COUNTS, dtype=torch.float64, drift: float = 0.3, seed: int = 0) -> Pack:
    """Return numbers that float32 holds; drift 0: all policies are equal, as on a first step."""
    generator = torch.Generator().manual_seed(seed)
    tokens, sequences = sum(counts), len(counts)
    old = -2 * torch.empty(tokens).exponential_(generator=generator)
    others = [old + drift * torch.randn(tokens, generator=generator) for _ in range(3)]
    table_CS = torch.randn(len(COEFFICIENTS), sequences, generator=generator)
    table_CS[1].abs_()
    is_trace_S = torch.arange(sequences) % 3 == 1
    table_CS[:4, is_trace_S] = 0.0
    entropy = torch.rand(tokens, generator=generator)
    return Pack(counts, *(x.to(dtype) for x in (table_CS, others[0], old, others[1], others[2], entropy)))


def run(
    pack: Pack, rule: LossRule, edges: list[int] | None = None, backend: str = "auto", lanes: int | None = None
) -> dict[str, Tensor]:
    """Return summands and slopes [t] and the sums [S], from one call per range between the ``edges``."""
    sums = empty_sums(len(pack.counts), pack.logp.device)
    sums = sums if lanes is None else sums.new_zeros(*sums.shape[:2], lanes)
    parts = []
    for start, stop in itertools.pairwise(edges or [0, len(pack.logp)]):
        streams = pack.part(slice(start, stop))
        logp = streams.pop("logp")
        table = (pack.cu_seqlens, pack.coefficients, sums, rule)
        parts.append(grouped_loss(logp, *table, first=start, backend=backend, **streams))
    parts = [torch.cat(pieces) for pieces in zip(*parts, strict=True)]
    return dict(zip(("summands", "slopes", "bonus"), parts, strict=False)) | read_sums(sums)


def statement(pack: Pack, rule: LossRule) -> dict[str, Tensor]:
    """Compute the same as the objective's page states it, slopes by torch's autograd, all in float64."""
    logp_t, old_t, engine_t, reference_t, entropy_t = (getattr(pack, name).double() for name in STREAMS[:5])
    logp_t.requires_grad_()
    counts_S = torch.tensor(pack.counts)
    A_t, w_t, c_t, g_t, v_t, u_t, e_t, a_t = pack.coefficients.double().repeat_interleave(counts_S, 1)
    A_t = A_t if pack.advantage is None else pack.advantage.double()
    trust_t = page.trust(old_t - engine_t, rule.correction, rule.cap, rule.floor)
    log_ratio_t = logp_t - (old_t if rule.ratio_base == "old" else reference_t)
    surrogate_t = page.surrogate(log_ratio_t, A_t, logp_t, rule) * (rule.ratio_level == "token")
    gap_t = reference_t - logp_t
    kl_t = w_t * trust_t * (gap_t.exp() - gap_t - 1)
    grpo_t = -w_t * trust_t * surrogate_t + rule.kl_coef * kl_t
    ratio_t = log_ratio_t.exp()
    above_t, below_t = ratio_t > 1 + rule.clip_high, ratio_t < 1 - rule.clip_low
    clipped_t = {
        "clip": (A_t > 0) & above_t | (A_t < 0) & below_t,
        "cispo": above_t | below_t,
        "sapo": above_t & False,
    }[rule.surrogate]
    f_t = 0 * logp_t if rule.shape == "none" else page.shape(logp_t, rule.shape, rule.shape_gamma)
    tilted_t = (a_t * entropy_t).exp()
    entropy_t.requires_grad_()
    v_t = v_t * tilted_t if rule.tilt else v_t
    own_t = -e_t * entropy_t * rule.entropy + grpo_t + (c_t + g_t - v_t) * logp_t - u_t * f_t
    (df_t,) = torch.autograd.grad(f_t.sum(), logp_t, retain_graph=True)
    (grpo_slope_t,) = torch.autograd.grad((grpo_t + c_t * logp_t).sum(), logp_t, retain_graph=True)
    (dlogp_t,) = torch.autograd.grad(own_t.sum(), logp_t, retain_graph=True)
    clipped_t = clipped_t * (rule.ratio_level == "token")
    tilts_t = (tilted_t * logp_t * rule.tilt, tilted_t * rule.tilt)
    sums_t = (grpo_t, kl_t, grpo_slope_t.abs(), clipped_t, logp_t, entropy_t, f_t, df_t, *tilts_t)

    def each(x_t: Tensor) -> Tensor:
        return torch.stack([piece.detach().double().sum() for piece in x_t.split(pack.counts)])

    sums = {name: each(x_t) for name, x_t in zip(SUMS, sums_t, strict=True)}
    sums |= {"bonus": torch.autograd.grad(own_t.sum(), entropy_t)[0]} if rule.entropy else {}
    return {"summands": (own_t - (c_t + g_t) * logp_t).detach(), "slopes": dlogp_t} | sums


def assert_near(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    for name, correct in expected.items():
        error = (actual[name].double() - correct.double()).norm()
        assert error <= tolerance * correct.double().norm(), (name, error)


def assert_same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, correct in expected.items():
        assert torch.equal(actual[name], correct), name


# --- torch


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_values_slopes_and_sums_equal_the_statement_by_autograd(rule: LossRule) -> None:
    """GRPO, GAL, SFT and KL sequences in one pack, in one pass."""
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 1e-6)):
        pack = make_pack(dtype=dtype)
        assert_near(run(pack, rule), statement(pack, rule), tolerance)


def test_the_pack_reaches_every_branch() -> None:
    sums = run(make_pack(), RULES[0])
    assert 0 < sums["clipped"].sum() < sum(COUNTS) / 2
    trust_t = page.trust(make_pack().old - make_pack().rollout, "mask", 1.4)
    assert 0 < trust_t.sum() < len(trust_t)


def one_token_each(logp: Tensor, old: Tensor | None = None, entropy: Tensor | None = None, **columns: Tensor) -> Pack:
    """Build one sequence per token, whose coefficients are 0 except for ``columns``."""
    table_CS = torch.zeros(len(COEFFICIENTS), len(logp), dtype=logp.dtype)
    for name, values in columns.items():
        table_CS[COEFFICIENTS.index(name)] = values
    return Pack([1] * len(logp), table_CS, logp, old, old, None, entropy)


def central(f: Callable[[Tensor], Tensor], x_t: Tensor, h: float = 1e-3) -> Tensor:
    """Return f' by the fourth-order central difference, with an error of h^4."""
    return (8 * (f(x_t + h) - f(x_t - h)) - (f(x_t + 2 * h) - f(x_t - 2 * h))) / (12 * h)


@pytest.mark.parametrize("rule", MODES, ids=NAMES[-len(MODES) :])
@pytest.mark.parametrize("column", ["advantage", "nll", "shaped"])
def test_slopes_equal_the_central_difference_of_the_summands(rule: LossRule, column: str) -> None:
    """Each term alone. For constants of the derivative it is the summand over logp; others are differentiated."""
    rule = replace(rule, kl_coef=0.0, ratio_base="old")
    pack = replace(make_pack(), reference=None)
    keep = ("grpo", "tilt", column)
    pack.coefficients[[row for row, name in enumerate(COEFFICIENTS) if name not in keep]] = 0.0
    logp_t, log_ratio_t = pack.logp, pack.logp - pack.old
    found = run(pack, rule)
    holds = {"advantage": rule.surrogate == "cispo", "nll": True, "shaped": rule.shape in ("phi", "sg_p")}
    if holds[column]:
        expected_t = found["summands"] / logp_t
    else:
        expected_t = central(lambda x_t: run(replace(pack, logp=x_t), rule)["summands"], logp_t)
    smooth_t = torch.ones(len(logp_t), dtype=torch.bool)
    if column == "advantage" and rule.surrogate == "clip":
        kinks = [math.log(bound) for bound in (1 - rule.clip_low, 1 + rule.clip_high)]
        smooth_t = torch.stack([(log_ratio_t - kink).abs() > 2e-3 for kink in kinks]).all(0)
    assert smooth_t.sum() > len(smooth_t) / 2
    torch.testing.assert_close(found["slopes"][smooth_t], expected_t[smooth_t], rtol=1e-9, atol=1e-10)


PROBABILITIES = [1.0, 1 - 1e-9, 1 - 1e-4, 0.5, 1e-3, 1e-12, 0.0]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6)], ids=str)
def test_shapes_hold_where_p_is_near_0_and_1(dtype: torch.dtype, tolerance: float) -> None:
    """Relative to each value; 1 - p for p near 1 is -logp to first order."""
    logp_t = torch.tensor([*(math.log1p(p - 1) for p in PROBABILITIES[:-1]), -200.0], dtype=dtype)
    exact_t = logp_t.double()
    p_t, rest_t = exact_t.exp(), -exact_t.expm1()
    slopes = {"luffy": 0.1 * p_t / (p_t + 0.1) ** 2, "p": p_t, "nll": torch.ones_like(p_t), "phi": p_t * rest_t}
    slopes["sg_p"] = p_t
    values = {"luffy": p_t / (p_t + 0.1), "p": p_t} | {name: slopes[name] * exact_t for name in ("nll", "phi", "sg_p")}
    for shape, slope_t in slopes.items():
        found = run(one_token_each(logp_t, shaped=-torch.ones_like(logp_t)), LossRule(shape=shape))
        torch.testing.assert_close(found["summands"].double(), values[shape], rtol=tolerance, atol=1e-40)
        torch.testing.assert_close(found["slopes"].double(), slope_t, rtol=tolerance, atol=1e-40)
    assert 0.9e-9 < slopes["phi"][1] < 1.1e-9


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("surrogate", ["cispo", "sapo"])
def test_a_huge_ratio_is_bounded_and_so_is_its_slope(surrogate: str, dtype: torch.dtype) -> None:
    gaps_t = torch.tensor([-80.0, -3.0, 0.0, 3.0, 30.0, 59.0, 80.0, 1e4], dtype=dtype)
    for advantage in (2.0, -2.0):
        ones_t = torch.ones_like(gaps_t)
        pack = one_token_each(gaps_t - 1, old=-ones_t, advantage=advantage * ones_t, grpo=ones_t)
        found = run(pack, LossRule(surrogate=surrogate, clip_low=0.5, clip_high=3.0))
        ratio_t = gaps_t.double().clamp(max=60).exp()
        if surrogate == "cispo":
            slopes_t = ratio_t.clamp(0.5, 4.0)
            assert found["clipped"].tolist() == [1, 1, 0, 1, 1, 1, 1, 1]
        else:
            tau = 1.0 if advantage > 0 else 1.05
            gate_t = torch.sigmoid(tau * (ratio_t - 1))
            slopes_t = 4 * ratio_t * gate_t * torch.sigmoid(-tau * (ratio_t - 1))
            assert not found["clipped"].any() and slopes_t[2] == 1
            torch.testing.assert_close(found["summands"].double(), -advantage * 4 / tau * gate_t, rtol=1e-6, atol=0)
        torch.testing.assert_close(found["slopes"].double(), -advantage * slopes_t, rtol=1e-4, atol=1e-30)


def test_a_tilt_of_0_is_no_tilt_and_a_huge_one_is_bounded() -> None:
    pack = make_pack()
    pack.coefficients[COEFFICIENTS.index("tilt")] = 0.0
    plain = run(pack, LossRule())
    assert_same_bits(run(pack, LossRule(tilt=True)), {name: plain[name] for name in ("summands", "slopes", "grpo")})
    for dtype in (torch.float32, torch.float64):
        one_t = torch.ones(1, dtype=dtype)
        steep = run(one_token_each(-one_t, entropy=9 * one_t, tilt=1e3 * one_t, nll=one_t), LossRule(tilt=True))
        assert steep["summands"].item() == -steep["slopes"].item() == pytest.approx(math.exp(60), rel=1e-6)


@pytest.mark.parametrize("rule", MODES, ids=NAMES[-len(MODES) :])
def test_gradients_through_the_fused_head_equal_autograd_through_logits(rule: LossRule) -> None:
    """Each mode as in a training step: one pass of ``linear_loss``, against the statement on naive logits."""
    pack, generator = make_pack(seed=1), torch.Generator().manual_seed(2)
    tokens, width, vocabulary = len(pack.logp), 8, 23
    hidden_TH = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    weight_VH = torch.randn(vocabulary, width, generator=generator, dtype=torch.float64)
    targets_T = torch.randint(0, vocabulary, (tokens,), generator=generator)
    inputs = hidden_TH.requires_grad_(), weight_VH.requires_grad_()
    logits_TV = (inputs[0] @ inputs[1].t()).log_softmax(1)
    logp_T = logits_TV.gather(1, targets_T[:, None]).squeeze(1)
    entropy_T = -(logits_TV.exp() * logits_TV).sum(1)
    others = {name: logp_T.detach() + getattr(pack, name) - pack.logp for name in ("old", "rollout", "reference")}
    table, sums = (pack.cu_seqlens, pack.coefficients), empty_sums(len(pack.counts))

    def token_loss(logp_t: Tensor, entropy_t: Tensor | None, t: slice) -> tuple[Tensor, ...]:
        streams = {name: x_T[t] for name, x_T in others.items()}
        return grouped_loss(logp_t, *table, sums, rule, first=t.start, entropy=entropy_t, **streams)

    loss, _ = linear_loss(*inputs, targets_T, token_loss, entropy=True)
    known = statement(replace(pack, logp=logp_T.detach(), entropy=entropy_T.detach(), **others), rule)
    local = (
        (known["slopes"] * logp_T).sum() + (known["bonus"] * entropy_T).sum()
        if rule.entropy
        else (known["slopes"] * logp_T).sum()
    )
    torch.testing.assert_close(loss, known["summands"].sum(), rtol=1e-12, atol=0)
    for ours, correct in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(local, inputs), strict=True):
        torch.testing.assert_close(ours, correct, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_cut_at_any_place_gives_the_same_bits(dtype: torch.dtype) -> None:
    for rule in [*RULES[::5], *MODES]:
        pack = make_pack(dtype=dtype)
        tokens = len(pack.logp)
        whole = run(pack, rule)
        for edges in ([0, cut, tokens] for cut in range(tokens + 1)):
            assert_same_bits(run(pack, rule, edges), whole)
        for length in (1, 7, 16):
            assert_same_bits(run(pack, rule, [*range(0, tokens, length), tokens]), whole)


def test_a_sequence_gives_the_same_bits_in_any_pack() -> None:
    rule = LossRule(kl_coef=0.1, correction="truncate")
    pack = make_pack(dtype=torch.float32)
    together = run(pack, rule)
    for s, t in enumerate(zip([0, *itertools.accumulate(COUNTS)], itertools.accumulate(COUNTS), strict=False)):
        alone = run(Pack([COUNTS[s]], pack.coefficients[:, s : s + 1].contiguous(), **pack.part(slice(*t))), rule)
        for name, value in alone.items():
            assert torch.equal(
                value, together[name][slice(*t) if name in ("summands", "slopes", "bonus") else slice(s, s + 1)]
            )


def test_offsets_may_be_of_32_bits() -> None:
    pack = make_pack()
    sums = empty_sums(len(COUNTS))
    results = grouped_loss(pack.logp, pack.cu_seqlens.int(), pack.coefficients, sums, LossRule(), old=pack.old)
    expected = run(replace(pack, reference=None, entropy=None), LossRule())
    assert_same_bits(dict(zip(("summands", "slopes"), results, strict=True)) | read_sums(sums), expected)


def test_streams_that_are_not_there_leave_out_their_terms() -> None:
    pack, rule = make_pack(), LossRule(kl_coef=0.3)
    assert not run(replace(pack, entropy=None), rule)["entropy"].any()
    without_kl = run(replace(pack, reference=None), rule)
    assert not without_kl["kl"].any()
    plain = run(pack, LossRule())
    assert_same_bits(without_kl, {name: plain[name] for name in ("summands", "slopes")})
    _, _, _, gal_t, sft_t, *_ = pack.coefficients.repeat_interleave(torch.tensor(COUNTS), 1)
    traces = run(replace(pack, old=None, rollout=None, reference=None), rule)
    constant_t = pack.coefficients[2].repeat_interleave(torch.tensor(COUNTS))
    assert_same_bits(traces, {"summands": -sft_t * pack.logp, "slopes": constant_t + gal_t - sft_t})
    assert not any(traces[name].any() for name in ("grpo", "kl", "clipped"))


def with_advantages(pack: Pack) -> Pack:
    """Give each token its own advantage, some of them 0, and NaN in the column, which must not be read."""
    drawn_t = torch.randn(len(pack.logp), generator=torch.Generator().manual_seed(5), dtype=pack.logp.dtype)
    table_CS = pack.coefficients.clone()
    table_CS[COEFFICIENTS.index("advantage")] = math.nan
    return replace(pack, coefficients=table_CS, advantage=drawn_t * (drawn_t.abs() > 0.2))


@pytest.mark.parametrize("rule", [LossRule(kl_coef=0.3), *(LossRule(surrogate=name) for name in ("cispo", "sapo"))])
def test_a_stream_of_advantages_takes_the_place_of_the_column(rule: LossRule) -> None:
    pack = with_advantages(make_pack())
    ours, theirs = run(pack, rule), statement(pack, rule)
    assert_near({name: ours[name] for name in theirs}, theirs, 1e-12)
    spread = replace(
        make_pack(), advantage=make_pack().coefficients[0].repeat_interleave(torch.tensor(COUNTS))
    )  # the column's own numbers
    assert_same_bits(run(spread, rule), run(make_pack(), rule))


def close_policies() -> tuple[Pack, Tensor]:
    """Return a pack whose policies differ by 1e-5, and the KL's sums [S] from the first terms of exp(x) - x - 1."""
    pack = make_pack(drift=1e-5)
    gap_t = pack.reference - pack.logp
    kl_t = pack.coefficients[1].repeat_interleave(torch.tensor(COUNTS)) * (gap_t**2 / 2 + gap_t**3 / 6)
    return pack, torch.stack([piece.sum() for piece in kl_t.split(COUNTS)])


def test_the_kl_of_close_policies_does_not_cancel() -> None:
    pack, kl_S = close_policies()
    assert_near(run(pack, LossRule()), {"kl": kl_S}, 1e-9)


@pytest.mark.parametrize("counts", [[], [0], [0, 0], [1], [1, 1, 1]], ids=str)
def test_packs_of_nothing_and_of_one_token_each(counts: list[int]) -> None:
    rule = LossRule(kl_coef=0.1, correction="mask")
    pack = make_pack(counts)
    result = run(pack, rule)
    assert result["slopes"].shape == (sum(counts),) and result["grpo"].shape == (len(counts),)
    if counts:
        assert_near(result, statement(pack, rule), 1e-13)


def test_a_not_a_number_stays_in_its_sequence() -> None:
    pack, rule = make_pack(), LossRule(kl_coef=0.1, correction="truncate", ratio_base="reference")
    clean = run(pack, rule)
    for name in ("logp", "old", "rollout", "reference"):
        spoilt = replace(pack, **{name: getattr(pack, name).clone()})
        getattr(spoilt, name)[20] = math.nan  # of sequence 3
        result = run(spoilt, rule)
        assert result["slopes"].isnan().nonzero().tolist() == [[20]]
        for total in ("grpo", "dlogp_grpo"):
            assert result[total].isnan().nonzero().tolist() == [[3]]
            assert torch.equal(result[total][[0, 1, 2, 4, 5, 6]], clean[total][[0, 1, 2, 4, 5, 6]])


BAD = {
    "backend": ({"backend": "fast"}, "backend: 'fast' is unknown"),
    "logp_shape": ({"logp": torch.zeros(2, 2)}, r"logp: expected \[t\] of float32 or float64, got \[2, 2\]"),
    "logp_dtype": ({"logp": torch.zeros(4).bfloat16()}, "logp: expected .* got .* torch.bfloat16"),
    "old_length": ({"old": torch.zeros(3)}, r"old: expected \[4\] .* got \[3\]"),
    "rollout_dtype": ({"rollout": torch.zeros(4).double()}, "rollout: expected .* got .*float64"),
    "reference_length": ({"reference": torch.zeros(5)}, r"reference: expected \[4\]"),
    "entropy_length": ({"entropy": torch.zeros(5)}, r"entropy: expected \[4\]"),
    "no_offsets": ({"cu_seqlens": torch.zeros(0).long()}, r"cu_seqlens: expected \[S \+ 1\]"),
    "offsets_dtype": ({"cu_seqlens": torch.zeros(3)}, "cu_seqlens: .* got .*float32"),
    "table_shape": ({"coefficients": torch.zeros(2, 8)}, r"coefficients: expected \[8, 2\] .* got \[2, 8\]"),
    "table_dtype": ({"coefficients": torch.zeros(8, 2).double()}, "coefficients: expected .* got .*float64"),
    "sums_shape": ({"sums": empty_sums(3)}, r"sums: expected empty_sums\(2\)"),
    "sums_dtype": ({"sums": empty_sums(2).float()}, "sums: expected .* got .*float32"),
    "no_entropy": ({"rule": LossRule(entropy=True), "entropy": None}, "entropy: needed for its bonus"),
    "no_entropy_to_tilt_by": ({"rule": LossRule(tilt=True), "entropy": None}, "entropy: needed .* or for a tilt"),
    "surrogate": ({"rule": LossRule(surrogate="ppo")}, "rule.surrogate: 'ppo' is unknown; known: clip, cispo, sapo"),
    "shape": ({"rule": LossRule(shape="psi")}, "rule.shape: 'psi' is unknown; known: none, luffy"),
    "no_rollout": ({"rule": LossRule(correction="mask"), "rollout": None}, "rollout: needed for correction 'mask'"),
    "no_reference": ({"rule": LossRule(ratio_base="reference"), "reference": None}, "reference: needed for ratio_base"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input_is_refused_by_name(bad: str) -> None:
    changes, message = BAD[bad]
    arguments = {name: torch.zeros(4) for name in STREAMS} | {
        "cu_seqlens": torch.tensor([0, 1, 4]),
        "coefficients": torch.zeros(8, 2),
        "sums": empty_sums(2),
        "rule": LossRule(),
    }
    grouped_loss(**arguments)
    with pytest.raises(ValueError, match=message):
        grouped_loss(**(arguments | changes))


def test_offsets_that_do_not_cover_the_tokens_are_refused() -> None:
    pack = replace(make_pack(), counts=COUNTS[:-1])
    with pytest.raises(RuntimeError):
        run(replace(pack, coefficients=pack.coefficients[:, :-1]), LossRule())


# --- Triton, interpreted


def in_child(*functions: Callable[[], None], **environment: str) -> None:
    """Run ``functions`` of this file in a fresh process."""
    program = f"import {__name__} as tests\n" + "\n".join(f"tests.{function.__name__}()" for function in functions)
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | environment, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr


@needs_triton
def test_triton_equals_torch() -> None:
    """One process: Triton's interpreter takes seconds to start."""
    checks = every_rule_in_triton, first_step_in_triton, cuts_in_triton, not_finite_in_triton
    in_child(*checks, TRITON_INTERPRET="1")


def every_rule_in_triton() -> None:
    """Up to rounding: torch's exponentials differ, and lanes sum in another order."""
    for dtype, rule in IN_BOTH_DTYPES:
        pack = make_pack(dtype=dtype)
        assert_near(run(pack, rule, backend="triton", lanes=16), run(pack, rule), 4 * torch.finfo(dtype).eps)
    pack, rule = make_pack([1, 5, 0, 3]), LossRule(kl_coef=0.1)
    fewer = [replace(pack, entropy=None), replace(pack, old=None, rollout=None, reference=None)]
    for part in fewer + [make_pack(counts) for counts in ([], [0, 0], [1], [1, 1, 1])]:
        assert_near(run(part, rule, backend="triton", lanes=4), run(part, rule), 1e-15)
    pack, kl_S = close_policies()
    assert_near(run(pack, rule, backend="triton", lanes=16), {"kl": kl_S}, 1e-9)
    for rule in (LossRule(kl_coef=0.1), LossRule(surrogate="cispo"), LossRule(surrogate="sapo")):
        pack = with_advantages(make_pack([1, 5, 0, 3]))
        assert_near(run(pack, rule, backend="triton", lanes=4), run(pack, rule), 1e-15)


def first_step_in_triton() -> None:
    """Bit for bit: all ratios are 1, no exponential is rounded, and one lane adds in torch's order."""
    for dtype, rule in IN_BOTH_DTYPES:
        if rule.shape != "none" or rule.tilt or rule.surrogate == "sapo":
            continue  # these involve an exponential
        pack = make_pack([1, 5, 0, 3], dtype, drift=0.0)
        assert_same_bits(run(pack, rule, backend="triton"), run(pack, rule))


def cuts_in_triton() -> None:
    """A split at any place gives the same bits."""
    pack = make_pack([1, 6, 0, 2], torch.float32)
    tokens = len(pack.logp)
    for rule in (
        LossRule(kl_coef=0.3, correction="truncate"),
        LossRule(surrogate="sapo", shape="phi", tilt=True, entropy=True),
    ):
        whole = run(pack, rule, backend="triton", lanes=4)
        for edges in [[0, cut, tokens] for cut in range(tokens + 1)] + [list(range(tokens + 1))]:
            assert_same_bits(run(pack, rule, edges, backend="triton", lanes=4), whole)


def not_finite_in_triton(device: str = "cpu") -> None:
    """Log-probs and coefficients that are NaN or infinite, and policies so far apart that a ratio would overflow."""
    for value, name in itertools.product((math.nan, math.inf, 300.0, -300.0), (*STREAMS[:4], "coefficients")):
        for rule in (
            LossRule(kl_coef=0.3, correction="truncate", shape="luffy"),
            LossRule(correction="mask", ratio_base="reference", shape="phi", tilt=True),
            LossRule(surrogate="cispo", shape="sg_p"),
            LossRule(surrogate="sapo", shape="nll"),
        ):
            pack = make_pack([3, 2, 5], torch.float32)
            getattr(pack, name).flatten()[7] = value
            ours, theirs = run(pack.to(device), rule, backend="triton", lanes=4), run(pack, rule)
            for part, correct in theirs.items():
                torch.testing.assert_close(ours[part].cpu(), correct, rtol=1e-6, atol=1e-6, equal_nan=True)


@needs_triton
def test_triton_compiles_for_an_h100_without_spills(tmp_path: Path) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from megatron_dypo.kernels import triton_grouped_loss as kernel
    from megatron_dypo.kernels.grouped_loss import LANES

    types = dict.fromkeys((*STREAMS, "advantages", "coefficients", "summands", "dlogp_out", "dentropy_out"), "*fp32")
    types |= {"cu_seqlens": "*i64", "sums": "*fp64", "first": "i32", "tokens": "i32", "sequences": "i32"}
    for rule, absent in (
        (LossRule(kl_coef=0.1, correction="truncate", entropy=True), ("advantages",)),
        (LossRule(ratio_base="reference", correction="mask"), ("advantages", "entropy", "dentropy_out")),
        (LossRule(), ("advantages", "old", "rollout", "reference", "dentropy_out")),
        (LossRule(shape="luffy"), ("advantages", "old", "rollout", "reference", "dentropy_out")),
        (LossRule(surrogate="sapo", correction="mask", shape="phi", tilt=True, entropy=True), ("advantages",)),
        (LossRule(surrogate="cispo", shape="sg_p"), ("advantages", "reference", "entropy", "dentropy_out")),
        (LossRule(kl_coef=0.1), ("entropy", "dentropy_out")),
    ):
        constants = kernel.constants(rule) | {"LANES": LANES} | dict.fromkeys(absent)
        function = kernel._one_sequence
        signature = {name: "constexpr" if name in constants else types[name] for name in function.arg_names}
        compiled = triton.compile(
            ASTSource(function, signature, constants), target=GPUTarget("cuda", 90, 32), options=kernel.OPTIONS
        )
        assert "fma.rn.f32" not in compiled.asm["ptx"]  # torch rounds every product
        (tmp_path / "kernel.cubin").write_bytes(compiled.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run(
            [tool, "--dump-resource-usage", tmp_path / "kernel.cubin"], capture_output=True, text=True, check=True
        ).stdout
        assert " STACK:0 " in usage and " LOCAL:0 " in usage, usage  # where ptxas puts its spills


def test_torch_does_without_triton() -> None:
    in_child(without_triton)


def without_triton() -> None:
    sys.modules["triton"] = None  # its import fails
    pack = make_pack()
    assert_near(run(pack, RULES[0]), statement(pack, RULES[0]), 1e-13)
