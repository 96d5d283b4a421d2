"""Packed attention: each token sees its own sequence up to itself, whichever rank holds which token."""

from __future__ import annotations

import functools
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_thd
from torch.nn.functional import scaled_dot_product_attention

from megatron_dypo.policy import attention
from megatron_dypo.policy.attention import Segments, angles, padded_length, repeats_of_keys, rotate, sdpa
from megatron_dypo.policy.micro_batch import MicroBatch, aligned_to, held_tokens
from megatron_dypo.records import Kind, Sequence

CPU = torch.device("cpu")
HEADS, GROUPS, WIDTH = 4, 2, 8
contexts = st.sampled_from([1, 2, 3, 4])
lengths_of_segments = st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(any)


def offsets(lengths: list[int], context: int) -> list[int]:
    """Return ``cu_seqlens`` of segments of these lengths, rounded up for ``context``."""
    align = aligned_to(context)
    return [0, *itertools.accumulate(-(-length // align) * align for length in lengths)]


def made_up(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    heads = (HEADS, GROUPS, GROUPS)
    return tuple(torch.randn(tokens, count, WIDTH, generator=generator, requires_grad=True) for count in heads)


def one_by_one(query, key, value, cu_seqlens: list[int]) -> torch.Tensor:
    """Compute plain causal attention of each segment separately."""
    outputs = []
    for start, end in itertools.pairwise(cu_seqlens):
        q, k, v = (x[start:end].transpose(0, 1) for x in (query, key, value))
        outputs.append(scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(0, 1))
    return torch.cat(outputs).flatten(1)


@given(lengths_of_segments, contexts)
def test_every_rank_computes_its_tokens_as_if_it_held_all(lengths, context):
    """Values and all gradients equal one plain attention per sequence; keys come in the ranks' order."""
    cu_seqlens = offsets(lengths, context)
    held = held_tokens(cu_seqlens, context)
    query, key, value = made_up(cu_seqlens[-1])
    expected = one_by_one(query, key, value, cu_seqlens)
    slopes = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    wanted = torch.autograd.grad((expected * slopes).sum(), (query, key, value))

    gathered = torch.from_numpy(held.reshape(-1))
    total = torch.zeros(())
    for rank, tokens in enumerate(torch.from_numpy(held)):
        segments = Segments(cu_seqlens, CPU, context, rank)
        ours = sdpa(query[tokens], key[gathered], value[gathered], segments, WIDTH**-0.5)
        torch.testing.assert_close(ours, expected[tokens], rtol=1e-5, atol=1e-6)
        total = total + (ours * slopes[tokens]).sum()
    for ours, theirs in zip(torch.autograd.grad(total, (query, key, value)), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@given(lengths_of_segments, contexts)
def test_what_flash_attention_is_told_means_the_same(lengths, context):
    """Check the contract by hand: block b's queries see keys up to the end, the last query all of them."""
    cu_seqlens = offsets(lengths, context)
    held = held_tokens(cu_seqlens, context)
    query, key, value = (x.detach() for x in made_up(cu_seqlens[-1]))
    expected = one_by_one(query, key, value, cu_seqlens)
    gathered = torch.from_numpy(held.reshape(-1))
    for rank, tokens in enumerate(torch.from_numpy(held)):
        keys, query_offsets, key_offsets, most_queries, most_keys = Segments(cu_seqlens, CPU, context, rank).varlen
        q, k, v = query[tokens], key[gathered][keys], value[gathered][keys]
        assert query_offsets.dtype == key_offsets.dtype == torch.int32
        assert (most_queries, most_keys) == (query_offsets.diff().max(), key_offsets.diff().max())
        outputs = []
        for q_span, k_span in zip(
            itertools.pairwise(query_offsets.tolist()), itertools.pairwise(key_offsets.tolist()), strict=True
        ):
            block = (x[slice(*span)].transpose(0, 1) for x, span in ((q, q_span), (k, k_span), (v, k_span)))
            queries, seen = q_span[1] - q_span[0], k_span[1] - k_span[0]
            mask = torch.ones(queries, seen, dtype=torch.bool).tril(seen - queries)
            outputs.append(scaled_dot_product_attention(*block, attn_mask=mask, enable_gqa=True).transpose(0, 1))
        torch.testing.assert_close(torch.cat(outputs).flatten(1), expected[tokens], rtol=1e-5, atol=1e-6)


@given(lengths_of_segments, contexts)
def test_ranks_hold_every_token_once_and_have_the_same_work(lengths, context):
    cu_seqlens = offsets(lengths, context)
    held = held_tokens(cu_seqlens, context)
    assert held.shape == (context, cu_seqlens[-1] // context)
    assert sorted(held.reshape(-1)) == list(range(cu_seqlens[-1]))
    starts = np.repeat(cu_seqlens[:-1], np.diff(cu_seqlens))
    assert len({sum(token - starts[token] for token in tokens) for tokens in held.tolist()}) == 1


@given(st.integers(1, 100_000))
def test_padding_of_a_stacked_sequence_is_short(length):
    assert length <= padded_length(length) < length + max(16, length / 4)


sizes = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 12), st.booleans()), max_size=6)


@given(sizes, contexts, st.sampled_from([1, 2, 4]), st.randoms(use_true_random=False))
def test_context_parallel_ranks_share_a_micro_batch_without_gap_or_overlap(sizes, context, tensor, shuffled):
    """Over the ranks every loss token occurs once, with the target and tail position that one rank alone has."""
    sequences, first = [], 1
    for prompt, tail, teacher in sizes:
        ids = np.arange(first, first + prompt + tail, dtype=np.int32)
        sequences.append(Sequence(ids, prompt, Kind.TEACHER if teacher else Kind.ROLLOUT, 0, 0))
        first += prompt + tail
    places = list(range(len(sequences)))
    shuffled.shuffle(places)
    parts = [MicroBatch.pack(sequences, places, 0.7, tensor, context, rank) for rank in range(context)]

    tokens = [len(part.ids_T) for part in parts]
    assert len(set(tokens)) == 1 and tokens[0] % tensor == 0 < tokens[0]
    assert all(length % aligned_to(context) == 0 for length in np.diff(parts[0].cu_seqlens))
    # no more than aligning each sequence, and then the whole, requires
    most = sum(len(s.ids) + aligned_to(context) - 1 for s in sequences) + aligned_to(context) * tensor
    assert parts[0].cu_seqlens[-1] <= most
    for order, place in enumerate(places):
        found = {}
        for part in parts:
            assert part.cu_seqlens == parts[0].cu_seqlens
            tails, targets, index, warmth = (
                part.split(stream)[order]
                for stream in (part.tail_N, part.targets_N, part.loss_index_N, part.temperature_N)
            )
            for tail, target, token, temperature in zip(tails, targets, index, warmth, strict=True):
                assert part.positions_T[token] == sequences[place].prompt_length - 1 + tail
                assert part.ids_T[token] == sequences[place].ids[part.positions_T[token]]
                assert temperature == pytest.approx(1.0 if sequences[place].kind == Kind.TEACHER else 0.7)
                assert found.setdefault(int(tail), int(target)) == target
        assert sum(part.counts[order] for part in parts) == len(found) == sequences[place].loss_tokens
        tail = sequences[place].ids[sequences[place].prompt_length :].tolist()
        assert [found[i] for i in range(len(tail))] == tail


FP32, BF16 = torch.float32, torch.bfloat16


@pytest.mark.parametrize(
    ("device", "dtype", "heads", "groups", "repeats"),
    [
        ("cuda", FP32, 28, 4, 7),  # SDPA would form scores: 28 x 16k x 16k in fp32 is 30 GB
        ("cuda", FP32, 8, 8, 1),
        ("cuda", BF16, 28, 4, 1),
        ("cpu", FP32, 28, 4, 1),
        ("cpu", BF16, 28, 4, 1),
    ],
)
def test_keys_are_repeated_where_no_kernel_takes_groups_without_writing_scores(device, dtype, heads, groups, repeats):
    assert repeats_of_keys(device, dtype, heads, groups) == repeats


@given(lengths_of_segments, contexts)
def test_repeated_keys_are_the_same_attention(lengths, context):
    """Compare values and gradients, with the branch of CUDA's fp32 forced."""
    cu_seqlens = offsets(lengths, context)
    held = torch.from_numpy(held_tokens(cu_seqlens, context))
    query, key, value = made_up(cu_seqlens[-1])
    segments = Segments(cu_seqlens, CPU, context, 0)
    found = []
    for device in ("cpu", "cuda"):
        choice = functools.partial(repeats_of_keys, device)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(attention, "repeats_of_keys", lambda _, *rest, choice=choice: choice(*rest))
            out = sdpa(query[held[0]], key[held.reshape(-1)], value[held.reshape(-1)], segments, WIDTH**-0.5)
        found.append((out, *torch.autograd.grad(out.square().sum(), (query, key, value))))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@given(lengths_of_segments, contexts, st.sampled_from([FP32, BF16]))
def test_packed_heads_are_turned_as_megatron_core_turns_them(lengths, context, dtype):
    """Bit for bit, on every context-parallel rank, each sequence by its own offsets."""
    sequences = [Sequence(np.zeros(n, np.int32), 1, Kind.ROLLOUT, 0, 0) for n in lengths if n > 1]
    if not sequences:
        return
    for rank in range(context):
        batch = MicroBatch.pack(sequences, list(range(len(sequences))), 1.0, 1, context, rank)
        draw = torch.Generator().manual_seed(rank)
        heads_TAD = torch.randn(len(batch.ids_T), HEADS, WIDTH, generator=draw).to(dtype)
        frequencies = 0.7 ** torch.arange(WIDTH // 2)
        ours = rotate(heads_TAD, *angles(frequencies, batch.positions_T, dtype))
        longest = max(np.diff(batch.cu_seqlens))
        table = torch.outer(torch.arange(longest).float(), frequencies)
        table = torch.cat([table, table], dim=-1)[:, None, None]
        group = SimpleNamespace(size=lambda: context, rank=lambda rank=rank: rank)
        offsets = torch.tensor(batch.cu_seqlens)
        assert torch.equal(ours, _apply_rotary_pos_emb_thd(heads_TAD, offsets, table, cp_group=group))
