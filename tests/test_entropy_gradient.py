"""``linear_loss`` with an entropy gradient: against float64 autograd through materialised logits, on any ranks.

The losses are w logp^2 / 2 + u entropy^2 / 2, whose slopes depend on both. Legend: T tokens, H hidden size, V rows.
"""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_dypo.kernels import chunked, linear_loss
from tests.ranks import run_ranks
from tests.test_kernels import BACKENDS, H, assert_near, directions, make_head, negative_log_likelihood, plain

ROWS, VOCABULARY = 96, 77  # of the weight, with padding or without
EXACT = 1e-12


def squares(weights_2T: Tensor):
    """Return the loss of squares of logp and entropy; three items even if no token has the second."""

    def token_loss(logp_t: Tensor, entropy_t: Tensor, t: slice) -> tuple[Tensor, Tensor, Tensor]:
        w_t, u_t = weights_2T[:, t]
        return w_t * logp_t.square() / 2 + u_t * entropy_t.square() / 2, w_t * logp_t, u_t * entropy_t

    return token_loss


def weights(tokens: int, with_logp: bool = True) -> Tensor:
    """Return weights [2, T] of logp and entropy: for some tokens one is 0, or both."""
    return torch.stack(directions(tokens, seed=3)[:2]).double() * torch.tensor([[float(with_logp)], [1.0]])


def found(head: tuple, weights_2T: Tensor, **options) -> dict[str, Tensor]:
    hidden_TH, weight_VH, targets_T, temperature = head
    inputs = hidden_TH.clone().requires_grad_(), weight_VH.clone().requires_grad_()
    loss, _ = linear_loss(*inputs, targets_T, squares(weights_2T), temperature=temperature, entropy=True, **options)
    return dict(zip(("value", "dhidden", "dweight"), (loss.detach(), *torch.autograd.grad(loss, inputs)), strict=True))


def expected(head: tuple, weights_2T: Tensor, vocab_size: int | None = None) -> dict[str, Tensor]:
    """Compute the results by autograd through float64 logits."""
    hidden_TH, weight_VH, targets_T, temperature = head
    temperature_T = torch.as_tensor(temperature, dtype=torch.float32).expand(len(targets_T))
    inputs = hidden_TH.double().requires_grad_(), weight_VH.double().requires_grad_()
    logp_T, entropy_T, _, _ = plain(*inputs, targets_T, temperature_T, vocab_size)
    loss = (weights_2T * torch.stack([logp_T, entropy_T]).square() / 2).sum()
    return dict(zip(("value", "dhidden", "dweight"), (loss.detach(), *torch.autograd.grad(loss, inputs)), strict=True))


def assert_equal(ours: dict, correct: dict, tolerance: float, of_value: float | None = None) -> None:
    assert abs(ours["value"] - correct["value"]) <= (of_value or tolerance) * max(1.0, abs(correct["value"]))
    for name in ("dhidden", "dweight"):
        assert_near(ours[name], correct[name], tolerance)


