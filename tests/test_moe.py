"""Mixtures of experts: the same loss and gradient at any layout and under any routing, and load metrics."""

from __future__ import annotations

import functools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from tests.batches import make_config, make_groups, route, trace_ids
from tests.launch import checkpoint_digests, copy_task, metrics, train_here, without_times
from tests.ranks import run_ranks
from tests.test_layouts import CP2, DISTRIBUTED, PP2, SEVERAL, SP, VPP, assert_same, train_steps

EP2, EP4, ETP2 = {"expert": 2}, {"expert": 4}, {"expert_tensor": 2}
BALANCED = {"policy": {"aux_loss": 0.1}}
LAYOUTS = [
    (2, EP2), (2, SP), (2, SP | ETP2), (2, CP2 | EP2), (4, EP4), (4, VPP | EP2), (4, SP | EP2 | ETP2),
    (4, SP | CP2 | EP4), (8, {"expert": 8}), (8, SP | VPP | CP2 | EP4), (8, SP | PP2 | EP2 | ETP2),
]  # fmt: skip


@functools.cache
def alone(shape: str, routing: str = "off", aux_loss: float = 0.0) -> dict:
    """Make three updates on one rank."""
    policy = {"routing_replay": routing, "aux_loss": aux_loss}
    return run_ranks(1, train_steps, shape, 100_000, 1, SEVERAL | {"policy": policy})[0]


@pytest.mark.parametrize(("world", "parallel"), LAYOUTS, ids=str)
def test_layout_invariance_with_the_auxiliary_loss(world, parallel):
    """Loss, every gradient, including the routers', and the load: nothing is counted per micro-batch."""
    one = alone("qwen3_moe", aux_loss=0.1)
    assert one["history"][0]["loss/aux"] > 0.1 and one["history"][0]["moe/load_max"] > 1.2
    for result in run_ranks(world, train_steps, "qwen3_moe", 150, 1, SEVERAL | BALANCED | {"parallel": parallel}):
        assert_same(result, one)


@pytest.mark.parametrize("routing", ["old", "rollout"])
def test_layout_invariance_whoever_routes(routing):
    """The engine's choice has to find its tokens on context- and tensor-parallel ranks, and its layers on stages."""
    parallel = SP | CP2 | PP2 | EP4
    for result in run_ranks(
        8, train_steps, "qwen3_moe", 150, 1, SEVERAL | {"policy": {"routing_replay": routing}, "parallel": parallel}
    ):
        assert_same(result, alone("qwen3_moe", routing))


@pytest.mark.parametrize(("shape", "parallel"), [("mixtral", EP2), ("qwen2_moe", SP | EP2)], ids=str)
def test_families_layout_invariance(shape, parallel):
    for result in run_ranks(2, train_steps, shape, 150, 1, SEVERAL | {"parallel": parallel}):
        assert_same(result, alone(shape))


@pytest.mark.parametrize(("world", "parallel"), [(4, EP2), (4, SP | EP2)], ids=str)
def test_distributed_optimizer_layout_invariance(world, parallel):
    """Gradients are clipped by the norm over experts and everything else."""
    sections = SEVERAL | {"optimizer": {"clip_grad": 0.01}}
    (one,) = run_ranks(1, train_steps, "qwen3_moe", 100_000, 1, sections)
    sections = SEVERAL | {"parallel": parallel, "optimizer": DISTRIBUTED | {"clip_grad": 0.01}}
    for result in run_ranks(world, train_steps, "qwen3_moe", 150, 1, sections):
        assert_same(result, one, kinds=["weights"])


@pytest.mark.parametrize(("recompute", "routing"), [("selective", "off"), ("full", "off"), ("full", "rollout")])
def test_recompute_changes_nothing_and_counts_nothing_twice(recompute, routing):
    """With two stages a micro-batch's backward pass follows the forward pass of the next."""
    sections = SEVERAL | {"policy": {"routing_replay": routing}, "parallel": PP2, "model": {"recompute": recompute}}
    for result in run_ranks(2, train_steps, "qwen3_moe", 150, 1, sections):
        assert_same(result, alone("qwen3_moe", routing))


