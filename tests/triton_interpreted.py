"""The Triton kernels of the head in Triton's interpreter, on the CPU in fp32: `test_triton_head.py` runs this file.

TRITON_INTERPRET=1 must be set before triton is imported, hence a separate process. Blocks are small, so that a small
problem has several of each kind. Legend: T tokens, H hidden size, V rows of the weight.
"""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_dypo.kernels import (
    autograd,
    linear_logprob,
    linear_loss,
    triton_fused,
    triton_head,
    triton_rows,
    workspace,
)
from megatron_dypo.kernels.vocab import VocabShard
from tests import test_entropy_gradient as entropy_gradient
from tests.test_kernels import (
    VALUE,
    assert_near,
    assert_same_head,
    assert_same_in_halves,
    assert_sure_tokens,
    directions,
    make_head,
    negative_log_likelihood,
    plain,
    weighted_square,
)

FUSED = {"BLOCK_H": 32, "GROUP": 2}
SIZES = {"BLOCK_T": 16, "BLOCK_V": 8, "PART": 8, "KEPT_CHUNK": 32, "FUSED_CHUNK": 32, "CHUNK": 32, "PITCH": 16}
ROWS = {"STATISTICS_BLOCK": 32, "GRADIENT_BLOCK": 32}


@pytest.fixture(params=["rows", "fused"], autouse=True)
def small_blocks(request, monkeypatch) -> str:
    for module, constants in ((triton_fused, FUSED), (triton_rows, ROWS), (workspace, SIZES)):
        for name, value in constants.items():
            monkeypatch.setattr(module, name, value)
    forms = triton_rows.RowHead if request.param == "rows" else triton_fused.FusedHead
    monkeypatch.setitem(triton_head.HEADS, torch.float32, (forms, triton_rows.RowHead))
    return request.param


def run_loss(head: tuple, weights_T: Tensor, **options) -> tuple[Tensor, ...]:
    """Return (logp, entropy, lse, dhidden, dweight) of ``weighted_square``."""
    hidden_TH, weight_VH, targets_T, temperature_T = head
    inputs = hidden_TH.clone().requires_grad_(), weight_VH.clone().requires_grad_()
    loss, logprobs = linear_loss(
        *inputs,
        targets_T,
        weighted_square(weights_T),
        temperature=temperature_T,
        entropy=True,
        backend="triton",
        **options,
    )
    return *logprobs, *torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize(
    ("tokens", "rows", "vocab_size"),
    [(0, 24, None), (1, 24, None), (35, 70, 55), (9, 5, None)],
    ids=["no_token", "one_token", "padded", "tiles_without_columns"],
)
def test_log_probs_and_gradients_equal_the_definition(tokens, rows, vocab_size):
    """Per-token temperatures; gradients through logp, entropy and lse at once."""
    hidden_TH, weight_VH, targets_T, temperature_T = make_head(tokens, rows)
    if vocab_size is not None:
        targets_T, weight_VH[vocab_size:] = targets_T % vocab_size, 1e30
    assert_same_head((hidden_TH, weight_VH, targets_T, temperature_T), "triton", vocab_size=vocab_size)


@pytest.mark.parametrize(
    ("tokens", "rows", "vocab_size"),
    [(0, 24, None), (1, 24, None), (35, 70, 61), (9, 5, None)],
    ids=["no_token", "one_token", "padded", "tiles_without_columns"],
)
def test_a_local_loss_equals_the_definition(tokens, rows, vocab_size):
    """A third of the tokens has no slope, and the chunks of the loss are shorter than the batch."""
    hidden_TH, weight_VH, targets_T, temperature_T = make_head(tokens, rows)
    targets_T = targets_T % (vocab_size or rows)
    weights_T = torch.where(torch.arange(tokens) % 3 == 0, 0.0, directions(tokens)[0])
    *found, dhidden_TH, dweight_VH = run_loss(
        (hidden_TH, weight_VH, targets_T, temperature_T), weights_T, vocab_size=vocab_size
    )
    inputs = hidden_TH.clone().requires_grad_(), weight_VH.clone().requires_grad_()
    *expected, largest = plain(*inputs, targets_T, temperature_T, vocab_size)
    for value, correct in zip(found, expected, strict=True):
        assert torch.all((value - correct).abs() <= VALUE * largest)
    total = (weights_T.double() * expected[0].square() / 2).sum()
    for ours, correct in zip((dhidden_TH, dweight_VH), torch.autograd.grad(total, inputs), strict=True):
        assert_near(ours, correct, 5e-6)
    assert not dhidden_TH[weights_T == 0].any() and not dweight_VH[vocab_size or rows :].any()


