"""The output head: both backends against float64 softmax and autograd, and its bit-for-bit guarantees per call.

Tensor parallelism is tested with several ranks elsewhere. Legend: T tokens, H hidden size, V rows of the weight.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from megatron_dypo.kernels import autograd, linear_logprob, linear_loss, workspace
from megatron_dypo.kernels.chunked import CHUNK

BACKENDS = ["reference", "chunked"]
VALUE, GRADIENT = 3e-6, 2e-6  # fp32: of the largest logit, of the gradient's norm
H = 32


def make_head(tokens: int, rows: int = 96, scale: float = 1.0, dtype=torch.float32, seed: int = 0) -> tuple:
    """Return (hidden [T, H], weight [V, H], targets [T], temperature [T]); the logits' spread is about ``scale``."""
    generator = torch.Generator().manual_seed(seed)
    hidden_TH = torch.randn(tokens, H, generator=generator).to(dtype)
    weight_VH = (scale / H**0.5 * torch.randn(rows, H, generator=generator)).to(dtype)
    targets_T = torch.randint(0, rows, (tokens,), generator=generator)
    return hidden_TH, weight_VH, targets_T, 0.5 + torch.rand(tokens, generator=generator)


def plain(
    hidden_TH: Tensor, weight_VH: Tensor, targets_T: Tensor, temperature_T: Tensor, vocab_size: int | None = None
):
    """Return (logp [T], entropy [T], lse [T]) by definition, and the largest |logit|; float64."""
    z_TV = (hidden_TH.double() @ weight_VH[:vocab_size].double().t()) / temperature_T.double().unsqueeze(-1)
    log_p_TV = z_TV.log_softmax(1)
    logp_T = log_p_TV.gather(1, targets_T.unsqueeze(1)).squeeze(1)
    largest = torch.cat([z_TV.detach().abs().flatten(), torch.ones(1)]).max().item()
    return logp_T, -(log_p_TV.exp() * log_p_TV).sum(1), z_TV.logsumexp(1), largest


