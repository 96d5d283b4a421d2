"""``trainer.offload``: the policy leaves nothing on the device while the engine works, and returns bit for bit."""

from __future__ import annotations

import gc
import hashlib

import pytest

from tests.batches import make_config, make_groups, trace_ids
from tests.launch import checkpoint_digests, copy_task, metrics, train_here, without_times
from tests.ranks import run_ranks

STEPS = 3


def live_bytes() -> int:
    """Return the bytes of all storages of this process's tensors; a shared one counts once."""
    import torch

    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    tensors += [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def build(shape: str, sections: dict):
    """Return (config, policy) on this rank, with the same weights each time."""
    from megatron_dypo.models.shape import model_shape
    from megatron_dypo.models.sharding import random_weights
    from megatron_dypo.policy.policy import Policy
    from megatron_dypo.runtime import distributed

    config = make_config(shape, **sections)
    layout = distributed.init(config.parallel)
    model = model_shape(config.model)
    return config, Policy(config, model, layout, random_weights(model, seed=1))


def updates(shape: str, sections: dict, offloaded: bool, chunk: int = 1000) -> dict:
    """Make a few updates, with the engine's turn before each and after the last; return the policy's bits and memory.

    ``chunk``: bytes of a chunk of host memory; by default no storage fits into one.
    """
    from megatron_dypo.kernels import workspace
    from megatron_dypo.policy import host_memory
    from megatron_dypo.policy.optimizer import adam_parts
    from megatron_dypo.training.step import StepContext, update_policy

    host_memory.CHUNK = chunk
    gc.freeze()  # excludes what existed before the policy from further scans
    config, policy = build(shape, sections)
    found: dict = {"metrics": [], "on_device": [], "away": [], "host": []}

    def turn() -> None:
        if not offloaded:
            return
        host = lambda: policy.offload.host_bytes  # noqa: E731
        reference = getattr(policy.reference, "host_bytes", 0)
        head = workspace.held()  # released, not moved
        found["on_device"].append(live_bytes() - host() - reference - head)
        with policy.offload.on_host():
            found["away"].append(live_bytes() - host() - reference)
            found["host"].append(host())
        assert not any(parameter.main_grad.any() for parameter in policy.parameters.values())

    for step in range(STEPS):
        turn()
        outcome = update_policy(policy, make_groups(seed=step), config, trace_ids, StepContext(1, 1e-2))
        assert outcome.skipped is None and not outcome.empty
        found["metrics"].append(outcome.metrics)
        del outcome  # including the step's micro-batches
    turn()
    digest = lambda tensor: hashlib.sha256(tensor.detach().float().numpy().tobytes()).hexdigest()  # noqa: E731
    found["weights"] = {name: digest(tensor) for name, tensor in policy.named_tensors()}
    found["adam"] = {
        f"{name}/{kind}": digest(part.flat(kind))
        for name, part in adam_parts(policy.optimizer, policy.parameters).items()
        for kind in part.names
    }
    local = sum(parameter.numel() for parameter in policy.parameters.values())
    width = next(iter(policy.parameters.values())).element_size()
    sharded_over = policy.layout.dp * policy.layout.cp if config.optimizer.distributed else 1
    return found | {"parameters": local, "width": width, "sharded_over": sharded_over}


BF16 = {"model": {"dtype": "bf16"}}
DISTRIBUTED = {"optimizer": {"distributed": True}}
ON_HOST = {"model": {"reference_on": "host"}}  # a reference on the device is moved, too
CASES = [
    (1, "llama", {}),
    (2, "llama-tied", BF16 | DISTRIBUTED),
    (2, "llama", DISTRIBUTED | ON_HOST | {"parallel": {"tensor": 2, "sequence_parallel": True}}),
    (2, "llama-tied", DISTRIBUTED | {"parallel": {"pipeline": 2, "virtual_pipeline": 2}}),
    (2, "llama", DISTRIBUTED | {"parallel": {"context": 2}}),
]


@pytest.mark.parametrize(("world", "shape", "sections"), CASES, ids=str)
def test_the_policy_comes_back_bit_for_bit_and_leaves_nothing_behind(world, shape, sections):
    kept = run_ranks(world, updates, shape, sections, False)
    moved = run_ranks(world, updates, shape, sections, True)
    for ours, theirs in zip(moved, kept, strict=True):
        for what in ("metrics", "weights", "adam"):
            assert ours[what] == theirs[what], what
        optimizer = 8 if ours["width"] == 4 else 12  # bytes per parameter
        optimizer /= ours["sharded_over"]
        assert ours["on_device"][-1] >= (ours["width"] + 4 + 0.9 * optimizer) * ours["parameters"], (
            "what is to be moved"
        )
        assert max(ours["away"]) < 16_000, "all that is left: states of random generators"
        assert ours["host"][0] < ours["host"][1] == ours["host"][-1], "with Adam's moments from the first update on"
        moved_bytes = ours["on_device"][-1] - ours["away"][-1] - 4 * ours["parameters"]
        assert abs(ours["host"][-1] - moved_bytes) < 0.05 * moved_bytes, "all but the gradients is copied, each once"


def refused_while_away() -> list[str]:
    from megatron_dypo.checkpoint.state import exchange_holders, snapshot

    _, policy = build("llama", {})
    uses = {
        "logprobs": lambda: policy.logprobs([None]),
        "accumulate": lambda: policy.accumulate([], []),
        "step": lambda: policy.step(0.1),
        "sync": policy.named_tensors,
        "reference": policy.keep_reference,
        "save": lambda: snapshot(policy, exchange_holders(policy)),
        "offload": policy.offload.to_host,
    }
    refused = []
    with policy.offload.on_host():
        for name, use in uses.items():
            with pytest.raises(AssertionError, match="in host memory while the rollout engine has the device"):
                use()
            refused.append(name)
    return refused


def test_use_of_a_policy_that_is_away_is_refused():
    """Instead of ending the process by reading memory that does not exist."""
    assert len(run_ranks(1, refused_while_away)[0]) == 7


def test_a_run_with_turns_is_the_run_without(tmp_path):
    """Metrics and the last checkpoint are bit-equal, with evaluation, saving and resuming."""
    trainer = {"trainer__steps": 6, "trainer__eval_every": 3, "trainer__save_every": 3}
    trainer["rollout__engine"] = "transformers"
    straight = copy_task(tmp_path / "straight", **trainer)
    turns = copy_task(tmp_path / "turns", **trainer, trainer__offload=True)
    run_ranks(2, train_here, str(straight), [], seconds=240)
    for steps in (3, 6):  # the second resumes the first's checkpoint
        run_ranks(2, train_here, str(turns), [f"trainer.steps={steps}"], seconds=240)
    runs = {name: metrics(tmp_path / name / "run") for name in ("straight", "turns")}
    assert all(line["time/offload"] > 0 for line in runs["turns"][1:])
    assert all(line["time/offload"] == 0 for line in runs["straight"][1:])
    lines = {name: without_times(run) for name, run in runs.items()}
    assert lines["turns"] == lines["straight"]
    final = [run_ranks(1, checkpoint_digests, str(tmp_path / name / "run/checkpoints/step_6"))[0] for name in runs]
    assert any("exp_avg" in name for name in final[0]) and final[0] == final[1]


def turns_of_the_engine(name: str, folder: str) -> list[list]:
    """Return samples of one prompt: awake, after a sleep with weights, after one without them and a sync, after none.

    Each sync is verified, and the policy offloaded after the first.
    """
    from pathlib import Path

    import numpy as np

    from megatron_dypo.data.tokenizer import load_tokenizer
    from megatron_dypo.rollout.engine import Request, Sampling
    from megatron_dypo.rollout.engines import build_engine
    from megatron_dypo.weight_sync.source import Weights

    config, policy = build("llama", {"rollout": {"engine": name, "verify_sync": "sent", "verify_syncs": 1}})
    engine = build_engine(config, policy.shape, load_tokenizer(config, policy.shape), Path(folder), policy.layout)
    requests = [Request(np.arange(3, 9, dtype=np.int32), seed) for seed in range(4)]
    sampling = Sampling(temperature=1.0, top_p=1.0, max_tokens=12, eos_id=1)
    sample = lambda: [response.ids.tolist() for response in engine.generate(requests, sampling)]  # noqa: E731
    engine.sleep(keep_weights=False)
    engine.sync(Weights(policy))
    with policy.offload.on_host():
        found = [sample(), sample()]
    engine.sleep(keep_weights=True)
    found.append(sample())
    engine.sleep(keep_weights=True)
    assert engine.generate([], sampling) == []
    engine.sleep(keep_weights=False)
    if name == "vllm":
        with pytest.raises(AssertionError, match="has to be synced"):
            sample()
    engine.sync(Weights(policy))
    engine.sleep(keep_weights=True)
    return [*found, sample()]


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_an_engine_wakes_by_itself_in_any_order_of_uses(engine, tmp_path):
    found = run_ranks(1, turns_of_the_engine, engine, str(tmp_path))[0]
    assert all(samples == found[0] for samples in found) and len(found[0]) == 4