def first_ratios(routing: str, parallel: dict) -> tuple[float, dict]:
    """Return the largest |logp - old| in the training pass of the first update, and the step's metrics."""
    from megatron_dypo.objectives import TokenStreams

    largest, plain = [0.0], TokenStreams.terms

    def watched(self, logp_t, entropy_t, t):
        if self.old_N is not None:
            largest.append((logp_t - self.old_N[t]).abs().max().item())
        return plain(self, logp_t, entropy_t, t)

    TokenStreams.terms = watched
    sections = {"policy": {"routing_replay": routing}, "parallel": parallel, "model": {"recompute": "selective"}}
    result = train_steps("qwen3_moe", 150, 1, sections)
    return max(largest), result["history"][0]


@pytest.mark.parametrize("routing", ["off", "old", "rollout"])
def test_first_ratio_is_exactly_one(routing):
    for largest, found in run_ranks(2, first_ratios, routing, EP2):
        assert largest == 0.0
        assert found["policy/clip_frac"] == 0.0


def test_replay_takes_the_routing_of_before_the_update():
    """Own routing moves with the weights from the second update on: replay keeps that out of the ratio."""
    own, old, engine = (alone("qwen3_moe", routing)["history"][0] for routing in ("off", "old", "rollout"))
    assert "moe/rerouted_frac" not in own
    assert 0 < old["moe/rerouted_frac"] < 0.5
    assert engine["moe/rerouted_frac"] > 0.5  # made up, so the routers would have chosen otherwise for most of it
    assert old["policy/clip_frac"] != own["policy/clip_frac"]


def spoilt_rollout(spoil: str) -> str:
    """Return the error about a rollout with another model's routing."""
    from megatron_dypo.errors import TrainingError
    from megatron_dypo.models.shape import model_shape
    from megatron_dypo.models.sharding import random_weights
    from megatron_dypo.policy.policy import Policy
    from megatron_dypo.runtime import distributed
    from megatron_dypo.training.minibatch import build_minibatches
    from megatron_dypo.training.routing import give_routing

    config = make_config("qwen3_moe", 100_000, policy={"routing_replay": "rollout"})
    layout, shape = distributed.init(), model_shape(config.model)
    policy = Policy(config, shape, layout, random_weights(shape, seed=1))
    groups = route(make_groups(), shape.num_layers, shape.router_topk, shape.num_experts)
    response = groups[0].responses[0]
    response.experts = {
        "twice": np.zeros_like(response.experts),
        "layers": response.experts[:, 1:],
        "none": None,
    }[spoil]
    with pytest.raises(TrainingError) as refused:
        give_routing(policy, build_minibatches(layout, groups, config, trace_ids))
    return str(refused.value)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [("twice", "one expert twice"), ("layers", "experts) (3, 2)"), ("none", "has no routing")],
)
def test_a_rollout_of_another_routing_is_refused(spoil, said):
    assert said in run_ranks(1, spoilt_rollout, spoil)[0]