def directions(tokens: int, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Return upstream gradients of logp, entropy and lse; some tokens have none."""
    generator = torch.Generator().manual_seed(seed)
    grad_3T = torch.randn(3, tokens, generator=generator)
    return (grad_3T * (torch.rand(3, tokens, generator=generator) < 0.8)).unbind()


def gradients(outputs, grads, *inputs: Tensor) -> list[Tensor]:
    total = sum((x * g).sum() for x, g in zip(outputs, grads, strict=True))
    return [x.double() for x in torch.autograd.grad(total, inputs)]


def assert_near(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape
    assert (actual.double() - expected.double()).norm() <= tolerance * expected.double().norm()


def assert_same_head(head: tuple, backend: str, tolerance: float = GRADIENT, vocab_size: int | None = None) -> None:
    """Check values and gradients (through logp, entropy and lse at once) against the definition."""
    hidden_TH, weight_VH, targets_T, temperature_T = head
    inputs = hidden_TH.clone().requires_grad_(), weight_VH.clone().requires_grad_()
    grads = directions(len(targets_T))
    options = {"temperature": temperature_T, "vocab_size": vocab_size, "entropy": True, "backend": backend}
    result = linear_logprob(*inputs, targets_T, **options)
    *expected, largest = plain(*inputs, targets_T, temperature_T, vocab_size)
    exact = backend == "reference" and hidden_TH.dtype == torch.float64
    for value, correct in zip(result, expected, strict=True):
        assert value.shape == targets_T.shape and value.dtype == (torch.float64 if exact else torch.float32)
        assert torch.all((value.double() - correct).abs() <= (1e-13 if exact else VALUE) * largest)
    for ours, correct in zip(gradients(result, grads, *inputs), gradients(expected, grads, *inputs), strict=True):
        assert_near(ours, correct, 1e-12 if exact else tolerance)


# --- log-probs


@pytest.mark.parametrize("tokens", [0, 1, 7, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 100])
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_and_gradients_equal_the_definition_for_any_number_of_tokens(backend: str, tokens: int) -> None:
    assert_same_head(make_head(tokens), backend)


@pytest.mark.parametrize("rows", [1, 5, 96, 1000])
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_vocabulary_size_works(backend: str, rows: int) -> None:
    """The sizes include one that does not divide into the tiles."""
    assert_same_head(make_head(20, rows), backend)


def test_the_reference_backend_is_exact_in_float64() -> None:
    hidden_TH, weight_VH, targets_T, temperature_T = make_head(40, scale=4.0, dtype=torch.float64)
    assert_same_head((hidden_TH, weight_VH, targets_T % 90, temperature_T), "reference", vocab_size=90)


@pytest.mark.parametrize("scale", [0.01, 10.0, 60.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_flat_and_confident_distributions(backend: str, scale: float) -> None:
    """At the largest scale most tokens have p ~ 1 for one id, which is the target for half of them."""
    hidden_TH, weight_VH, targets_T, temperature_T = make_head(64, scale=scale)
    top_T = (hidden_TH @ weight_VH.t()).argmax(1)
    targets_T = torch.where(torch.arange(64) % 2 == 0, top_T, targets_T)
    head = hidden_TH, weight_VH, targets_T, temperature_T
    assert_same_head(head, backend, tolerance=1e-5)
    logp_T = linear_logprob(*head[:3], temperature=temperature_T, backend=backend).logp
    assert (logp_T <= 0).all()
    if scale == 60.0:
        assert (logp_T[::2] > -1e-3).any() and (logp_T[1::2] < -100).any()


def test_bf16_inputs_lose_nothing_but_the_rounding_of_the_gradient() -> None:
    """Products and sums are fp32: values are as good as with fp32 inputs; float64 gradients round to the same bf16."""
    for backend in BACKENDS:
        assert_same_head(make_head(CHUNK + 3, dtype=torch.bfloat16), backend, tolerance=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_temperature_is_per_token_or_one_number(backend: str) -> None:
    hidden_TH, weight_VH, targets_T, _ = make_head(9)
    number = linear_logprob(hidden_TH, weight_VH, targets_T, temperature=0.7, backend=backend).logp
    tensor = linear_logprob(hidden_TH, weight_VH, targets_T, temperature=torch.full((9,), 0.7), backend=backend).logp
    scaled = linear_logprob(hidden_TH / 0.7, weight_VH, targets_T, backend=backend).logp
    assert torch.equal(number, tensor)
    torch.testing.assert_close(number, scaled, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("vocab_size", [1, 13, 77, 95, 96])
@pytest.mark.parametrize("backend", BACKENDS)
def test_padded_rows_take_no_part_and_get_exactly_no_gradient(backend: str, vocab_size: int) -> None:
    """Whole tiles of padding are included, and the padded rows may contain anything."""
    hidden_TH, weight_VH, targets_T, temperature_T = make_head(33)
    targets_T = targets_T % vocab_size
    weight_VH[vocab_size:] = 1e30
    assert_same_head((hidden_TH, weight_VH, targets_T, temperature_T), backend, vocab_size=vocab_size)
    results = []
    for padding in (1e30, 0.0):
        weight_VH = weight_VH.clone()
        weight_VH[vocab_size:] = padding
        inputs = hidden_TH.clone().requires_grad_(), weight_VH.requires_grad_()
        result = linear_logprob(
            *inputs, targets_T, temperature=temperature_T, vocab_size=vocab_size, entropy=True, backend=backend
        )
        dhidden_TH, dweight_VH = gradients(result, directions(33), *inputs)
        assert not dweight_VH[vocab_size:].any() and dweight_VH.isfinite().all()
        results.append(torch.cat([x.detach() for x in result] + [dhidden_TH.flatten()]))
        weight_VH = weight_VH.detach()
    assert torch.equal(*results)


def test_entropy_is_given_only_when_asked_for() -> None:
    head = make_head(4)
    for backend in BACKENDS:
        assert linear_logprob(*head[:3], backend=backend).entropy is None
        assert linear_loss(*head[:3], negative_log_likelihood, backend=backend)[1].entropy is None


def sure(tokens: int, gaps: list[float], rows: int = 96, shift: float = 0.0) -> tuple:
    """Return (hidden, weight, targets, temperature 1); targets lie above the others by about each gap in turn."""
    hidden_TH, weight_VH, targets_T, _ = make_head(tokens, rows)
    weight_VH[:, :2] = 0
    weight_VH[0, 0], weight_VH[:, 1] = 1.0, 1.0
    hidden_TH[:, 0] = torch.tensor(gaps)[torch.arange(tokens) % len(gaps)]
    hidden_TH[:, 1] = shift
    return hidden_TH, weight_VH, torch.zeros_like(targets_T), torch.ones(tokens)


GAPS = [4.0, 9.0, 14.0, 18.0, 24.0]  # 1 - p from 0.6 to 1e-9


def assert_sure_tokens(backend: str, shift: float, tolerance: float, device: str = "cpu", rows: int = 96) -> None:
    """Check gradients and 1 - p per token, relative to themselves: a pack's norm would hide those of sure ones."""
    hidden_TH, weight_VH, targets_T, temperature_T = (x.to(device) for x in sure(10, GAPS, rows, shift))
    inputs = hidden_TH.clone().requires_grad_(), weight_VH.clone().requires_grad_()
    logp_T, entropy_T, _, _ = plain(*inputs, targets_T, temperature_T)
    assert logp_T.max() > -1e-8 and logp_T.min() < -0.1

    def each(outputs: list[Tensor], expected: list[Tensor]) -> None:
        for ours, correct in zip(outputs, expected, strict=True):
            error_T = (ours.double() - correct.double()).reshape(10, -1).norm(dim=1)
            assert (error_T / correct.double().reshape(10, -1).norm(dim=1)).max() <= tolerance

    result = linear_logprob(*inputs, targets_T, entropy=True, backend=backend)
    each([result.logp, result.entropy], [logp_T, entropy_T])
    through_logp = [torch.autograd.grad(x.sum(), inputs[0], retain_graph=True)[0] for x in (logp_T, result.logp)]
    through_entropy = [torch.autograd.grad(x.sum(), inputs[0])[0] for x in (entropy_T, result.entropy)]
    loss, logprobs = linear_loss(*inputs, targets_T, lambda logp, _, t: (logp, torch.ones_like(logp)), backend=backend)
    each([through_logp[1], through_entropy[1]], [through_logp[0], through_entropy[0]])
    each([torch.autograd.grad(loss, inputs[0])[0], logprobs.logp], [through_logp[0], logp_T])
    loss, _ = linear_loss(*inputs, targets_T, entropy_alone, entropy=True, backend=backend)
    each([torch.autograd.grad(loss, inputs[0])[0]], [through_entropy[0]])


def entropy_alone(logp_t: Tensor, entropy_t: Tensor, t: slice) -> tuple[Tensor, Tensor, Tensor]:
    return entropy_t, torch.zeros_like(logp_t), torch.ones_like(logp_t)


@pytest.mark.parametrize("shift", [0.0, 100.0, -100.0])
def test_a_nearly_sure_token_keeps_the_digits_of_1_minus_p(shift: float) -> None:
    """1 - p goes down to 1e-9, where 1 - exp(logp) has no digits left in fp32; also with all logits far from 0."""
    assert_sure_tokens("chunked", shift, 1e-5 if shift == 0 else 1e-4)  # fp32 rounds a logit of 100 by 4e-6


@pytest.fixture
def halves_as_on_cuda(monkeypatch) -> None:
    """Take the branch for half precision: products of halves, accumulated in fp32, gradients' factors in halves."""
    monkeypatch.setattr(autograd, "multiplies_halves", lambda hidden: hidden.dtype in autograd.HALVES)


def assert_same_in_halves(dtype: torch.dtype, temperature: float | str, active: float, entropy: bool, backend: str):
    """Check values as good as in fp32, and rounded gradients, of ``linear_logprob`` and ``linear_loss``."""
    tokens, rows = 37, 96
    hidden_TH, weight_VH, targets_T, temperature_T = make_head(tokens, rows, scale=2.0, dtype=dtype)
    dlogp_T = torch.where(torch.rand(tokens, generator=torch.Generator().manual_seed(2)) < active, 1.0, 0.0)
    dlogp_T *= directions(tokens)[0] + 2
    temperature_T = temperature_T if temperature == "each" else torch.full((tokens,), temperature)
    options = {"temperature": temperature_T if temperature == "each" else temperature, "vocab_size": 90}
    targets_T %= 90
    inputs = hidden_TH.clone().requires_grad_(), weight_VH.clone().requires_grad_()
    *expected, largest = plain(*inputs, targets_T, temperature_T, 90)
    correct = torch.autograd.grad((dlogp_T * expected[0]).sum(), inputs, retain_graph=True)
    result = linear_logprob(*inputs, targets_T, entropy=entropy, backend=backend, **options)
    loss, evaluated = linear_loss(
        *inputs,
        targets_T,
        lambda logp, _, t: (dlogp_T[t] * logp, dlogp_T[t]),
        entropy=entropy,
        backend=backend,
        **options,
    )
    for found in (result, evaluated):
        for value, exact in zip(found, expected, strict=True):
            assert value is None or torch.all((value - exact).abs() <= VALUE * largest)
    found = (
        torch.autograd.grad(loss, inputs),
        torch.autograd.grad((dlogp_T * result.logp).sum(), inputs, retain_graph=True),
    )
    for ours in found:
        for gradient, exact in zip(ours, correct, strict=True):
            assert gradient.dtype == dtype
            assert_near(gradient, exact, 1e-2 if dtype == torch.bfloat16 else 2e-3)
    if entropy:
        dentropy_T = 0.3 * dlogp_T.abs()
        mixed = result.logp * dlogp_T + result.entropy * dentropy_T
        local, _ = linear_loss(
            *inputs,
            targets_T,
            lambda logp, H, t: (dlogp_T[t] * logp + dentropy_T[t] * H, dlogp_T[t], dentropy_T[t]),
            entropy=True,
            backend=backend,
            **options,
        )
        correct = torch.autograd.grad((expected[0] * dlogp_T + expected[1] * dentropy_T).sum(), inputs)
        for ours in (torch.autograd.grad(mixed.sum(), inputs), torch.autograd.grad(local, inputs)):
            for gradient, exact in zip(ours, correct, strict=True):
                assert_near(gradient, exact, 1e-2 if dtype == torch.bfloat16 else 2e-3)


HALF_CASES = [
    (dtype, temperature, active, entropy)
    for dtype in (torch.bfloat16, torch.float16)
    for temperature in (1.0, 0.7, "each")
    for active in (0.0, 0.42, 1.0)
    for entropy in (False, True)
]


@pytest.mark.parametrize(("dtype", "temperature", "active", "entropy"), HALF_CASES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_as_cuda_multiplies_it(halves_as_on_cuda, backend, dtype, temperature, active, entropy) -> None:
    assert_same_in_halves(dtype, temperature, active, entropy, backend)


def test_a_rank_s_share_of_1_minus_p_is_placed_by_the_rank_that_has_the_target(halves_as_on_cuda) -> None:
    """Sure tokens in half precision: the entry at the target is rounded once, and never 1 - a rounded p."""
    hidden_TH, weight_VH, targets_T, _ = sure(20, GAPS)
    inputs = hidden_TH.bfloat16().requires_grad_(), weight_VH.bfloat16().requires_grad_()
    logp_T = plain(*inputs, targets_T, torch.ones(20))[0]
    (correct_TH,) = torch.autograd.grad(logp_T.sum(), inputs[0])
    loss, _ = linear_loss(*inputs, targets_T, lambda logp, _, t: (logp, torch.ones_like(logp)), backend="chunked")
    error_T = (torch.autograd.grad(loss, inputs[0])[0].double() - correct_TH.double()).norm(dim=1)
    assert (error_T / correct_TH.double().norm(dim=1)).max() <= 1e-2


# --- losses local to a token


def negative_log_likelihood(logp_t: Tensor, entropy_t: Tensor | None, t: slice) -> tuple[Tensor, Tensor]:
    return -logp_t, -torch.ones_like(logp_t)


def weighted_square(weights_T: Tensor):
    """Return sum_t w_t logp_t^2 / 2: a loss whose slope depends on the token, its position and its log-prob."""

    def token_loss(logp_t: Tensor, entropy_t: Tensor | None, t: slice) -> tuple[Tensor, Tensor]:
        assert entropy_t is None or entropy_t.shape == logp_t.shape
        return weights_T[t] * logp_t.square() / 2, weights_T[t] * logp_t

    return token_loss


@pytest.mark.parametrize("tokens", [0, 1, CHUNK, CHUNK + 77])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_local_loss_equals_autograd_through_the_log_probs(backend: str, tokens: int) -> None:
    hidden_TH, weight_VH, targets_T, temperature_T = make_head(tokens)
    targets_T, weights_T = targets_T % 90, directions(tokens)[0]
    inputs = hidden_TH.requires_grad_(), weight_VH.requires_grad_()
    loss, logprobs = linear_loss(
        *inputs,
        targets_T,
        weighted_square(weights_T),
        temperature=temperature_T,
        vocab_size=90,
        entropy=True,
        backend=backend,
    )
    *expected, largest = plain(*inputs, targets_T, temperature_T, 90)
    summands_T = weights_T.double() * expected[0].square() / 2
    assert loss.shape == () and abs(loss.item() - summands_T.sum()) <= 1e-6 * summands_T.abs().sum()
    for value, correct in zip(logprobs, expected, strict=True):
        assert not value.requires_grad
        assert torch.all((value - correct).abs() <= VALUE * largest)
    ours = torch.autograd.grad(3 * loss, inputs)  # an upstream factor scales the gradients formed in the forward pass
    for actual, correct in zip(ours, torch.autograd.grad(3 * summands_T.sum(), inputs), strict=True):
        assert_near(actual, correct, 5e-6)
    assert not ours[1][90:].any()


@pytest.mark.parametrize("scale", [0.01, 10.0, 60.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_local_loss_of_flat_and_confident_distributions(backend: str, scale: float) -> None:
    """Half of the targets are likely; others are in tiles whose p are all 0 in fp32, and some tokens have no slope."""
    hidden_TH, weight_VH, targets_T, temperature_T = make_head(64, scale=scale)
    top_T = (hidden_TH @ weight_VH.t()).argmax(1)
    targets_T, dlogp_T = torch.where(torch.arange(64) % 2 == 0, top_T, targets_T), directions(64)[0]
    inputs = hidden_TH.requires_grad_(), weight_VH.requires_grad_()
    loss, logprobs = linear_loss(
        *inputs,
        targets_T,
        lambda logp_t, entropy_t, t: (dlogp_T[t] * logp_t, dlogp_T[t]),
        temperature=temperature_T,
        backend=backend,
    )
    if scale == 60.0:
        assert (logprobs.logp[dlogp_T != 0] < -150).any()
    expected_T = plain(*inputs, targets_T, temperature_T)[0]
    ours, correct = torch.autograd.grad(loss, inputs), gradients([expected_T], [dlogp_T], *inputs)
    for actual, exact in zip(ours, correct, strict=True):
        assert_near(actual, exact, 1e-5)


def test_logits_far_from_zero_beside_others() -> None:
    """Rows whose exponentials leave fp32, below and above, in all tiles or in one; every third token has no slope.

    fp32 rounds a logit of 300 by 3e-5.
    """
    tokens, rows = CHUNK + 40, 96
    hidden_TH, weight_VH, targets_T, temperature_T = make_head(tokens, rows, scale=3.0)
    offsets, place_T = torch.tensor([0.0, -300.0, -60.0, 0.0, -28.0, 28.0, 0.0, 60.0, 300.0]), torch.arange(tokens)
    weight_VH[:, 0], weight_VH[:, 1] = 1.0, (torch.arange(rows) < rows / 8).float()
    hidden_TH[:, 0] = offsets[place_T % 9] * temperature_T
    hidden_TH[:, 1] = torch.tensor([0.0, 0.0, 90.0, -90.0])[place_T % 4] * temperature_T
    assert_same_head((hidden_TH, weight_VH, targets_T, temperature_T), "chunked", tolerance=3e-5)

    dlogp_T = torch.where(place_T % 3 == 0, 0.0, directions(tokens)[0])
    inputs = hidden_TH.requires_grad_(), weight_VH.requires_grad_()
    loss, logprobs = linear_loss(
        *inputs, targets_T, lambda logp_t, _, t: (dlogp_T[t] * logp_t, dlogp_T[t]), temperature=temperature_T
    )
    expected = gradients([plain(*inputs, targets_T, temperature_T)[0]], [dlogp_T], *inputs)
    for actual, exact in zip(torch.autograd.grad(loss, inputs), expected, strict=True):
        assert_near(actual, exact, 3e-5)
    some_T = torch.arange(0, tokens, 7)  # among other neighbours
    again = linear_logprob(hidden_TH[some_T], weight_VH, targets_T[some_T], temperature=temperature_T[some_T])
    assert_near(again.logp, logprobs.logp[some_T], 1e-6)


def test_the_gradients_of_a_local_loss_are_given_once() -> None:
    """They are not copied: a second backward pass would find them changed by the first one's receiver."""
    hidden_TH, weight_VH, targets_T, _ = make_head(10)
    loss, _ = linear_loss(hidden_TH.requires_grad_(), weight_VH, targets_T, negative_log_likelihood)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="formed once"):
        loss.backward()


def test_tokens_without_slope_give_no_gradient() -> None:
    hidden_TH, weight_VH, targets_T, _ = make_head(10)
    weights_T = torch.tensor([1.0] * 5 + [0.0] * 5)
    hidden_TH.requires_grad_()
    linear_loss(hidden_TH, weight_VH, targets_T, weighted_square(weights_T))[0].backward()
    assert hidden_TH.grad[:5].abs().sum(1).min() > 0 and not hidden_TH.grad[5:].any()


# --- bit for bit


@pytest.mark.parametrize("tokens", [1, 37, CHUNK + 5])
def test_both_functions_and_every_run_give_the_same_bits(tokens: int) -> None:
    """This makes the first ratio exactly 1: the old pass is linear_logprob, the training pass linear_loss."""
    hidden_TH, weight_VH, targets_T, temperature_T = make_head(tokens)
    runs = []
    for _ in range(2):
        inputs = hidden_TH.clone().requires_grad_(), weight_VH.clone().requires_grad_()
        with torch.no_grad():
            old = linear_logprob(*inputs, targets_T, temperature=temperature_T, entropy=True)
        loss, now = linear_loss(*inputs, targets_T, negative_log_likelihood, temperature=temperature_T, entropy=True)
        assert all(torch.equal(a, b) for a, b in zip(old, now, strict=True))
        runs.append([*now, loss.detach(), *torch.autograd.grad(loss, inputs)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_memory_is_used_again_but_never_by_two_calls_at_once() -> None:
    """One call inside another's loss, as a user's critic might: neither overwrites the other's logits."""
    workspace.release()  # buffers of other types kept by other tests
    head = make_head(40)[:3]
    expected_T = linear_logprob(*head).logp
    assert workspace.held() >= 4 * 40 * 96 / 8
    inner, held = [], []

    def with_a_call_inside(logp_t: Tensor, entropy_t: Tensor | None, t: slice) -> tuple[Tensor, Tensor]:
        held.append(workspace.held())
        inner.append(linear_logprob(*head).logp)
        return negative_log_likelihood(logp_t, entropy_t, t)

    alone, nested = (head[0].clone().requires_grad_() for _ in range(2))
    linear_loss(alone, *head[1:], negative_log_likelihood)[0].backward()
    linear_loss(nested, *head[1:], with_a_call_inside)[0].backward()
    assert held == [0] and torch.equal(inner[0], expected_T) and torch.equal(nested.grad, alone.grad)


def test_memory_of_inference_mode_serves_training() -> None:
    workspace.release()
    hidden_TH, weight_VH, targets_T, _ = make_head(40)
    with torch.inference_mode():
        expected_T = linear_logprob(hidden_TH, weight_VH, targets_T).logp
    logp_T = linear_logprob(hidden_TH.requires_grad_(), weight_VH, targets_T).logp
    logp_T.sum().backward()
    assert torch.equal(logp_T, expected_T) and hidden_TH.grad.any()


def test_a_token_s_result_does_not_depend_on_its_place_in_the_pack() -> None:
    """Up to rounding, not bit for bit: the matrix product may sum another row of the same call in another order."""
    hidden_TH, weight_VH, targets_T, temperature_T = make_head(CHUNK + 37)
    order_T = torch.randperm(CHUNK + 37, generator=torch.Generator().manual_seed(0))
    results = []
    for place_T in (torch.arange(CHUNK + 37), order_T):
        inputs = hidden_TH[place_T].requires_grad_(), weight_VH.clone().requires_grad_()
        loss, logprobs = linear_loss(
            *inputs, targets_T[place_T], negative_log_likelihood, temperature=temperature_T[place_T]
        )
        dhidden_TH, dweight_VH = torch.autograd.grad(loss, inputs)
        back_T = place_T.argsort()
        results.append((logprobs.logp[back_T], logprobs.lse[back_T], dhidden_TH[back_T], dweight_VH))
    for first, second in zip(*results, strict=True):
        assert_near(second, first, 1e-6)


# --- memory on CUDA, by count


def test_the_head_takes_at_most_2_percent_of_what_materialised_logits_take() -> None:
    """T 32768, H 3584, V 152064 in bf16: naive's step took 57,024 MiB besides its inputs (measured on an H200)."""
    naive = 57024 << 20
    assert 0.0185 < workspace.head_bytes(32768, 3584, 152064) / naive <= 0.02
    # by hand: dhidden, exp of 2816 tokens in 8 tiles of 19072 columns, 38 parts' statistics, dhidden's sum, two of rows
    by_hand = 32768 * 3584 * 2 + 2816 * 8 * (19072 * 2 + 38 * 16) + 2816 * 3584 * (4 + 2 * 2)
    assert workspace.head_bytes(32768, 3584, 152064) == by_hand


@pytest.mark.parametrize("tokens", [1, 128, 2816, 2817, 100_000])
@pytest.mark.parametrize(("vocab", "tiles"), [(152_576, 8), (152_576, 1), (1_048_576, 8), (1024, 8)])
def test_chunks_that_are_kept_are_even_whole_blocks_within_their_bytes(tokens: int, vocab: int, tiles: int) -> None:
    width = vocab // 8
    chunk = workspace.kept_chunk(tokens, width, tiles, 2)
    row = tiles * workspace.pitch(width) * 2
    assert chunk % workspace.BLOCK_T == 0 and chunk <= workspace.KEPT_CHUNK
    assert chunk * row <= max(workspace.KEPT_BYTES, workspace.BLOCK_T * row)
    chunks = -(-tokens // chunk)
    assert chunk * chunks - tokens < workspace.BLOCK_T * chunks  # none is mostly empty


# --- bad input

BAD = {
    "backend": ({"backend": "fast"}, "backend: 'fast'"),
    "hidden_dimensions": ({"hidden": torch.zeros(1, 4, H)}, "hidden, weight, targets: expected 2, 2 and 1"),
    "weight_dimensions": ({"weight": torch.zeros(96)}, "hidden, weight, targets: expected 2, 2 and 1"),
    "targets_dimensions": ({"targets": torch.zeros(4, 1).long()}, "hidden, weight, targets: expected 2, 2 and 1"),
    "width": ({"weight": torch.zeros(96, H + 1)}, "weight: 33 columns"),
    "targets_dtype": ({"targets": torch.zeros(4, dtype=torch.int32)}, "targets: expected int64"),
    "too_few_targets": ({"targets": torch.zeros(3).long()}, "targets: 3 ids for 4 tokens"),
    "negative_target": ({"targets": torch.tensor([0, 1, 2, -1])}, "targets: ids from -1 to 2"),
    "target_beyond": ({"targets": torch.tensor([0, 1, 2, 96])}, "targets: ids from 0 to 96"),
    "target_in_the_padding": ({"vocab_size": 90, "targets": torch.tensor([0, 1, 2, 90])}, "vocabulary of 90"),
    "no_vocabulary": ({"vocab_size": 0}, "vocab_size: 0 does not fit 96"),
    "vocabulary_too_large": ({"vocab_size": 97}, "vocab_size: 97 does not fit 96"),
    "temperature_length": ({"temperature": torch.ones(3)}, r"temperature: expected a number or \[4\], got \[3\]"),
    "temperature_dimensions": ({"temperature": torch.ones(4, 1)}, r"temperature: expected a number or \[4\]"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input_is_refused_by_name(bad: str) -> None:
    changes, message = BAD[bad]
    hidden_TH, weight_VH, _, _ = make_head(4)
    arguments = {"hidden": hidden_TH, "weight": weight_VH, "targets": torch.arange(4)} | changes
    with pytest.raises(ValueError, match=message):
        linear_logprob(**arguments)
    with pytest.raises(ValueError, match=message):
        linear_loss(**arguments, token_loss=negative_log_likelihood)


# --- imports


def test_the_mathematics_imports_neither_megatron_nor_vllm() -> None:
    modules = ["kernels", "objectives", "training.packing"]
    program = (
        "import sys\n"
        + "".join(f"import megatron_dypo.{name}\n" for name in modules)
        + "print([name for name in sys.modules if name.split('.')[0] in ('megatron', 'vllm')])"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert found.stdout.strip() == "[]"
