"""Read a run folder for ``plan --calibrate``: its layout, and each step's work and seconds by phase."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_dypo.config.load import load_config
from megatron_dypo.config.schema import Config
from megatron_dypo.config.stages import Stage, stage_at, stages_of
from megatron_dypo.errors import UserError
from megatron_dypo.models.shape import ModelShape
from megatron_dypo.monitor.metrics_file import read_metrics
from megatron_dypo.objectives.coefficients import keeps_reference
from megatron_dypo.planner.cluster import Candidate, StepWorkload, planned_shape
from megatron_dypo.planner.show_plan import work_of

TIMES = ("rollout", "logprob", "update", "sync", "step")
FEWEST = 12  # steps with timings


@dataclass(frozen=True)
class RecordedStep:
    """The work of one step of the run, and its measured seconds by phase."""

    work: StepWorkload
    seconds: dict[str, float]


@dataclass(frozen=True)
class RecordedRun:
    """A run's layout and its timed steps. ``gpu``: the name of its GPU, None on the CPU."""

    candidate: Candidate
    steps: list[RecordedStep]
    gpu: str | None


def read_run(run_dir: Path, shape: ModelShape, prompt_tokens: float | None) -> RecordedRun:
    """Read the folder of a run of the model ``shape``. The first step is left out: it may compile kernels.

    ``prompt_tokens`` is the mean length of prompts, which metrics do not have; default: half of the longest. Raises
    UserError if a file is missing or unreadable, the model is another, or fewer than ``FEWEST`` steps are timed.
    """
    where = f"plan: --calibrate: {run_dir}"
    for name in ("config.yaml", "environment.json", "metrics.jsonl"):
        if not (run_dir / name).is_file():
            raise UserError(f"{where}: has no {name}, so it is not the folder of a run")
    config = load_config(str(run_dir / "config.yaml"), [], recorded=True)
    if planned_shape(config.model) != shape:
        theirs = config.model.hf or config.model.preset
        raise UserError(f"{where}: a run of another model ({theirs}); calibrate with one of the planned model")
    ranks, gpu = _environment(run_dir / "environment.json")
    rows = [row for row in read_metrics(run_dir / "metrics.jsonl") if _is_timed(row)][1:]
    if len(rows) < FEWEST:
        raise UserError(f"{where}: {len(rows)} steps with timings after the first; at least {FEWEST} are needed")
    stages = stages_of(config)
    steps = [RecordedStep(_work(stages, row, prompt_tokens), {t: row[f"time/{t}"] for t in TIMES}) for row in rows]
    return RecordedRun(_candidate(config, stages, ranks, rows[-1]), steps, gpu)


def _environment(path: Path) -> tuple[int, str | None]:
    """Return the number of ranks, and the name of their GPU."""
    try:
        tree = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"plan: --calibrate: {path}: not valid JSON: {error}") from None
    ranks = tree.get("ranks") if isinstance(tree, dict) else None
    if type(ranks) is not int or ranks < 1:
        raise UserError(f"plan: --calibrate: {path}: does not give the number of ranks")
    return ranks, tree.get("gpu")


def _is_timed(row: dict) -> bool:
    """Return whether a line of the metrics belongs to a step and has all its times."""
    times = [row.get(f"time/{name}") for name in TIMES]
    return row["step"] > 0 and None not in times and row["time/step"] > 0 and bool(row.get("perf/tokens_per_second"))


def _candidate(config: Config, stages: list[Stage], ranks: int, row: dict) -> Candidate:
    """Return the run's layout; the number of its servers' GPUs comes from the metrics."""
    cut, servers = config.parallel, len(config.rollout.servers) if config.rollout.engine == "server" else 0
    each = row.get("perf/tokens_per_second_per_gpu")
    devices = round(row["perf/tokens_per_second"] / each) if each else ranks + servers
    return Candidate(
        tensor=cut.tensor,
        pipeline=cut.pipeline,
        virtual=cut.virtual_pipeline,
        context=cut.context,
        data=max(1, ranks // (cut.tensor * cut.pipeline * cut.context)),
        recompute=config.model.recompute,
        placement="servers" if servers else "turns" if config.trainer.offload else "beside",
        server_gpus=max(servers, devices - ranks) if servers else 0,
        engine_tensor=max(1, (devices - ranks) // servers) if servers else 1,
        expert=cut.expert,
        expert_tensor=cut.expert_tensor,
        reference="device" if any(keeps_reference(stage.config.objective) for stage in stages) else "none",
        sharded=config.optimizer.distributed,
    )


def _work(stages: list[Stage], row: dict, prompt_tokens: float | None) -> StepWorkload:
    """Return the work of a step, from its metrics."""
    work = work_of(stage_at(stages, row["step"]).config, None, prompt_tokens, 0.5, 0.25)
    response = row.get("rollout/response_tokens")  # None if the recipe does not sample
    sampled = work.prompts * work.samples * response if response else 0.0
    traces = max(0.0, row["perf/tokens_per_second"] * row["time/step"] - sampled)
    mid, hard = (row.get(f"dypo/{name}_frac") or 0.0 for name in ("mid", "hard"))
    share = row.get("source_share/rollout") or 0.0
    if sampled and 0 < share < 1:  # from what was trained, since recipes differ in which groups they train on
        mid = traces * share / (1 - share) / sampled
    drawn = work.prompts * (hard if response else 1.0) + work.experts
    work = replace(work, mid=mid, hard=hard if response else 1.0, teacher_tokens=traces / drawn if drawn else 0.0)
    if not response:  # nothing is sampled, and no response is the last one
        return replace(work, samples=0, longest=0)
    return replace(work, response_tokens=response)
