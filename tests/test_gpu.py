"""On one CUDA device (`make test-gpu`): the same head, grouped loss and training step as on the CPU."""

from __future__ import annotations

import itertools
import re

import pytest
import torch

from megatron_dypo.kernels import linear_logprob, linear_loss, workspace
from tests import test_grouped_loss as grouped
from tests.batches import make_groups, trace_ids
from tests.ranks import run_ranks
from tests.test_determinism import updates
from tests.test_kernels import assert_sure_tokens

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


# --- the head: T tokens, H hidden size, V rows of the weight

HEAD_SHAPES = [(1, 64, 1024), (700, 256, 5000), (1037, 72, 40000)]  # several parts of a tile, blocks and widths cut off


def make_head(tokens: int, width: int, rows: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Return (hidden [T, H], weight [V, H], targets [T], temperature [T], slope [T]) on the device; some are sure."""
    draw = torch.Generator().manual_seed(0)
    hidden_TH = torch.randn(tokens, width, generator=draw).to(dtype)
    weight_VH = (3 / width**0.5 * torch.randn(rows, width, generator=draw)).to(dtype)
    targets_T = torch.randint(0, rows - 24, (tokens,), generator=draw)
    weight_VH[targets_T[::3]] += 2 / width**0.5 * hidden_TH[::3]
    dlogp_T = torch.randn(tokens, generator=draw) * (torch.rand(tokens, generator=draw) < 0.7)
    dlogp_T[0] = 1.0
    temperature_T = 0.5 + torch.rand(tokens, generator=draw)
    return tuple(x.cuda() for x in (hidden_TH, weight_VH, targets_T, temperature_T, dlogp_T))


def head_results(head: tuple[torch.Tensor, ...], backend: str, dtype: torch.dtype | None = None) -> dict:
    """Return log-probs and gradients of both functions; ``dtype`` other than the head's for the definition."""
    hidden_TH, weight_VH, targets_T, temperature_T, dlogp_T = (
        x.to(dtype) if dtype and x.is_floating_point() else x for x in head
    )
    options = {
        "temperature": temperature_T, "vocab_size": len(weight_VH) - 24, "entropy": True, "backend": backend
    }  # fmt: skip
    inputs = hidden_TH.requires_grad_(), weight_VH.requires_grad_()
    with torch.no_grad():
        old = linear_logprob(*inputs, targets_T, **options)
    result = linear_logprob(*inputs, targets_T, **options)
    total = (dlogp_T * (result.logp + 0.1 * result.entropy + 0.2 * result.lse)).sum()
    found = {f"old/{name}": value for name, value in old._asdict().items()}
    found |= dict(zip(("dhidden", "dweight"), torch.autograd.grad(total, inputs), strict=True))
    loss, now = linear_loss(*inputs, targets_T, lambda logp, entropy, t: (dlogp_T[t] * logp, dlogp_T[t]), **options)
    found |= {f"now/{name}": value for name, value in now._asdict().items()}
    gradients = zip(("loss/dhidden", "loss/dweight"), torch.autograd.grad(loss, inputs), strict=True)
    return {name: value.detach() for name, value in (found | dict(gradients)).items()}


@pytest.mark.parametrize("shape", HEAD_SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ["triton", "chunked"])
def test_head_equals_the_definition_in_float64(shape, dtype, backend):
    """Half precision gives values as good as fp32; gradients are rounded.

    Rounded are p or dz, rows of dweight's product, and the result; three roundings of bf16 are 2.9e-3 of the norm
    (emulated in fp32 at these shapes).
    """
    head = make_head(*shape, dtype)
    expected = head_results(head, "reference", torch.float64)
    for name, value in head_results(head, backend).items():
        error = (value.double() - expected[name]).abs()
        if "/" in name and not name.startswith("loss"):
            assert error.max() <= 2e-6 * (10 + expected["now/lse"].abs().max()), name
        else:
            assert error.norm() <= (1e-5 if dtype == torch.float32 else 4e-3) * expected[name].norm(), name
    assert not expected["dweight"][-24:].any()


@pytest.mark.parametrize("shape", HEAD_SHAPES[1:], ids=str)
def test_rows_whose_logits_leave_fp32_s_exponentials_are_as_good_as_their_neighbours(shape):
    """The fused kernel in bf16: at a temperature of 0.02 logits reach hundreds, in the same blocks as others."""
    hidden_TH, weight_VH, targets_T, temperature_T, dlogp_T = make_head(*shape, torch.bfloat16)
    far_T = torch.arange(len(targets_T), device="cuda") % 5 == 0
    temperature_T[far_T] = 0.02
    head = hidden_TH, weight_VH, targets_T, temperature_T, dlogp_T
    expected, found = head_results(head, "reference", torch.float64), head_results(head, "triton")
    for rows_T in (far_T, ~far_T):
        for name in ("now/logp", "now/entropy", "now/lse"):
            error = (found[name].double() - expected[name])[rows_T].abs().max()
            assert error <= 2e-6 * (10 + expected["now/lse"][rows_T].abs().max()), name
        for name in ("dhidden", "loss/dhidden"):
            error = (found[name].double() - expected[name])[rows_T].norm()
            assert error <= 4e-3 * expected[name][rows_T].norm(), name


@pytest.mark.parametrize("shift", [0.0, 100.0])
@pytest.mark.parametrize("backend", ["triton", "chunked"])
def test_a_nearly_sure_token_keeps_the_digits_of_1_minus_p(backend, shift):
    assert_sure_tokens(backend, shift, 2e-5 if shift == 0 else 1e-3, device="cuda")


@pytest.mark.parametrize("shape", HEAD_SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_head_repeats_bit_for_bit(shape, dtype):
    """Compare runs, and the old pass, which keeps nothing, with the training pass."""
    head = make_head(*shape, dtype)
    once, again = head_results(head, "auto"), head_results(head, "triton")
    for name, value in once.items():
        assert torch.equal(value, again[name]), name
        if name.startswith("old/"):
            assert torch.equal(value, once[name.replace("old", "now")]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_head_tile_has_the_same_bits_on_any_rank_and_at_any_place(dtype):
    """Each shard's statistics equal those of the same tiles on one rank; a row of the fused product may move, too."""
    from megatron_dypo.kernels.triton_head import HEADS
    from megatron_dypo.kernels.vocab import VocabShard

    hidden_TH, weight_VH, targets_T, temperature_T, _ = make_head(300, 256, 40960, dtype)
    forms, _ = HEADS[dtype]

    def statistics(rank: int, ranks: int, order_T: torch.Tensor) -> torch.Tensor:
        rows = len(weight_VH) // ranks
        shard = VocabShard(rows, rank * rows, len(weight_VH) - 24, None, ranks)
        own = weight_VH[rank * rows : (rank + 1) * rows].clone()
        head = forms(hidden_TH[order_T], own, targets_T[order_T], temperature_T[order_T], shard)
        return head.statistics(slice(0, len(order_T)))

    in_place_T = torch.arange(len(targets_T), device="cuda")
    whole_K4t = statistics(0, 1, in_place_T)
    for ranks in (2, 4, 8):
        assert torch.equal(torch.cat([statistics(rank, ranks, in_place_T) for rank in range(ranks)]), whole_K4t)
    if dtype == torch.bfloat16:
        order_T = torch.randperm(len(targets_T), device="cuda")
        assert torch.equal(statistics(0, 1, order_T), whole_K4t[..., order_T])


def test_head_allocates_no_tokens_times_vocabulary():
    tokens, width, rows = 32768, 256, 65536
    hidden_TH = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight_VH = torch.nn.Parameter(torch.randn(rows, width, device="cuda", dtype=torch.bfloat16))
    weight_VH.main_grad = torch.zeros_like(weight_VH, dtype=torch.float32)
    targets_T = torch.randint(0, rows, (tokens,), device="cuda")

    def peak(function) -> int:
        """Return the peak bytes above what was allocated before."""
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before

    def training_pass() -> None:
        loss, _ = linear_loss(hidden_TH, weight_VH, targets_T, lambda logp, entropy, t: (-logp, -torch.ones_like(logp)))
        loss.backward()

    def old_pass() -> None:
        with torch.no_grad():
            linear_logprob(hidden_TH, weight_VH, targets_T)

    assert peak(old_pass) < 128 << 20
    expected, few_a_token = workspace.head_bytes(tokens, width, rows), 512 * tokens
    assert 0.9 * expected <= peak(training_pass) <= expected + few_a_token < tokens * rows * hidden_TH.element_size()


# --- the loss and the step


def test_grouped_loss_on_cuda_equals_cpu_and_a_cut_at_any_place_gives_the_same_bits():
    for dtype, rule in itertools.product((torch.float32, torch.float64), grouped.RULES):
        pack = grouped.make_pack(dtype=dtype)
        whole = grouped.run(pack.to("cuda"), rule)
        on_host = {name: value.cpu() for name, value in whole.items()}
        grouped.assert_near(on_host, grouped.run(pack, rule), 4 * torch.finfo(dtype).eps)
        tokens = len(pack.logp)
        for edges in ([0, tokens], [0, 5, 30, tokens], list(range(tokens + 1))):
            grouped.assert_same_bits(grouped.run(pack.to("cuda"), rule, edges), whole)
    grouped.not_finite_in_triton("cuda")


def test_training_step_on_cuda_is_finite_and_repeatable():
    """Megatron-Core with NCCL and one rank, our layer spec, bf16: two policies from one seed take the same step."""
    from megatron_dypo.models.shape import model_shape
    from megatron_dypo.models.sharding import random_weights
    from megatron_dypo.policy.policy import Policy
    from megatron_dypo.runtime import distributed
    from megatron_dypo.training.step import StepContext, update_policy
    from tests.batches import make_config

    config = make_config()
    layout = distributed.init()
    shape = model_shape(config.model)
    seen = []
    for _ in range(2):
        policy = Policy(config, shape, layout, random_weights(shape, seed=1))
        outcome = update_policy(policy, make_groups(), config, trace_ids, StepContext(1, 1e-3))
        assert outcome.skipped is None and policy.version == 1
        seen.append(outcome.metrics["loss/total"])
    assert seen[0] == pytest.approx(seen[1], rel=1e-6)


def test_in_deterministic_mode_two_runs_are_equal_bit_for_bit():
    """Run in separate processes, since cuBLAS and NCCL read their variables at startup."""
    first, second = (run_ranks(1, updates, {}, True) for _ in range(2))
    assert first == second


def waits_on_cuda(shape: str) -> list[int]:
    """Return a pass's synchronising operations, as torch counts them: with 2 layers, and with 4."""
    import warnings

    from megatron_dypo.models.shape import model_shape
    from megatron_dypo.models.sharding import random_weights
    from megatron_dypo.policy.policy import Policy
    from megatron_dypo.runtime import distributed
    from megatron_dypo.training.minibatch import build_minibatches
    from tests.batches import make_config

    layout, waits = distributed.init(), []
    for layers in (2, 4):
        config = make_config(shape)
        config.model.shape = config.model.shape.model_copy(update={"num_layers": layers})
        model = model_shape(config.model)
        policy = Policy(config, model, layout, random_weights(model, seed=1))
        (work,) = build_minibatches(layout, make_groups(), config, trace_ids)
        policy.logprobs(work.rollouts)  # what runs once
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            policy.logprobs(work.rollouts)
            torch.cuda.set_sync_debug_mode("default")
        waits.append(sum("synchroniz" in str(warning.message) for warning in seen))
    return waits


@pytest.mark.parametrize("shape", ["llama", "qwen3"])
def test_no_layer_waits_for_the_device(shape):
    """The counterpart of tests/test_waits.py on the CPU."""
    ((few, many),) = run_ranks(1, waits_on_cuda, shape, seconds=300)
    assert few == many


# --- attention and what is fused


def test_fp32_attention_with_grouped_queries_writes_no_scores():
    from megatron_dypo.policy.attention import Segments, sdpa

    tokens, heads, groups, width = 8192, 16, 2, 64
    query, key, value = (
        torch.randn(tokens, count, width, device="cuda", requires_grad=True) for count in (heads, groups, groups)
    )
    segments = Segments([0, tokens], torch.device("cuda"))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    sdpa(query, key, value, segments, width**-0.5).sum().backward()
    scores = 4 * heads * tokens * tokens
    assert torch.cuda.max_memory_allocated() - before < scores / 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_weights_gradient_is_added_in_fp32_on_cuda(dtype):
    from megatron_dypo.policy.weight_gradients import wgrad_gemm_accum_fp32

    given, slope = (torch.randn(700, width, device="cuda").to(dtype) for width in (256, 512))
    before = torch.randn(512, 256, device="cuda")
    after = before.clone()
    wgrad_gemm_accum_fp32(given, slope, after)
    expected = before.double() + slope.double().T @ given.double()
    assert (after - expected).norm() < 1e-5 * expected.norm()


def test_compiled_rope_is_rope_and_the_same_in_both_passes():
    from megatron_dypo.policy.attention import angles, rotation

    turned = {}
    for tokens in (96, 160, 1000):
        heads = torch.randn(tokens, 12, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        table = angles(1e4 ** -torch.linspace(0, 1, 64, device="cuda"), torch.arange(tokens).cuda(), torch.bfloat16)
        for compiled in (False, True):
            out = rotation(compiled)(heads, *table)
            (gradient,) = torch.autograd.grad(out.float().square().sum(), heads)
            with torch.no_grad():
                assert torch.equal(rotation(compiled)(heads, *table), out)
            turned[compiled] = out.float(), gradient.float()
        for ours, theirs in zip(turned[True], turned[False], strict=True):
            assert (ours - theirs).norm() < 0.01 * theirs.norm()


# --- the reference and the optimizer


def swaps_and_a_step(on: str) -> dict:
    """Return whether swaps are exact, the pinned memory after each, and an update's peak."""
    from megatron_dypo.models.shape import model_shape
    from megatron_dypo.models.sharding import random_weights
    from megatron_dypo.policy import reference
    from megatron_dypo.policy.policy import Policy
    from megatron_dypo.runtime import distributed
    from tests.batches import make_config

    reference.STAGE = 1 << 12  # so both staging buffers are reused many times
    config = make_config(model={"reference_on": on})
    shape = model_shape(config.model)
    policy = Policy(config, shape, distributed.init(), random_weights(shape, seed=1))
    frozen = {name: parameter.detach().clone() for name, parameter in policy.parameters.items()}
    with torch.no_grad():
        for parameter in policy.parameters.values():
            parameter.add_(0.5)
    current = {name: parameter.detach().clone() for name, parameter in policy.parameters.items()}
    holds = lambda weights: all(torch.equal(policy.parameters[name], weights[name]) for name in weights)  # noqa: E731
    found: dict = {"exact": [], "pinned": []}
    for _ in range(3):
        with policy.reference_weights():
            within = holds(frozen)
        found["exact"].append(within and holds(current))
        statistics = torch.cuda.host_memory_stats().items()
        found["pinned"].append({key: count for key, count in statistics if re.fullmatch(r"allocat.*\.current", key)})
    for _ in range(2):  # the first update creates the moments
        policy.zero_gradients()
        policy.grad_norm()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        policy.step(1e-3)
    found["peak"] = (torch.cuda.max_memory_allocated() - before) / sum(p.numel() for p in policy.parameters.values())
    return found


@pytest.mark.parametrize("on", ["device", "host"])
def test_reference_swaps_are_exact_without_more_pinned_memory_and_an_update_copies_no_moment(on):
    (found,) = run_ranks(1, swaps_and_a_step, on, seconds=300)
    assert found["exact"] == [True] * 3
    assert found["pinned"][0] and found["pinned"][0] == found["pinned"][2]
    assert found["peak"] < 2, "bytes a parameter; a copy of one moment would be 4"