@pytest.mark.parametrize(
    ("tokens", "rows", "vocab_size", "with_logp"),
    [(0, 24, None, True), (1, 24, None, True), (35, 70, 61, True), (20, 128, 61, False), (9, 5, None, False)],
    ids=["no_token", "one_token", "padded", "entropy_alone", "tiles_without_columns"],
)
def test_the_entropy_s_gradient_equals_the_definition(tokens, rows, vocab_size, with_logp):
    hidden_TH, weight_VH, targets_T, temperature_T = make_head(tokens, rows)
    head, weights_2T = (
        (hidden_TH, weight_VH, targets_T % (vocab_size or rows), temperature_T),
        entropy_gradient.weights(tokens, with_logp),
    )
    ours = entropy_gradient.found(head, weights_2T.float(), backend="triton", vocab_size=vocab_size)
    entropy_gradient.assert_equal(ours, entropy_gradient.expected(head, weights_2T, vocab_size), 5e-6)
    assert not ours["dhidden"][(weights_2T == 0).all(0)].any() and not ours["dweight"][vocab_size or rows :].any()


@pytest.mark.parametrize("width", [40, 27])
def test_a_width_that_blocks_do_not_divide(width):
    """The fused product cannot take the second one."""
    torch.manual_seed(0)
    head = torch.randn(9, width), torch.randn(64, width), torch.randint(0, 64, (9,)), torch.ones(9)
    assert_same_head(head, "triton")


@pytest.mark.parametrize("scale", [0.01, 60.0])
def test_flat_and_confident_distributions(scale, small_blocks):
    """At the large scale half of the targets have p ~ 1, where 1 - p must keep its digits."""
    hidden_TH, weight_VH, targets_T, temperature_T = make_head(10, 40, scale=scale)
    top_T = (hidden_TH @ weight_VH.t()).argmax(1)
    targets_T = torch.where(torch.arange(10) % 2 == 0, top_T, targets_T)
    head = hidden_TH, weight_VH, targets_T, temperature_T
    # the fused forward and the backward's product round logits of some hundreds differently
    assert_same_head(head, "triton", tolerance=5e-5 if small_blocks == "fused" else 1e-5)
    dhidden_TH = run_loss(head, torch.ones(10))[3]
    inputs = hidden_TH.clone().requires_grad_(), weight_VH
    logp_T = plain(*inputs, targets_T, temperature_T)[0]
    (correct_TH,) = torch.autograd.grad((logp_T.square() / 2).sum(), inputs[0])
    assert_near(dhidden_TH, correct_TH, 1e-5)


@pytest.mark.parametrize("shift", [0.0, 100.0])
def test_a_nearly_sure_token_keeps_the_digits_of_1_minus_p(shift):
    """In the second case all rows of the fused kernel are far."""
    assert_sure_tokens("triton", shift, 2e-5 if shift == 0 else 1e-3, rows=24)


