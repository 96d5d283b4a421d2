"""Measure policy updates at a real model's shape: passes, memory, the reference's swap, weight gather, offload.

An update is what training does with one graded batch: plan, log-prob passes of the old policy and the reference,
training pass, optimizer step. MFU is model FLOPs (no recomputation counted) over seconds, of the fastest square matrix
product in this process.
"""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass
from statistics import median

import torch

from benchmarks.gpu_report import child
from benchmarks.gpu_report.results import Record
from benchmarks.gpu_report.workload import (
    TINY_BATCH,
    Batch,
    forward_flops,
    gib,
    join,
    make_groups,
    matrix_peak,
    now,
    real_batch,
    seconds_of,
    sequences_of,
    trace,
    update_config,
    weights_on_device,
)
from megatron_dypo.config.schema import Config
from megatron_dypo.models.shape import ModelShape, model_shape
from megatron_dypo.planner.cluster import Candidate
from megatron_dypo.planner.cluster import StepWorkload as PlannedWork
from megatron_dypo.planner.memory import RESERVE, Need, policy_need
from megatron_dypo.policy.policy import Policy
from megatron_dypo.policy.reference import PLACES
from megatron_dypo.records import Group, Kind
from megatron_dypo.runtime.measure import take_peaks
from megatron_dypo.training.minibatch import MiniBatch, build_minibatches
from megatron_dypo.training.passes import logprob_passes, warm_up
from megatron_dypo.training.step import StepContext, run_updates

HEAVIEST, TENTH = 10, 10  # kernels; updates
SWAPS = 3


class Timed:
    """Time some of the policy's methods, device included, since the last ``take``."""

    def __init__(self, policy: Policy, *methods: str):
        self._seconds: dict[str, list[float]] = {}
        for name in methods:
            setattr(policy, name, functools.partial(self._call, name, getattr(policy, name)))

    def _call(self, name: str, method, *arguments):
        began = now()
        result = method(*arguments)
        self._seconds.setdefault(name, []).append(now() - began)
        return result

    def take(self) -> dict[str, list[float]]:
        taken, self._seconds = self._seconds, {}
        return taken


def update(record: Record) -> None:
    tiny, batch = record.tiny, TINY_BATCH if record.tiny else real_batch(record.options["budget"])
    config = update_config(record.options["model"], batch, tiny)
    layout, shape = join(config.parallel), model_shape(config.model)
    built = now()
    policy = Policy(config, shape, layout, weights_on_device(shape))
    record.figure("parameters", shape.parameters, "", "parameters")
    record.figure("build", now() - built, "s", "policy built, its weights drawn on the device")
    peak = matrix_peak()
    record.figure("matrix_peak", peak / 1e12, "TFLOP/s", "fastest square matrix product")
    timed = Timed(policy, "logprobs", "accumulate", "step")
    record.figure("warm_up", warm_up(policy, config), "s", "warm-up before the first step: compilation")
    timed.take()
    record.figure("start", time.time() - child.BEGAN, "s", "from the start of the process to the first step")
    take_peaks()
    groups = make_groups(batch, shape.vocab_size)
    _updates(record, policy, config, batch, groups, timed, peak)
    _swaps(record, policy)
    _gather(record, policy)
    if record.options["turns"]:
        _turns(record, policy)
    _profile(record, policy, config, batch, groups)


@dataclass(frozen=True)
class Updated:
    """Seconds of the log-prob passes and of the update; ``peak_gib`` of allocated memory, None on a CPU."""

    minibatches: list[MiniBatch]
    passes: float
    seconds: float
    peak_gib: float | None


def one_update(policy: Policy, config: Config, batch: Batch, groups: list[Group]) -> Updated:
    """Run one update. Raises RuntimeError if it is skipped."""
    began = now()
    minibatches = build_minibatches(policy.layout, groups, config, trace(batch, policy.shape.vocab_size))
    _, offenders = logprob_passes(policy, minibatches, config)
    passes = now() - began
    outcome = run_updates(policy, minibatches, config, StepContext(1, 1e-6))
    if offenders or outcome.skipped:
        raise RuntimeError(offenders or outcome.skipped)
    seconds, name = now() - began, "perf/device_memory_gib"
    peaks = [memory[name] for memory in (outcome.memory, take_peaks()) if name in memory]
    return Updated(minibatches, passes, seconds, max(peaks, default=None))


