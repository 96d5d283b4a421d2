"""Measure vLLM in this process, alternating with a policy: start, weight sync, sampling, memory, and log-probs."""

from __future__ import annotations

import tempfile
from pathlib import Path
from statistics import median

import numpy as np
import torch

from benchmarks.gpu_report.results import Record
from benchmarks.gpu_report.workload import (
    device_gib,
    join,
    model,
    now,
    seconds_of,
    weights_on_device,
)
from benchmarks.machine import ROOT
from megatron_dypo.config.load import load_config
from megatron_dypo.config.schema import Config, Data, Objective, Rollout, Trainer
from megatron_dypo.models.shape import ModelShape, model_shape
from megatron_dypo.policy.policy import Policy
from megatron_dypo.records import Group, Prompt, Regime, Response
from megatron_dypo.rollout.engine import Engine, Request, Sampling
from megatron_dypo.rollout.vllm_args import engine_arguments, in_process_arguments
from megatron_dypo.rollout.vllm_versions import installed
from megatron_dypo.runtime.distributed import device_kind
from megatron_dypo.training.minibatch import build_minibatches
from megatron_dypo.training.passes import logprob_passes
from megatron_dypo.weight_sync.source import Weights

QUICKSTART = ROOT / "examples/quickstart/config.yaml"
SYNCS = 3
SAMPLES = 8  # per prompt
EOS = 1
_engines: dict[str, Engine] = {}


def shared_engine(config: Config, shape: ModelShape, end_ids: tuple[int, ...] = (EOS,)) -> Engine:
    """Return one engine per process for the same arguments to vLLM: with ``--tiny`` all stages share it."""
    from megatron_dypo.rollout.vllm_engine import VllmEngine

    if (key := engine_key(config, shape, end_ids)) not in _engines:
        _engines[key] = VllmEngine(config, shape, end_ids, Path(tempfile.mkdtemp(prefix="gpu_report_engine_")))
    return _engines[key]


def engine_key(config: Config, shape: ModelShape, end_ids: tuple[int, ...]) -> str:
    """Return a key that is equal for two configurations that one engine can serve."""
    kind = device_kind()
    arguments = engine_arguments(config, shape, Path(), kind, installed()), in_process_arguments(config, kind, False)
    return repr((arguments, end_ids))


def rollout_config(record: Record, name: str, **rollout: object) -> tuple[Config, int, int]:
    """Return (configuration, requests, tokens of a prompt). Eager: each stage starts vLLM anew and does not time it."""
    if record.tiny:  # the quickstart's, whose engine this is
        config = load_config(str(QUICKSTART), [f"rollout.{key}={value}" for key, value in rollout.items()])
        config.objective.reference = "previous"
        return config, 2 * SAMPLES, 8
    config = Config(
        model=model(name, tiny=False),
        data=Data(train="none", max_prompt_tokens=256, max_tokens_per_microbatch=16384),
        rollout=Rollout(max_response_tokens=256, engine_memory=0.35, engine_eager=True, **rollout),
        objective=Objective(reference="previous"),
        trainer=Trainer(steps=1, run_dir="none"),
    )
    return config, 64 * SAMPLES, 100