def test_rows_far_from_0_beside_others(small_blocks):
    """Put them in one block of tokens, in one tile or in all; some have no slope, so that others take their places."""
    tokens, rows = 40, 64
    hidden_TH, weight_VH, targets_T, temperature_T = make_head(tokens, rows, scale=3.0)
    place_T = torch.arange(tokens)
    weight_VH[:, 0], weight_VH[:, 1] = 1.0, (torch.arange(rows) < rows / 8).float()
    hidden_TH[:, 0] = torch.tensor([0.0, -300.0, 0.0, 0.0, 58.0, -61.0, 0.0])[place_T % 7] * temperature_T
    hidden_TH[:, 1] = torch.tensor([0.0, 0.0, 90.0])[place_T % 3] * temperature_T
    head = hidden_TH, weight_VH, targets_T, temperature_T
    weights_T = torch.where(place_T % 3 == 1, 0.0, directions(tokens)[0])
    *found, dhidden_TH, dweight_VH = run_loss(head, weights_T)
    inputs = hidden_TH.clone().requires_grad_(), weight_VH.clone().requires_grad_()
    *expected, largest = plain(*inputs, targets_T, temperature_T)
    for value, correct in zip(found, expected, strict=True):
        assert torch.all((value - correct).abs() <= VALUE * largest)
    total = (weights_T.double() * expected[0].square() / 2).sum()
    for ours, correct in zip((dhidden_TH, dweight_VH), torch.autograd.grad(total, inputs), strict=True):
        assert_near(ours, correct, 5e-5)
    weights_2T = torch.stack([weights_T, directions(tokens, seed=3)[1]])
    ours = entropy_gradient.found(head, weights_2T, backend="triton")
    entropy_gradient.assert_equal(ours, entropy_gradient.expected(head, weights_2T.double()), 5e-5)


@pytest.mark.parametrize(
    ("dtype", "temperature", "active"),
    [(torch.bfloat16, 1.0, 0.0), (torch.float16, 0.7, 1.0), (torch.bfloat16, "each", 0.42)],
    ids=str,
)
def test_half_precision_as_cuda_multiplies_it(monkeypatch, small_blocks, dtype, temperature, active):
    """Test row kernels only: the interpreter's products of halves are wrong, so the fused one has no reference."""
    if small_blocks == "fused":
        pytest.skip("tl.dot of halves is wrong in the interpreter")
    monkeypatch.setattr(autograd, "multiplies_halves", lambda hidden: hidden.dtype in autograd.HALVES)
    monkeypatch.setitem(triton_head.HEADS, torch.bfloat16, (triton_rows.RowHead, triton_rows.RowHead))
    assert_same_in_halves(dtype, temperature, active, True, "triton")


def test_every_way_gives_the_same_bits(small_blocks):
    """The old pass, the training pass and each run; in the fused kernel also a row at another place in the pack."""
    *products, targets_T, temperature_T = make_head(18, 32)
    # sixteenths multiply exactly: the interpreter's own products may round another row of a block differently
    hidden_TH, weight_VH = ((16 * x).round() / 16 for x in products)
    head = hidden_TH, weight_VH, targets_T, temperature_T
    with torch.no_grad():
        old = linear_logprob(hidden_TH, weight_VH, targets_T, temperature=temperature_T, entropy=True, backend="triton")
        loss, evaluated = linear_loss(
            hidden_TH, weight_VH, targets_T, negative_log_likelihood, temperature=temperature_T, backend="triton"
        )
    weights_T = directions(18)[0]
    once, again = run_loss(head, weights_T), run_loss(head, weights_T)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(old, once[:3], strict=True))
    assert torch.equal(evaluated.logp, old.logp) and not loss.requires_grad
    if small_blocks == "fused":
        order_T = torch.randperm(18, generator=torch.Generator().manual_seed(0))
        moved = run_loss(
            (hidden_TH[order_T], weight_VH, targets_T[order_T], temperature_T[order_T]), weights_T[order_T]
        )
        assert all(torch.equal(a[order_T], b) for a, b in zip(once[:3], moved[:3], strict=True))


