"""The same rollouts and weights give the same loss and gradient, whatever the layout and the micro-batches."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from megatron_dypo.rollout.recording import record
from tests.batches import for_recipe, make_config, make_groups, route, trace_ids
from tests.launch import copy_task, metrics, torchrun, train_here
from tests.ranks import run_ranks


def train_steps(shape: str, budget: int, steps: int, sections: dict, prompts: int = 12) -> dict:
    """Make ``steps`` updates on made-up groups; return this rank's results as numpy.

    They are the metrics, first gradients, final weights, and a digest of the initial weights.
    """
    from megatron_dypo.models.export import hf_tensors
    from megatron_dypo.models.shape import model_shape
    from megatron_dypo.models.sharding import random_weights
    from megatron_dypo.objectives.queue import failed
    from megatron_dypo.policy.policy import Policy
    from megatron_dypo.rollout.sampling import keep_own_routing
    from megatron_dypo.runtime import distributed
    from megatron_dypo.training.minibatch import build_minibatches, plan_minibatch
    from megatron_dypo.training.passes import logprob_passes
    from megatron_dypo.training.sides import build_side
    from megatron_dypo.training.step import StepContext, run_updates

    config = make_config(shape, budget, **sections)
    layout = distributed.init(config.parallel)
    model = model_shape(config.model)
    policy = Policy(config, model, layout, random_weights(model, seed=1))
    side = build_side(config, model, layout, random_weights(model, seed=1))
    initial = hashlib.sha256(b"".join(tensor.numpy().tobytes() for _, tensor in policy.named_tensors())).hexdigest()
    history, gradients = [], {}
    for step in range(steps):
        groups = for_recipe(make_groups(prompts, seed=step), config.objective)
        if config.policy.routing_replay == "rollout":
            route(groups, model.num_layers, model.router_topk, model.num_experts)
            keep_own_routing(groups, layout)
        minibatches = build_minibatches(policy.layout, groups, config, trace_ids)
        if waiting := failed(groups, config.objective):  # all of them are due
            due = [
                dataclasses.replace(group, responses=[], regime=None)
                for group in groups
                if group.prompt.id in dict(waiting)
            ]
            minibatches.append(plan_minibatch(policy.layout, due, config, trace_ids, deferred=True))
        mismatch, offender = logprob_passes(policy, minibatches, config)
        assert offender is None
        if side:
            learned = side.advance(minibatches, 1)
            assert learned.fault is None
            mismatch |= learned.metrics
        outcome = run_updates(policy, minibatches, config, StepContext(1, 1e-3))
        history.append(mismatch | outcome.metrics)
        if step == 0:
            main_grads = {name: parameter.main_grad for name, parameter in policy.parameters.items()}
            tensors = hf_tensors(main_grads, model, layout)
            gradients = {name: tensor.numpy().copy() for name, tensor in tensors}
    models = {"": policy} | ({"side ": side.policy} if side else {})
    weights = {
        f"{whose}{name}": tensor.numpy().copy() for whose, of in models.items() for name, tensor in of.named_tensors()
    }
    final = {"gradients": gradients, "weights": weights}
    return final | {"history": history, "initial": initial, "batches": len(minibatches[0].rollouts)}


SEVERAL = {"objective": {"updates_per_rollout": 3}}


@functools.cache
def single_rank(shape: str, several_updates: bool = False, prompts: int = 12) -> dict:
    sections, steps = (SEVERAL, 1) if several_updates else ({}, 3)
    return run_ranks(1, train_steps, shape, 100_000, steps, sections, prompts)[0]


def assert_same(result: dict, reference: dict, kinds: Sequence[str] = ("gradients", "weights")) -> None:
    assert result["initial"] == reference["initial"], "the same full weights to start from, bit for bit"
    for ours, theirs in zip(result["history"], reference["history"], strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert ours[name] == pytest.approx(value, rel=2e-4, abs=2e-6), name
        assert ours["loss/total"] == pytest.approx(theirs["loss/total"], rel=1e-5)
    for kind in kinds:
        assert result[kind].keys() == reference[kind].keys()
        for name, theirs in reference[kind].items():
            gap = np.linalg.norm(result[kind][name].astype(np.float64) - theirs)
            assert gap <= 1e-5 * np.linalg.norm(theirs.astype(np.float64)) + 1e-9, f"{kind} of {name}"


TP2, SP = {"tensor": 2}, {"tensor": 2, "sequence_parallel": True}
PP2, CP2 = {"pipeline": 2}, {"context": 2}
VPP = {"pipeline": 2, "virtual_pipeline": 2}
LAYOUTS = [
    (1, {}), (2, {}), (2, TP2), (2, SP), (2, PP2), (2, VPP), (2, CP2),
    (4, {}), (4, {"tensor": 4, "sequence_parallel": True}), (4, {"pipeline": 4}), (4, {"context": 4}),
    (4, VPP), (4, CP2), (4, SP | PP2), (4, SP | VPP), (4, TP2 | CP2), (4, SP | CP2), (4, PP2 | CP2),
    (4, VPP | CP2), (8, {}), (8, SP | VPP | CP2), (8, {"tensor": 4, "sequence_parallel": True} | CP2),
]  # fmt: skip
SHARDED = [(4, SP), (4, VPP), (4, SP | CP2)]  # over data-parallel ranks, and over context-parallel ones
FAMILIES = [  # tied weights, biases and norms of queries and keys, sharded and on two stages
    ("llama-tied", SP), ("llama-tied", PP2), ("qwen2-tied", SP), ("qwen2-tied", CP2), ("qwen3", SP), ("qwen3", PP2),
]  # fmt: skip


@pytest.mark.parametrize(("world", "parallel"), LAYOUTS, ids=str)
def test_loss_gradient_and_weights_layout_invariance(world, parallel):
    """Three updates on one rollout: from the second on with clipped tokens and KL. The gradient is the last one's."""
    alone = single_rank("deep", several_updates=True)
    assert min(alone["history"][0][name] for name in ("policy/clip_frac", "loss/kl", "loss/sft", "loss/gal")) > 1e-3
    for result in run_ranks(world, train_steps, "deep", 150, 1, SEVERAL | {"parallel": parallel}):
        assert_same(result, alone)


