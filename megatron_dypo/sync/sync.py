"""One weight sync: the policy's tensors, in Hugging Face names, into the running engine, before its deadline."""

from __future__ import annotations

from megatron_dypo.policy.policy import Policy
from megatron_dypo.rollout.engine import Engine
from megatron_dypo.runtime.failure import phase
from megatron_dypo.sync.weights import Weights


def sync_weights(policy: Policy, engine: Engine, seconds: float) -> int:
    """Collective over all ranks; returns the weight version the engine now serves."""
    with phase("weight sync", limit=(seconds, "rollout.sync_timeout")):
        engine.sync(Weights(policy))
    return policy.version