@pytest.mark.parametrize("ranks", [2, 8])
def test_a_tile_has_the_same_bits_on_any_rank(ranks, small_blocks):
    """The statistics of each rank's shard equal those of one rank's same tiles, including padding of whole tiles."""
    hidden_TH, weight_VH, targets_T, temperature_T = make_head(7, 160)
    targets_T = targets_T % 115
    forms, _ = triton_head.HEADS[torch.float32]
    whole = forms(hidden_TH, weight_VH, targets_T, temperature_T, VocabShard(160, 0, 115, None, 1))
    expected_K4t = whole.statistics(slice(0, 7))
    rows = 160 // ranks
    parts = []
    for rank in range(ranks):
        shard = VocabShard(rows, rank * rows, 115, None, ranks)
        weight = weight_VH[rank * rows : (rank + 1) * rows].clone()
        parts.append(forms(hidden_TH, weight, targets_T, temperature_T, shard).statistics(slice(0, 7)))
    assert torch.equal(torch.cat(parts), expected_K4t)


def test_inputs_may_have_any_strides():
    """Every other target, hidden states by columns, and a slope expanded from one number."""
    hidden_TH, weight_VH, targets_T, _ = make_head(6, 24)
    every_other_T = targets_T.repeat_interleave(3).add(torch.arange(18) % 3)[::3]
    by_columns_TH = hidden_TH.t().contiguous().t()
    results = []
    for inputs in (
        (hidden_TH, weight_VH, targets_T),
        (hidden_TH, weight_VH, every_other_T),
        (by_columns_TH, weight_VH, every_other_T),
    ):
        leaf_TH = inputs[0].detach().requires_grad_()
        loss, _ = linear_loss(
            leaf_TH,
            *inputs[1:],
            lambda logp, entropy, t: (-logp, torch.tensor(-1.0).expand(len(logp))),
            backend="triton",
        )
        results.append(torch.autograd.grad(loss, leaf_TH)[0])
    correct_TH = torch.autograd.grad(-plain(leaf_TH, weight_VH, targets_T, torch.ones(6))[0].sum(), leaf_TH)[0]
    for found_TH in results:
        assert_near(found_TH, correct_TH, 1e-5)


class Allocated(TorchDispatchMode):
    """The peak bytes of the storages of operations' results."""

    def __init__(self):
        super().__init__()
        self.live, self.most = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if (place := storage.data_ptr()) and place not in self.live:
                    self.live[place] = storage.nbytes()
                    weakref.finalize(storage, self.live.pop, place)
        self.most = max(self.most, sum(self.live.values()))
        return result


def test_head_bytes_is_what_a_training_pass_allocates(monkeypatch, small_blocks):
    """In two chunks, of which the first is full; some tokens have no slope."""
    tokens, rows, width = 34, 128, 128
    torch.manual_seed(0)
    hidden_TH, targets_T = torch.randn(tokens, width, requires_grad=True), torch.randint(0, rows, (tokens,))
    weight = torch.nn.Parameter(torch.randn(rows, width) / width**0.5)
    weight.main_grad = torch.zeros_like(weight)
    inputs = sum(x.nbytes for x in (hidden_TH, targets_T, weight, weight.main_grad))

    def some_without_slope(logp_t, entropy_t, t):
        dlogp_t = (torch.arange(len(logp_t)) % 8 != 3).float()
        return dlogp_t * logp_t, dlogp_t

    with Allocated() as allocated:
        linear_loss(hidden_TH, weight, targets_T, some_without_slope, backend="triton")[0].backward()
    expected = workspace.head_bytes(tokens, width, rows, torch.float32, fused=small_blocks == "fused")
    few_a_token = 64 * 4 * tokens  # statistics of 8 tiles, which are far, results, upstream and places
    found = allocated.most - inputs
    assert 0.8 * expected <= found <= expected + few_a_token, (expected, found)


def test_main_grad_is_added_to():
    hidden_TH, weight_VH, targets_T, temperature_T = make_head(6, 24)
    expected_VH = run_loss((hidden_TH, weight_VH, targets_T, temperature_T), torch.ones(6))[4]
    weight = torch.nn.Parameter(weight_VH.clone())
    weight.main_grad = torch.ones_like(weight)
    loss, _ = linear_loss(
        hidden_TH, weight, targets_T, weighted_square(torch.ones(6)), temperature=temperature_T, backend="triton"
    )
    loss.backward()
    assert weight.grad is None
    assert_near(weight.main_grad - 1, expected_VH, 1e-5)
