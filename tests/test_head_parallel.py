"""The head over a sharded vocabulary: the same bits at any tensor-parallel size, complete gradients, main_grad."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ranks import run_ranks

TOKENS, HIDDEN, VOCABULARY, PADDED = 530, 48, 1000, 1024


def problem():
    """Return (hidden [T, H], weight [V, H], targets [T], temperature [T], slope [T]), whole, the same on every rank."""
    import torch

    draw = torch.Generator().manual_seed(0)
    dlogp_T = torch.randn(TOKENS, generator=draw) * (torch.rand(TOKENS, generator=draw) < 0.6)
    far_T1 = torch.where(torch.arange(TOKENS) % 10 == 0, 60.0, 1.0).unsqueeze(1)  # exponentials that leave fp32
    return (
        torch.randn(TOKENS, HIDDEN, generator=draw) * far_T1,
        torch.randn(PADDED, HIDDEN, generator=draw) / 4,
        torch.randint(0, VOCABULARY, (TOKENS,), generator=draw),
        0.5 + torch.rand(TOKENS, generator=draw),
        dlogp_T,
    )


def head_on_ranks(sequence_parallel: bool, with_main_grad: bool) -> dict[str, np.ndarray]:
    """Return log-probs and gradients of both functions on this rank's shard."""
    import torch
    import torch.distributed as dist

    from megatron_dypo.kernels import linear_logprob, linear_loss

    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    hidden_TH, weight_VH, targets_T, temperature_T, dlogp_T = problem()
    keep = TOKENS // 8 * 8  # sequence parallelism divides the rows evenly
    hidden_TH, targets_T, temperature_T, dlogp_T = (
        tensor[:keep] for tensor in (hidden_TH, targets_T, temperature_T, dlogp_T)
    )
    options = {
        "temperature": temperature_T,
        "tp_group": dist.group.WORLD,
        "sequence_parallel": sequence_parallel,
        "vocab_size": VOCABULARY,
        "entropy": True,
    }

    def inputs():
        rows = hidden_TH.chunk(world)[rank] if sequence_parallel else hidden_TH
        weight = torch.nn.Parameter(weight_VH.chunk(world)[rank].clone())
        if with_main_grad:
            weight.main_grad = torch.ones_like(weight)
        return rows.clone().requires_grad_(), weight

    def gradient(weight):
        return weight.main_grad - 1 if with_main_grad else weight.grad

    hidden, weight = inputs()
    logp_T, entropy_T, lse_T = linear_logprob(hidden, weight, targets_T, **options)
    (logp_T * dlogp_T + 0.1 * entropy_T * dlogp_T.abs()).sum().backward()
    found = {"logp": logp_T, "entropy": entropy_T, "lse": lse_T, "dhidden": hidden.grad, "dweight": gradient(weight)}

    hidden, weight = inputs()
    loss, logprobs = linear_loss(
        hidden, weight, targets_T, lambda logp, entropy, t: (logp * dlogp_T[t], dlogp_T[t]), **options
    )
    loss.backward()
    found |= {f"loss/{name}": value for name, value in logprobs._asdict().items()}
    found |= {"loss/value": loss, "loss/dhidden": hidden.grad, "loss/dweight": gradient(weight)}
    return {name: tensor.detach().numpy() for name, tensor in found.items()}


@pytest.fixture(scope="module")
def one_rank() -> dict[str, np.ndarray]:
    return run_ranks(1, head_on_ranks, False, False)[0]


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["whole", "sequence_parallel"])
@pytest.mark.parametrize("world", [2, 4, 8])
def test_log_prob_and_entropy_are_the_same_bits_at_any_tensor_parallel_size(one_rank, world, sequence_parallel):
    results = run_ranks(world, head_on_ranks, sequence_parallel, world == 4)
    for result in results:
        for name in ("logp", "entropy", "lse"):
            assert (result[name] == one_rank[name]).all() and (result[f"loss/{name}"] == one_rank[name]).all()
    for name in ("dhidden", "loss/dhidden"):
        parts = [result[name] for result in results]
        whole = np.concatenate(parts) if sequence_parallel else parts[-1]
        assert np.abs(whole - one_rank[name]).max() <= 1e-5 * np.abs(one_rank[name]).max()
    for name in ("dweight", "loss/dweight"):
        whole = np.concatenate([result[name] for result in results])
        assert np.abs(whole - one_rank[name]).max() <= 1e-5 * np.abs(one_rank[name]).max()
        assert not whole[VOCABULARY:].any()


def test_tokens_without_a_gradient_get_exactly_none(one_rank):
    idle = problem()[-1].numpy()[: TOKENS // 8 * 8] == 0
    for name in ("dhidden", "loss/dhidden"):
        assert not one_rank[name][idle].any() and np.abs(one_rank[name][~idle]).max(1).all()


def test_main_grad_has_what_the_gradient_would_be(one_rank):
    other = run_ranks(1, head_on_ranks, False, True)[0]
    for name in ("dweight", "loss/dweight"):
        np.testing.assert_allclose(other[name], one_rank[name], atol=1e-5)
    assert (other["loss/dhidden"] == one_rank["loss/dhidden"]).all()