def routing_of_a_step(parallel: dict, prompts: int) -> dict:
    """Return bytes of routing, and whether each token has the routing drawn for it.

    The bytes are of all responses, this rank's own, and its micro-batches before and after their first pass.
    """
    import torch

    from megatron_dypo.models.shape import model_shape
    from megatron_dypo.models.sharding import random_weights
    from megatron_dypo.policy.policy import Policy
    from megatron_dypo.rollout.sampling import keep_own_routing
    from megatron_dypo.runtime import distributed
    from megatron_dypo.training.minibatch import build_minibatches
    from megatron_dypo.training.routing import give_routing

    config = make_config("qwen3_moe", 150, policy={"routing_replay": "rollout"}, parallel=parallel)
    layout, shape = distributed.init(config.parallel), model_shape(config.model)
    policy = Policy(config, shape, layout, random_weights(shape, seed=1))
    whole, groups = (
        route(make_groups(prompts), shape.num_layers, shape.router_topk, shape.num_experts) for _ in range(2)
    )
    keep_own_routing(groups, layout)
    minibatches = build_minibatches(layout, groups, config, trace_ids)
    give_routing(policy, minibatches)
    (work,) = minibatches
    as_drawn, given = True, 0
    for batch in work.rollouts:
        if batch.given_TLK is None:
            continue
        given += batch.given_TLK.nbytes
        for token in torch.nonzero(batch.is_given_T).squeeze(1).tolist():
            sequence = work.sequences[batch.places[batch.owner_T[token]]]
            drawn_LK = whole[sequence.group].responses[sequence.sample].experts[batch.positions_T[token]]
            as_drawn &= bool((batch.given_TLK[token].numpy() == drawn_LK[[n - 1 for n in policy.layers]]).all())
    policy.logprobs(work.batches)
    assert all(batch.given_TLK is None for batch in work.batches)
    kept = sum(each.nbytes for batch in work.rollouts for each in batch.routing.chosen.values())
    each = [response.experts for group in groups for response in group.responses]
    drawn = [response.experts for group in whole for response in group.responses]
    return {
        "all": sum(experts.nbytes for experts in drawn),
        "own": sum(experts.nbytes for experts in each if experts is not None),
        "trained": sum(drawn[4 * s.group + s.sample].nbytes for s in work.sequences if s.kind == 0),
        "given": given,
        "kept": kept,
        "as drawn": as_drawn,
        "layout": layout,
    }


@pytest.mark.parametrize(
    ("world", "parallel"), [(1, {}), (4, {"expert": 4}), (4, PP2 | EP2), (4, SP | EP4), (4, CP2 | EP4)], ids=str
)
def test_a_rank_keeps_the_routing_of_its_own_responses_and_gets_that_of_its_micro_batches(world, parallel):
    """Routing takes a byte per choice, divided by the data-parallel ranks and by other splits of tokens and layers."""
    results = run_ranks(world, routing_of_a_step, parallel, 48)
    for found in results:
        layout = found["layout"]
        assert found["as drawn"]
        assert found["own"] < 1.3 * found["all"] / world
        share = found["trained"] / layout.dp / layout.cp / layout.pp
        assert found["given"] < 1.3 * share  # last tokens and padding
        assert found["kept"] < 1.3 * share / layout.tp
    assert sum(found["own"] for found in results) == results[0]["all"]


def test_teachers_tokens_of_the_same_micro_batch_are_routed_live():
    """The engine's choice covers responses only; other tokens keep the router's own."""
    import torch

    from megatron_dypo.policy.micro_batch import MicroBatch
    from megatron_dypo.policy.moe import Routing
    from megatron_dypo.records import Kind, Sequence
    from megatron_dypo.training.routing import packed

    sequences = [Sequence(np.arange(5), 2, Kind.ROLLOUT, 0, 0), Sequence(np.arange(4), 2, Kind.TEACHER, 0, 0)]
    batch = MicroBatch.pack(sequences, [0, 1], 1.0)
    given_TLK, is_given_T = packed(batch, {0: np.array([[[7, 6]]] * 4, np.uint8)})
    routing = Routing(batch.owner_T >= 0, {3: given_TLK[:, 0]}, is_given_T)
    routing.begin_training()
    probs_TE = torch.rand(9, 8, generator=torch.Generator().manual_seed(0))
    probs_TE[:, 6:] = 0.0
    chosen_TK = routing.choose(3, probs_TE, 2)
    assert (chosen_TK[:4] == torch.tensor([7, 6])).all()
    assert torch.equal(chosen_TK[4:], probs_TE[4:].topk(2).indices)
    assert routing.differing.tolist() == [8, 18]
    assert torch.equal(routing.choose(3, 1 - probs_TE, 2), chosen_TK), "and stands from then on"


def test_the_auxiliary_loss_evens_the_load():
    before, after = (
        run_ranks(1, train_steps, "qwen3_moe", 100_000, 8, {"policy": {"aux_loss": aux_loss}})[0]["history"][-1]
        for aux_loss in (0.0, 1.0)
    )
    assert after["moe/load_max"] < before["moe/load_max"]
    assert 1 <= after["moe/aux_loss"] < before["moe/aux_loss"]