@pytest.mark.parametrize(("world", "parallel"), SHARDED, ids=str)
def test_distributed_optimizer_layout_invariance(world, parallel):
    """Gradients are left out: each rank has only its share of the sums."""
    sections = {"parallel": parallel, "optimizer": {"distributed": True}}
    for result in run_ranks(world, train_steps, "deep", 150, 3, sections):
        assert_same(result, single_rank("deep"), kinds=["weights"])


@pytest.mark.parametrize(("world", "parallel"), [(8, {}), (8, VPP)], ids=str)
def test_ranks_without_data_take_part(world, parallel):
    """One Mid and one Hard prompt: most data-parallel ranks have no rollout or no trace, and some have neither."""
    for result in run_ranks(world, train_steps, "deep", 150, 3, {"parallel": parallel}, 2):
        assert_same(result, single_rank("deep", prompts=2))


@pytest.mark.parametrize(("shape", "parallel"), FAMILIES, ids=str)
def test_families_layout_invariance(shape, parallel):
    for result in run_ranks(2, train_steps, shape, 150, 3, {"parallel": parallel}):
        assert_same(result, single_rank(shape))


@pytest.mark.parametrize("budget", [60, 400])
def test_microbatch_invariance(budget):
    result = run_ranks(1, train_steps, "llama", budget, 3, {})[0]
    assert result["batches"] > 1
    assert_same(result, single_rank("llama"))


@pytest.mark.parametrize("parallel", [{}, SP, PP2, CP2], ids=str)
def test_first_ratio_is_exactly_one_and_first_kl_exactly_zero(parallel):
    """One packing plan serves the old, reference and training passes, so they are equal to the last bit."""
    for result in run_ranks(2, first_step_log_ratios, parallel):
        assert result["largest"] == 0.0
        assert result["metrics"]["policy/clip_frac"] == 0.0
        assert result["metrics"]["loss/kl"] == 0.0


def first_step_log_ratios(parallel: dict) -> dict:
    """Return the largest |logp - old| and |logp - reference| in the training pass, and the step's metrics."""
    from megatron_dypo.objectives import TokenStreams

    largest, plain = [0.0], TokenStreams.terms

    def watched(self, logp_t, entropy_t, t):
        if self.reference_N is not None:
            largest.extend((logp_t - other[t]).abs().max().item() for other in (self.old_N, self.reference_N))
        return plain(self, logp_t, entropy_t, t)

    TokenStreams.terms = watched
    result = train_steps("llama", 150, 1, {"parallel": parallel})
    return {"largest": max(largest), "metrics": result["history"][0]}


DISTRIBUTED = {"distributed": True}


@pytest.mark.parametrize(
    ("world", "parallel", "optimizer"),
    [(2, {}, {}), (2, {}, DISTRIBUTED), (2, VPP, {}), (4, PP2, DISTRIBUTED)],
    ids=str,
)
def test_overlapped_gradient_sums_change_nothing_with_a_tied_head(world, parallel, optimizer):
    """The tied weight's gradient has two sources: the head's goes into main_grad, the embedding's through autograd."""
    sections = {"parallel": parallel, "optimizer": optimizer | {"overlap_grad_reduce": True}}
    for result in run_ranks(world, train_steps, "llama-tied", 150, 3, sections):
        kinds = ["weights"] if optimizer else ["gradients", "weights"]  # each rank has only its share of the sums
        assert_same(result, single_rank("llama-tied"), kinds)


