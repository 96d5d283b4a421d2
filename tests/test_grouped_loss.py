"""The grouped loss kernel: torch against a float64 statement by autograd, Triton against torch, any cut the same bits.

Triton runs in its interpreter, in a process of its own: the switch is read when triton is imported. Ahead of time it is
compiled for an H100. Legend: t tokens, S sequences, C coefficients, M sums, L lanes.
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

from megatron_dypo.kernels import LossRule, empty_sums, grouped_loss, read_sums
from megatron_dypo.kernels.grouped_loss import COEFFICIENTS, SUMS
from tests import reference_objective as page

COUNTS = [1, 17, 0, 7, 30, 1, 6]  # tokens of the sequences; one is empty, every third is a teacher trace
RULES = [
    LossRule(0.15, 0.28, kl_coef, ratio_level, ratio_base, correction, cap=1.4)
    for ratio_level, ratio_base, kl_coef, correction in itertools.product(
        ["token", "sequence"], ["old", "reference"], [0.0, 0.3], ["none", "truncate", "mask"]
    )
]
SHAPES = [LossRule(shape="luffy", shape_gamma=0.3), LossRule(kl_coef=0.3, correction="mask", shape="p", entropy=True)]
BANDS = [LossRule(correction=kind, cap=1.4, floor=0.9) for kind in ("mask", "icepop")]
BANDS += [LossRule(kl_coef=0.3, correction="icepop", cap=1.4)]
RULES += SHAPES + BANDS
IN_BOTH_DTYPES = [*((torch.float32, rule) for rule in RULES), *((torch.float64, rule) for rule in RULES[::5])]
NAMES = [
    "-".join(map(str, (rule.ratio_level, rule.ratio_base, rule.kl_coef, rule.correction, rule.floor, rule.shape)))
    for rule in RULES
]
STREAMS = ("logp", "old", "rollout", "reference", "entropy")
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

    @property
    def cu_seqlens(self) -> Tensor:
        return torch.tensor([0, *itertools.accumulate(self.counts)], device=self.logp.device)

    def to(self, device: str) -> Pack:
        return replace(self, **{name: getattr(self, name).to(device) for name in (*STREAMS, "coefficients")})

    def part(self, t: slice) -> dict[str, Tensor | None]:
        return {name: None if (x := getattr(self, name)) is None else x[t] for name in STREAMS}


def make_pack(counts: list[int] = COUNTS, dtype=torch.float64, drift: float = 0.3, seed: int = 0) -> Pack:
    """Numbers that float32 holds; drift 0: all policies are one, as on a first step."""
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
    """Summands and slopes [t] and the sums [S], from one call a range between the ``edges``."""
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
    """The same as the objective's page states it, slopes by torch's autograd, all in float64."""
    logp_t, old_t, engine_t, reference_t, entropy_t = (getattr(pack, name).double() for name in STREAMS)
    logp_t.requires_grad_()
    counts_S = torch.tensor(pack.counts)
    A_t, w_t, c_t, g_t, v_t, u_t, e_t = pack.coefficients.double().repeat_interleave(counts_S, 1)
    trust_t = page.trust(old_t - engine_t, rule.correction, rule.cap, rule.floor)
    log_ratio_t = logp_t - (old_t if rule.ratio_base == "old" else reference_t)
    surrogate_t = page.surrogate(log_ratio_t, A_t, rule.clip_low, rule.clip_high) * (rule.ratio_level == "token")
    gap_t = reference_t - logp_t
    kl_t = w_t * trust_t * (gap_t.exp() - gap_t - 1)
    grpo_t = -w_t * trust_t * surrogate_t + rule.kl_coef * kl_t
    ratio_t = log_ratio_t.exp()
    clipped_t = (A_t > 0) & (ratio_t > 1 + rule.clip_high) | (A_t < 0) & (ratio_t < 1 - rule.clip_low)
    p_t = logp_t.exp()
    f_t = {"none": 0 * p_t, "p": p_t, "luffy": p_t / (p_t + rule.shape_gamma)}[rule.shape]
    entropy_t.requires_grad_()
    own_t = -e_t * entropy_t * rule.entropy + grpo_t + (c_t + g_t - v_t) * logp_t - u_t * f_t
    (df_t,) = torch.autograd.grad(f_t.sum(), logp_t, retain_graph=True)
    (grpo_slope_t,) = torch.autograd.grad((grpo_t + c_t * logp_t).sum(), logp_t, retain_graph=True)
    (dlogp_t,) = torch.autograd.grad(own_t.sum(), logp_t, retain_graph=True)
    sums_t = (grpo_t, kl_t, grpo_slope_t.abs(), clipped_t * (rule.ratio_level == "token"), logp_t, entropy_t, f_t, df_t)

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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_cut_at_any_place_gives_the_same_bits(dtype: torch.dtype) -> None:
    for rule in RULES[::5]:
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


def close_policies() -> tuple[Pack, Tensor]:
    """A pack whose policies differ by 1e-5, and the KL's sums [S] from the first terms of exp(x) - x - 1."""
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
    "table_shape": ({"coefficients": torch.zeros(2, 7)}, r"coefficients: expected \[7, 2\] .* got \[2, 7\]"),
    "table_dtype": ({"coefficients": torch.zeros(7, 2).double()}, "coefficients: expected .* got .*float64"),
    "sums_shape": ({"sums": empty_sums(3)}, r"sums: expected empty_sums\(2\)"),
    "sums_dtype": ({"sums": empty_sums(2).float()}, "sums: expected .* got .*float32"),
    "no_entropy": ({"rule": LossRule(entropy=True), "entropy": None}, "entropy: needed for its bonus"),
    "no_rollout": ({"rule": LossRule(correction="mask"), "rollout": None}, "rollout: needed for correction 'mask'"),
    "no_reference": ({"rule": LossRule(ratio_base="reference"), "reference": None}, "reference: needed for ratio_base"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input_is_refused_by_name(bad: str) -> None:
    changes, message = BAD[bad]
    arguments = {name: torch.zeros(4) for name in STREAMS} | {
        "cu_seqlens": torch.tensor([0, 1, 4]),
        "coefficients": torch.zeros(7, 2),
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
    """To rounding: torch's exponentials are its own, and lanes are another order of summation."""
    for dtype, rule in IN_BOTH_DTYPES:
        pack = make_pack(dtype=dtype)
        assert_near(run(pack, rule, backend="triton", lanes=16), run(pack, rule), 4 * torch.finfo(dtype).eps)
    pack, rule = make_pack([1, 5, 0, 3]), LossRule(kl_coef=0.1)
    fewer = [replace(pack, entropy=None), replace(pack, old=None, rollout=None, reference=None)]
    for part in fewer + [make_pack(counts) for counts in ([], [0, 0], [1], [1, 1, 1])]:
        assert_near(run(part, rule, backend="triton", lanes=4), run(part, rule), 1e-15)
    pack, kl_S = close_policies()
    assert_near(run(pack, rule, backend="triton", lanes=16), {"kl": kl_S}, 1e-9)


def first_step_in_triton() -> None:
    """To the last bit: all ratios are 1, no exponential is rounded, and one lane adds in torch's order."""
    for dtype, rule in IN_BOTH_DTYPES:
        if rule.shape != "none":
            continue  # which is of an exponential
        pack = make_pack([1, 5, 0, 3], dtype, drift=0.0)
        assert_same_bits(run(pack, rule, backend="triton"), run(pack, rule))


def cuts_in_triton() -> None:
    """A cut at any place gives the same bits."""
    pack, rule = make_pack([1, 6, 0, 2], torch.float32), LossRule(kl_coef=0.3, correction="truncate")
    tokens = len(pack.logp)
    whole = run(pack, rule, backend="triton", lanes=4)
    for edges in [[0, cut, tokens] for cut in range(tokens + 1)] + [list(range(tokens + 1))]:
        assert_same_bits(run(pack, rule, edges, backend="triton", lanes=4), whole)


def not_finite_in_triton(device: str = "cpu") -> None:
    """Log-probs and coefficients that are NaN or infinite, and policies so far apart that a ratio would overflow."""
    for value, name in itertools.product((math.nan, math.inf, 300.0, -300.0), (*STREAMS[:4], "coefficients")):
        for rule in (
            LossRule(kl_coef=0.3, correction="truncate", shape="luffy"),
            LossRule(correction="mask", ratio_base="reference"),
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

    types = dict.fromkeys((*STREAMS, "coefficients", "summands", "dlogp_out", "dentropy_out"), "*fp32")
    types |= {"cu_seqlens": "*i64", "sums": "*fp64", "first": "i32", "tokens": "i32", "sequences": "i32"}
    for rule, absent in (
        (LossRule(kl_coef=0.1, correction="truncate", entropy=True), ()),
        (LossRule(ratio_base="reference", correction="mask"), ("entropy", "dentropy_out")),
        (LossRule(), ("old", "rollout", "reference", "dentropy_out")),
        (LossRule(shape="luffy"), ("old", "rollout", "reference", "dentropy_out")),
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
        assert " STACK:0 " in usage and " LOCAL:0 " in usage, usage  # where ptxas puts what it spills


def test_torch_does_without_triton() -> None:
    in_child(without_triton)


def without_triton() -> None:
    sys.modules["triton"] = None  # its import fails
    pack = make_pack()
    assert_near(run(pack, RULES[0]), statement(pack, RULES[0]), 1e-13)
