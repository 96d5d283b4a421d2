"""On one CUDA device (`make test-gpu`): the same head, grouped loss and training step as on the CPU."""

from __future__ import annotations

import itertools

import pytest
import torch

from megatron_dypo.kernels import linear_logprob
from tests import test_grouped_loss as grouped
from tests.batches import make_groups, trace_ids
from tests.ranks import run_ranks
from tests.test_deterministic import updates

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def test_head_on_cuda_equals_cpu():
    torch.manual_seed(0)
    hidden_TH, weight_VH = torch.randn(700, 64), torch.randn(1024, 64)
    targets_T = torch.randint(0, 1000, (700,))
    ours, theirs = (
        linear_logprob(hidden_TH.to(device), weight_VH.to(device), targets_T.to(device), vocab_size=1000, entropy=True)
        for device in ("cuda", "cpu")
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-4, atol=1e-4)


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
    from megatron_dypo.convert.stream import random_weights
    from megatron_dypo.policy.policy import Policy
    from megatron_dypo.policy.shape import model_shape
    from megatron_dypo.runtime import distributed
    from megatron_dypo.runtime.stopwatch import Stopwatch
    from megatron_dypo.update import update_policy
    from tests.batches import make_config

    config = make_config()
    layout = distributed.init()
    shape = model_shape(config.model)
    seen = []
    for _ in range(2):
        policy = Policy(config, shape, layout, random_weights(shape, seed=1))
        outcome = update_policy(policy, make_groups(), config, trace_ids, 1e-3, Stopwatch())
        assert outcome.skipped is None and policy.version == 1
        seen.append(outcome.metrics["loss/total"])
    assert seen[0] == pytest.approx(seen[1], rel=1e-6)


def test_in_deterministic_mode_two_runs_are_equal_bit_for_bit():
    """In processes of their own: cuBLAS and NCCL read their variables when they start."""
    first, second = (run_ranks(1, updates, {}, True) for _ in range(2))
    assert first == second