@pytest.fixture
def short_chunks(monkeypatch) -> None:
    """Use several chunks, including a partial one; blocks of two rows, and one."""
    monkeypatch.setattr(chunked, "CHUNK", 16)
    monkeypatch.setattr(chunked, "BLOCK_ELEMENTS", 2 * ROWS // torch.get_num_threads() + 1)


@pytest.mark.parametrize("tokens", [0, 1, 45])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradient_is_autograd_s_in_float64(short_chunks, backend, tokens) -> None:
    """Cover one temperature and one per token, padded vocabularies, and a gradient of logp or none."""
    hidden_TH, weight_VH, targets_T, temperature_T = make_head(tokens, ROWS, scale=3.0, dtype=torch.float64)
    for temperature, vocab_size, with_logp in product((1.0, 0.7, temperature_T), (None, VOCABULARY), (True, False)):
        head, weights_2T = (hidden_TH, weight_VH, targets_T % VOCABULARY, temperature), weights(tokens, with_logp)
        ours = found(head, weights_2T, backend=backend, vocab_size=vocab_size)
        assert_equal(ours, expected(head, weights_2T, vocab_size), EXACT)
        assert not ours["dweight"][vocab_size or ROWS :].any()
        active_T = (weights_2T != 0).any(0)
        assert not ours["dhidden"][~active_T].any() and ours["dhidden"][active_T].abs().sum(1).all()


@pytest.mark.parametrize("scale", [0.01, 10.0, 60.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_flat_and_confident_distributions_in_fp32(backend, scale) -> None:
    """At the largest scale most exponentials are 0 in fp32, and half of the targets have p near 1."""
    hidden_TH, weight_VH, targets_T, temperature_T = make_head(64, ROWS, scale=scale)
    top_T = (hidden_TH @ weight_VH.t()).argmax(1)
    head = hidden_TH, weight_VH, torch.where(torch.arange(64) % 2 == 0, top_T, targets_T), temperature_T
    ours, correct = found(head, weights(64), backend=backend), expected(head, weights(64))
    assert_equal(ours, correct, 1e-5)


@pytest.mark.parametrize("with_logp", [True, False], ids=["both", "entropy_alone"])
def test_logits_far_from_zero_beside_others_and_exponentials_that_vanish(with_logp) -> None:
    """Rows whose exponentials leave fp32, above or below, in all tiles or in one; in all rows some are 0."""
    tokens = 60
    hidden_TH, weight_VH, targets_T, temperature_T = make_head(tokens, ROWS, scale=3.0)
    place_T = torch.arange(tokens)
    weight_VH[:, :3] = 0.0
    weight_VH[:, 0], weight_VH[:12, 1], weight_VH[90:, 2] = 1.0, 1.0, -200.0
    hidden_TH[:, 0] = torch.tensor([0.0, -300.0, -60.0, 0.0, -28.0, 28.0, 0.0, 60.0, 300.0])[place_T % 9]
    hidden_TH[:, 1] = torch.tensor([0.0, 0.0, 90.0, -90.0])[place_T % 4]
    hidden_TH[:, :3] *= temperature_T.unsqueeze(1)
    hidden_TH[:, 2] = temperature_T
    head = hidden_TH, weight_VH, targets_T % 90, temperature_T
    ours = found(head, weights(tokens, with_logp), backend="chunked")
    # fp32 rounds a logit of 300 by 3e-5, and so do the terms of an entropy
    assert_equal(ours, expected(head, weights(tokens, with_logp)), 5e-5, of_value=2e-4)


def test_a_loss_without_it_gives_the_same_bits_as_two_items() -> None:
    """None for the third item, or zeros: the path is not taken."""
    hidden_TH, weight_VH, targets_T, temperature_T = make_head(40)
    results = []
    for third in ((), (None,), (torch.zeros(40),)):
        inputs = hidden_TH.clone().requires_grad_(), weight_VH.clone().requires_grad_()
        loss, _ = linear_loss(
            *inputs,
            targets_T,
            lambda logp, entropy, t, third=third: (*negative_log_likelihood(logp, entropy, t), *third),
            temperature=temperature_T,
            entropy=True,
        )
        results.append((loss.detach(), *torch.autograd.grad(loss, inputs)))
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


BAD = {
    "entropy_not_asked_for": (False, lambda x: (x, x, x), "token_loss: returned a third item.*entropy=True"),
    "four_items": (True, lambda x: (x, x, x, x), "token_loss: returned 4 items"),
    "dlogp_shape": (True, lambda x: (x, x.unsqueeze(1)), r"dloss/dlogp has shape \[4, 1\].*\[4\]"),
    "dentropy_shape": (True, lambda x: (x, x, x.sum()), r"dloss/dentropy has shape \[\].*\[4\]"),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_a_token_loss_may_not_return_is_refused_by_name(backend, bad) -> None:
    entropy, items, message = BAD[bad]
    with pytest.raises(ValueError, match=message):
        linear_loss(*make_head(4)[:3], lambda logp, _, t: items(logp), entropy=entropy, backend=backend)


# --- on ranks


def problem() -> tuple[tuple, Tensor]:
    """Return the problem, the same on every rank; the last of the 8 tiles is all padding."""
    tokens = 46
    hidden_TH, weight_VH, targets_T, temperature_T = make_head(tokens, ROWS, scale=3.0, dtype=torch.float64)
    return (hidden_TH, weight_VH, targets_T % VOCABULARY, temperature_T), weights(tokens)


def on_ranks(sequence_parallel: bool) -> dict[str, np.ndarray]:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    (hidden_TH, weight_VH, targets_T, temperature_T), weights_2T = problem()
    own_TH = hidden_TH.chunk(world)[rank] if sequence_parallel else hidden_TH
    head = own_TH, weight_VH.chunk(world)[rank], targets_T, temperature_T
    options = {"tp_group": dist.group.WORLD, "sequence_parallel": sequence_parallel, "vocab_size": VOCABULARY}
    return {name: value.numpy() for name, value in found(head, weights_2T, **options).items()}


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["whole", "sequence_parallel"])
def test_two_tensor_parallel_ranks_have_the_whole_vocabulary_s_gradient(sequence_parallel) -> None:
    results = run_ranks(2, on_ranks, sequence_parallel)
    parts = {name: [torch.from_numpy(np.asarray(result[name])) for result in results] for name in results[0]}
    dhidden_TH = torch.cat(parts["dhidden"]) if sequence_parallel else parts["dhidden"][1]
    head, weights_2T = problem()
    ours = {"value": parts["value"][1], "dhidden": dhidden_TH, "dweight": torch.cat(parts["dweight"])}
    assert dhidden_TH.shape == (46, H)
    assert_equal(ours, expected(head, weights_2T, VOCABULARY), EXACT)
