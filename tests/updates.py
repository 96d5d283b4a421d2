"""Real updates, and the inputs and numbers of the last one: for tests of a training step's numbers.

Weights differ from the old policy's, and those from the reference's, so that no ratio and no KL is trivial.
"""

from __future__ import annotations

import numpy as np

from megatron_dypo.records import Group
from tests.batches import for_recipe, make_config, make_groups, trace_ids


def second_update(sections: dict, first: list[Group], second: list[Group], trace=trace_ids, at: int = 2) -> dict:
    """Make a step on made-up groups on a forked rank, then step ``at`` with an update on ``first`` and on ``second``.

    Both have equal numbers of prompts. ``trace(group, i)``: ids of teacher i's trace.

    Returns ``weights`` by policy (reference, old, now), and of the last update ``metrics``, ``gradients`` by Hugging
    Face names, and ``sequences``: group, kind, sample, and each token's streams and slopes [n] by name.
    """
    import torch

    from megatron_dypo.models.export import hf_tensors
    from megatron_dypo.models.shape import model_shape
    from megatron_dypo.models.sharding import random_weights
    from megatron_dypo.objectives import TokenStreams
    from megatron_dypo.policy.policy import Policy
    from megatron_dypo.runtime import distributed
    from megatron_dypo.training import step
    from megatron_dypo.training.minibatch import build_minibatches
    from megatron_dypo.training.passes import logprob_passes

    objective = sections.get("objective", {}) | {"updates_per_rollout": 2}
    config = make_config("llama", 150, **sections | {"objective": objective})
    layout, shape = distributed.init(config.parallel), model_shape(config.model)
    policy = Policy(config, shape, layout, random_weights(shape, seed=1))

    def tensors(values) -> dict[str, np.ndarray]:
        return {name: tensor.detach().float().numpy().copy() for name, tensor in values}

    def train(number: int, groups: list[Group], trace=trace_ids) -> list:
        minibatches = build_minibatches(layout, for_recipe(groups, config.objective), config, trace)
        logprob_passes(policy, minibatches, config)
        step.run_updates(policy, minibatches, config, step.StepContext(number, 3e-3))
        return minibatches

    weights, seen, packed, reports = {"reference": tensors(policy.named_tensors())}, {}, [], []
    terms, accumulate, update_metrics = TokenStreams.terms, policy.accumulate, step.update_metrics
    train(1, make_groups())
    weights["old"] = tensors(policy.named_tensors())

    def watched_terms(self, logp_t, entropy_t, t):
        result = terms(self, logp_t, entropy_t, t)
        seen.setdefault(id(self), []).append((logp_t.detach(), entropy_t.detach(), *result[1:]))
        return result

    def watched_accumulate(batches, streams):
        weights["now"], packed[:] = tensors(policy.named_tensors()), zip(batches, streams, strict=True)
        seen.clear()
        accumulate(batches, streams)

    def watched_metrics(*arguments):
        reports.append(update_metrics(*arguments))
        return reports[-1]

    TokenStreams.terms, policy.accumulate, step.update_metrics = watched_terms, watched_accumulate, watched_metrics
    minibatch = train(at, first + second, trace)[1]
    sequences = []
    for batch, stream in packed:
        parts = [torch.cat(pieces) for pieces in zip(*seen[id(stream)], strict=True)]
        found = dict(zip(("logp", "entropy", "dlogp", "dentropy"), parts, strict=False))
        if stream.old_N is not None:  # a pack of rollouts: the results of the passes before the update
            b = next(b for b, each in enumerate(minibatch.rollouts) if each is batch)
            found |= {name: minibatch.logp[name][b] for name in ("old", "reference") if name in minibatch.logp}
        pieces = {name: x_N.double().split(batch.counts) for name, x_N in found.items()}
        for i, place in enumerate(batch.places):
            sequence = minibatch.sequences[place]
            numbers = {name: piece[i].tolist() for name, piece in pieces.items()}
            sequences.append(numbers | {"group": sequence.group, "kind": sequence.kind.name, "sample": sequence.sample})
    main_grads = {name: parameter.main_grad for name, parameter in policy.parameters.items()}
    gradients = tensors(hf_tensors(main_grads, shape, layout))
    return {"weights": weights, "gradients": gradients, "metrics": reports[-1], "sequences": sequences}