def test_the_auxiliary_loss_is_the_switch_transformers():
    """Compare with its formula and autograd on made-up logits."""
    import torch

    from megatron_dypo.policy.moe import Routing, balance_weights

    logits_TE = torch.randn(50, 6, generator=torch.Generator().manual_seed(0), requires_grad=True)
    real_T = torch.arange(50) < 40
    probs_TE = logits_TE.softmax(-1)
    taken_TE = torch.zeros(50, 6).scatter(1, probs_TE.topk(2).indices, 1.0)[real_T]
    expected = 0.3 * 6 * (taken_TE.mean(0) / 2 * probs_TE[real_T].mean(0)).sum()
    routing = Routing(real_T)
    routing.weights = balance_weights(taken_TE.sum(0)[None].double(), 0.3, k=2)
    loss = routing.balance(1, probs_TE)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    gradients = (torch.autograd.grad(value, logits_TE, retain_graph=True)[0] for value in (loss, expected))
    assert torch.allclose(*gradients, rtol=1e-5, atol=1e-9)


def test_grouped_experts_have_the_names_of_sequential_ones():
    """Transformer Engine appends a rank's expert number to the weight's name; it is not installed here."""
    from megatron_dypo.policy.model import whole_model_names

    layer = SimpleNamespace(layer_number=7, mlp=SimpleNamespace(local_expert_indices=[4, 5]))
    gpt = SimpleNamespace(decoder=SimpleNamespace(layers=[layer]))
    for local in ("linear_fc2.weight1", "local_experts.1.linear_fc2.weight"):
        (name,) = whole_model_names(gpt, {f"decoder.layers.0.mlp.experts.{local}": 0})
        assert name == "decoder.layers.6.mlp.experts.5.linear_fc2.weight"


def mixture_task(folder: Path, **keys: object) -> str:
    shape = {"hidden_size": 64, "num_attention_heads": 2, "num_query_groups": 2, "ffn_hidden_size": 64}
    model = {"preset": "tiny-moe", "shape": shape | {"num_experts": 4}}
    engine = {"engine": "transformers", "samples_per_prompt": 4, "max_response_tokens": 8}
    trainer = {"steps": 4, "save_every": 2, "eval_every": 0, "run_dir": str(folder / "run")}
    sections = {"model": model, "rollout": engine, "trainer": trainer, "parallel": EP2, "optimizer": DISTRIBUTED}
    config = yaml.safe_load(copy_task(folder).read_text())
    for name, section in (sections | keys).items():
        config[name] = config.get(name, {}) | section
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return str(folder / "config.yaml")


def test_a_run_that_replays_its_engines_routing_resumes_bit_for_bit(tmp_path):
    """Experts, moments and the recorded routing; the trainer's routers agree with the engine's, token by token."""
    replay = {"policy": {"routing_replay": "rollout", "aux_loss": 0.01}}
    straight, broken = mixture_task(tmp_path / "a", **replay), mixture_task(tmp_path / "b", **replay)
    run_ranks(2, train_here, straight, [f"rollout.record={tmp_path / 'rollouts'}"])
    run_ranks(2, train_here, broken, ["trainer.steps=2"])
    run_ranks(2, train_here, broken, [])
    runs = [tmp_path / name / "run" for name in "ab"]
    ours, theirs = (without_times(metrics(run)) for run in runs)
    assert ours == theirs and len(ours) == 4
    digests = (run_ranks(1, checkpoint_digests, str(run / "checkpoints/step_4"))[0] for run in runs)
    assert next(digests) == next(digests)
    mixed = [line for line in ours if "rollout/mismatch_max" in line]
    assert mixed and all(line["rollout/mismatch_max"] < 1e-4 for line in mixed)
    assert all(line["moe/rerouted_frac"] < 0.01 for line in mixed), "the same weights, so the same choice"
    replayed = [f"rollout.replay={tmp_path / 'rollouts'}", f"trainer.run_dir={tmp_path / 'again'}"]
    run_ranks(1, train_here, straight, ["rollout.engine=replay", "parallel.expert=1", *replayed])
    for line, again in zip(ours, metrics(tmp_path / "again"), strict=True):
        assert again["loss/total"] == pytest.approx(line["loss/total"], rel=1e-4)