def _updates(
    record: Record, policy: Policy, config: Config, batch: Batch, groups: list[Group], timed: Timed, peak: float
) -> None:
    parts: dict[str, list[float]] = {name: [] for name in ("old", "training", "step", "between")}
    updates = []
    for _ in range(record.options["updates"]):
        updates.append(one_update(policy, config, batch, groups))
        taken = timed.take()
        parts["old"].append(taken["logprobs"][0])
        parts["training"] += taken["accumulate"]
        parts["step"] += taken["step"]
        parts["between"].append(updates[-1].passes - sum(taken["logprobs"]))
    minibatches, passes = updates[-1].minibatches, len(taken["logprobs"])
    everything, sampled = sequences_of(minibatches), sequences_of(minibatches, Kind.ROLLOUT)
    tokens = sum(sequence.length for sequence in everything)
    all_flops, old_flops = forward_flops(policy.shape, everything), forward_flops(policy.shape, sampled)
    batches = len(minibatches[0].batches)
    size = f"{len(everything)} sequences, {tokens:,} tokens, {batches} micro-batches, {passes} log-prob passes"
    record.note(f"An update: {size}; medians of {len(updates)}.")
    spent = {name: median(seconds) for name, seconds in parts.items()}
    whole = median(each.seconds for each in updates)
    rows = []
    for key, what, seconds, flops in (
        ("old", "log-prob pass of the old policy", spent["old"], old_flops),
        ("training_alone", "training pass", spent["training"], 3 * all_flops),
        ("training", "training pass and optimizer step", spent["training"] + spent["step"], 3 * all_flops),
        ("update", "whole update", whole, 3 * all_flops + passes * old_flops),
    ):
        rate = flops / seconds
        rows.append([what, f"{seconds:.4g}", f"{flops / 1e12:.4g}", f"{rate / 1e12:.4g}", f"{rate / peak:.1%}"])
        record.figure(f"mfu/{key}", 100 * rate / peak, "%", f"MFU of the {what}")
    rows.append(["plan, swaps of the reference, exchanges", f"{spent['between']:.4g}", "", "", ""])
    record.table("An update", ["", "s", "model TFLOP", "TFLOP/s", "MFU"], rows)
    record.figure("tokens_per_second", round(tokens / whole), "tokens/s", "tokens a second of the whole update")
    record.figure("first_update", updates[0].seconds, "s", "first whole update after the warm-up")
    record.figure("last_update", updates[-1].seconds, "s", f"whole update number {len(updates)}")
    if len(updates) == TENTH:
        ratio = updates[0].seconds / updates[-1].seconds
        record.figure("first_over_tenth", ratio, "x", "first whole update, of the tenth's time")
    _memory(record, policy.shape, config, batch, [each.peak_gib for each in updates if each.peak_gib is not None])


def planned_need(shape: ModelShape, config: Config, batch: Batch) -> Need:
    """Return ``plan``'s prediction for an update."""
    candidate = Candidate(1, 1, 1, 1, 1, config.model.recompute, "turns", reference="device")
    work = PlannedWork(
        prompts=batch.prompts,
        samples=batch.samples,
        prompt_tokens=batch.prompt_tokens,
        response_tokens=batch.mean,
        longest=batch.longest,
        teacher_tokens=batch.mean,
        budget=batch.budget,
        mid=0.75,
        hard=0.25,
        passes=2,
    )
    return policy_need(shape, candidate, work)


def _memory(record: Record, shape: ModelShape, config: Config, batch: Batch, peaks: list[float]) -> None:
    """Compare memory with the prediction, less its reserve for contexts and fragments, which torch does not count."""
    planned = gib(planned_need(shape, config, batch).policy - RESERVE)
    record.figure("memory/planned", planned, "GiB", "`plan`'s prediction, without its reserve")
    if not peaks:
        record.note("Peak memory is the device's: it is not counted on a CPU.")
        return
    record.figure("memory/peak", max(peaks), "GiB", "peak of allocated device memory")
    record.figure("memory/reserved", gib(torch.cuda.memory_reserved()), "GiB", "what torch holds after it")
    record.figure("memory/off_plan", 100 * abs(max(peaks) / planned - 1), "%", "peak away from `plan`")


def _profile(record: Record, policy: Policy, config: Config, batch: Batch, groups: list[Group]) -> None:
    """Profile one more update with torch's profiler. Raises RuntimeError if it sees no kernel."""
    cuda = torch.cuda.is_available()
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CUDA if cuda else activity.CPU]) as profile:
        one_update(policy, config, batch, groups)
    field = "self_device_time_total" if cuda else "self_cpu_time_total"
    events = sorted(profile.key_averages(), key=lambda event: getattr(event, field), reverse=True)
    spent = [getattr(event, field) for event in events]  # microseconds
    if not sum(spent):
        raise RuntimeError("torch's profiler saw no kernel: on this machine it may not read the device's counters")
    rows = [
        [f"`{event.key[:90]}`", str(event.count), f"{each / 1000:.4g}", f"{each / sum(spent):.1%}"]
        for event, each in zip(events[:HEAVIEST], spent, strict=False)
    ]
    record.table("The ten heaviest kernels of an update", ["kernel", "calls", "ms", "of all"], rows)


def _swaps(record: Record, policy: Policy) -> None:
    """Time swapping the reference in and the policy back, from each place that a reference may have."""
    for on, place in PLACES.items():
        reference = place(policy.parameters)
        reference.keep()
        both = median(seconds_of(reference.swap) + seconds_of(reference.swap) for _ in range(SWAPS))
        record.figure(f"reference/swap_{on}", both, "s", f"reference in and out; kept on the {on}")


def _gather(record: Record, policy: Policy) -> None:
    sizes = [tensor.nbytes for _, tensor in policy.named_tensors()]
    spent = median(seconds_of(lambda: [None for _ in policy.named_tensors()]) for _ in range(SWAPS))
    record.figure("gather/tensors", len(sizes), "", "weight gather: tensors")
    record.figure("gather/size", gib(sum(sizes)), "GiB", "weight gather: size")
    record.figure("gather/seconds", spent, "s", "weight gather: time")


def _turns(record: Record, policy: Policy) -> None:
    for turn in ("first", "second"):
        ahead = seconds_of(policy.offload.to_host)
        if torch.cuda.is_available() and turn == "first":
            left = gib(torch.cuda.memory_allocated())
            record.figure("offload/left", left, "GiB", "left on the device with the policy away")
        back = seconds_of(policy.offload.to_device)
        record.figure(f"offload/{turn}_away", ahead, "s", f"{turn} turn: policy to the host")
        record.figure(f"offload/{turn}_back", back, "s", f"{turn} turn: policy back")