def make_requests(count: int, prompt_tokens: int, vocabulary: int) -> list[Request]:
    random = np.random.default_rng(0)
    drawn = [random.integers(3, vocabulary, prompt_tokens).astype(np.int32) for _ in range(count // SAMPLES)]
    return [Request(drawn[i // SAMPLES], i) for i in range(count)]


def sampling(config: Config) -> Sampling:
    most = config.rollout.max_response_tokens
    return Sampling(temperature=config.rollout.temperature, top_p=1.0, max_tokens=most, eos_id=EOS)


def mismatch(policy: Policy, config: Config, requests: list[Request], responses: list[Response]) -> dict[str, float]:
    """Return rollout/mismatch_...: the engine's log-probs against the policy's, in nats."""
    groups = []
    for first in range(0, len(requests), SAMPLES):
        own = responses[first : first + SAMPLES]
        for i, response in enumerate(own):
            response.reward = float(i % 2)
        groups.append(Group(Prompt(f"p{first}", "1", ()), requests[first].prompt_ids, own, Regime.MID))
    minibatches = build_minibatches(policy.layout, groups, config, lambda group, teacher: group.prompt_ids)
    metrics, offenders = logprob_passes(policy, minibatches, config)
    if offenders:
        raise RuntimeError(offenders)
    return metrics


def engine(record: Record) -> None:
    config, count, prompt_tokens = rollout_config(record, "qwen3-4b")
    config.trainer.offload = True
    layout, shape = join(config.parallel), model_shape(config.model)
    began = now()
    llm = shared_engine(config, shape)
    record.figure("start", now() - began, "s", "vLLM's start")
    _device(record, "engine", "in use on the device with the engine up")
    record.figure("sleep", seconds_of(lambda: llm.sleep(keep_weights=False)), "s", "engine to sleep")
    _device(record, "asleep", "in use with the engine asleep")
    policy = Policy(config, shape, layout, weights_on_device(shape))
    _device(record, "policy", "in use with the policy, the engine asleep")
    spent = [seconds_of(lambda: llm.sync(Weights(policy))) for _ in range(SYNCS)]
    record.figure("first_sync", spent[0], "s", "first weight sync, waking the engine's weights")
    record.figure("sync", median(spent[1:]), "s", "weight sync")
    requests = make_requests(count, prompt_tokens, shape.vocab_size)
    turns = {"away": [], "back": []}
    for turn in ("first", "second"):
        turns["away"].append(seconds_of(policy.offload.to_host))
        began = now()
        responses = llm.generate(requests, sampling(config))
        spent_s, tokens = now() - began, sum(len(response.ids) for response in responses)
        record.figure(f"{turn}_rate", round(tokens / spent_s), "tokens/s", f"{turn} sampling, {count} requests")
        if turn == "first":
            first = responses
            _device(record, "sampling", "in use while the engine samples, the policy away")
            llm.sleep(keep_weights=True)
        else:
            llm.sleep(keep_weights=False)
        turns["back"].append(seconds_of(policy.offload.to_device))
    same = all(np.array_equal(a.ids, b.ids) for a, b in zip(first, responses, strict=True))
    record.figure("repeats", same, "", "the same samples after a turn and a sleep")
    for way, seconds in turns.items():
        for turn, each in zip(("first", "second"), seconds, strict=True):
            record.figure(f"policy_{way}/{turn}", each, "s", f"policy {way}, {turn} turn")
    if not same and not torch.cuda.is_available():  # on CUDA, other batches may round differently
        record.fail("samples differ after a turn")


def agreement(record: Record) -> None:
    """Check the bound of ``docs/rollout.md``'s warning; on a CPU, in fp32, log-probs agree to 1e-5."""
    config, count, prompt_tokens = rollout_config(record, "qwen2.5-1.5b", **record.options)
    layout, shape = join(config.parallel), model_shape(config.model)
    llm = shared_engine(config, shape)
    policy = Policy(config, shape, layout, weights_on_device(shape))
    llm.sync(Weights(policy))
    requests = make_requests(count, prompt_tokens, shape.vocab_size)
    responses = llm.generate(requests, sampling(config))
    found = mismatch(policy, config, requests, responses)
    for key, what in (("mean", "mean"), ("max", "largest"), ("kl", "KL divergence")):
        value = found[f"rollout/mismatch_{key}"]
        record.figure(key, value, "nats", f"log-probs of vLLM and policy: {what}")
    rows = [[name.rpartition("/")[2], f"{share:.2%}"] for name, share in found.items() if "mismatch_share" in name]
    record.table("Tokens by difference", ["nats, from", "of the tokens"], rows)
    limit = 0.05 if torch.cuda.is_available() else 1e-4
    if not found["rollout/mismatch_mean"] <= limit:
        record.fail(f"log-probs differ by {found['rollout/mismatch_mean']:.3g} nats in the mean, {limit:g} at most")


def _device(record: Record, key: str, label: str) -> None:
    if torch.cuda.is_available():
        record.figure(f"device/{key}", device_gib(), "GiB", label)