def largest_tensor_of_the_head() -> dict[str, int]:
    """Return the elements of the head's largest tensor in a training step, and of a micro-batch's logits."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    from megatron_dypo.kernels import chunked
    from megatron_dypo.policy import policy

    seen = {"largest": 0, "logits": 0}
    storage = lambda tensor: tensor.untyped_storage().data_ptr()  # noqa: E731

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            given = {storage(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, torch.Tensor)}
            made = [tensor for tensor in tree_leaves(result) if isinstance(tensor, torch.Tensor)]
            seen["largest"] = max([seen["largest"], *(t.numel() for t in made if storage(t) not in given)])
            return result

    def watched(head):
        def run(hidden, weight, targets, *rest, **options):
            seen["logits"] = max(seen["logits"], len(targets) * len(weight))
            with Largest():
                return head(hidden, weight, targets, *rest, **options)

        return run

    chunked.CHUNK = 64
    policy.linear_logprob, policy.linear_loss = watched(policy.linear_logprob), watched(policy.linear_loss)
    train_steps("llama", 2000, 1, {})
    return seen


def test_no_tensor_of_tokens_times_vocabulary_elements_exists_in_a_training_step():
    """The head works in chunks of 64 tokens, and its forward pass forms all gradients, so nothing else sees logits."""
    (seen,) = run_ranks(1, largest_tensor_of_the_head)
    assert seen["logits"] > 500_000
    assert seen["largest"] < seen["logits"] / 4


def kept_for_the_backward_pass(recompute: str) -> tuple[dict, int]:
    """Return a run's result, and the bytes that autograd holds when the first micro-batch reaches the head."""
    import torch

    from megatron_dypo.policy import policy

    kept, at_the_head, plain = {}, [], policy.linear_loss

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def watched(*arguments, **options):
        at_the_head.append(sum(kept.values()))
        return plain(*arguments, **options)

    policy.linear_loss = watched
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = train_steps("llama", 2000, 3, {"model": {"recompute": recompute}})
    return result, at_the_head[0]


def test_recompute_keeps_less_and_changes_nothing():
    kept = []
    for recompute in ("none", "selective", "full"):
        ((result, size),) = run_ranks(1, kept_for_the_backward_pass, recompute)
        assert_same(result, single_rank("llama"))
        kept.append(size)
    assert kept[0] > 1.5 * kept[1] > 2 * kept[2]


@pytest.fixture(scope="module")
def recorded_steps(tmp_path_factory) -> tuple[Path, list[str], list[dict]]:
    """Return (configuration, overrides, metrics on one rank) of three steps on recorded rollouts in all regimes."""
    folder = tmp_path_factory.mktemp("recorded")
    shape = {"num_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "num_query_groups": 2, "head_dim": 16}
    config = copy_task(folder, model__preset="tiny", model__shape=shape, trainer__eval_every=0, trainer__save_every=0)
    ids = [json.loads(line)["id"] for line in (folder / "train.jsonl").read_text().splitlines()]
    for step in (1, 2, 3):
        groups = make_groups(prompts=8, seed=step)
        for group, prompt in zip(groups, ids[8 * step :], strict=False):
            group.prompt = dataclasses.replace(group.prompt, id=prompt)
        record(folder / "rollouts", step, groups)
    replay = ["rollout.engine=replay", f"rollout.replay={folder / 'rollouts'}", "trainer.steps=3"]
    run_ranks(1, train_here, str(config), [*replay, f"trainer.run_dir={folder / 'alone'}"])
    return config, replay, metrics(folder / "alone")


@pytest.mark.faults
def test_torchrun_layout_invariance(recorded_steps, tmp_path):
    """Run the command as users do."""
    config, replay, alone = recorded_steps
    layout = [f"parallel.{name}={value}" for name, value in VPP.items()]
    result = torchrun(2, "train", str(config), *replay, *layout, f"trainer.run_dir={tmp_path}")
    assert result.returncode == 0, result.stderr
    for ours, theirs in zip(metrics(tmp_path), alone, strict=True):
        assert 0 < theirs["dypo/mid_frac"] < 1 and theirs["dypo/hard_frac"] > 0 and theirs["dypo/easy_frac"] > 0
        for name in ("loss/total", "loss/gal", "train/grad_norm", "grad_share/sft"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), (name, ours["step"])
