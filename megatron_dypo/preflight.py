"""Check everything a user can get wrong before any process group, model or engine is built."""

from __future__ import annotations

import itertools
import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal

import torch

from megatron_dypo import run_folder
from megatron_dypo.config.checks import is_custom
from megatron_dypo.config.load import dump
from megatron_dypo.config.schema import Config, Data
from megatron_dypo.config.stages import stages_of
from megatron_dypo.convert.hf_weights import check_folder
from megatron_dypo.data.dataset import load_data, require_batch, with_usable_traces
from megatron_dypo.data.experts import load_experts, usable
from megatron_dypo.data.provenance import check_kept, keep, start_day
from megatron_dypo.data.tokenizer import Tokenizer, load_tokenizer
from megatron_dypo.errors import TrainingError, UserError
from megatron_dypo.evaluate.suites import Suite, load_suites
from megatron_dypo.models.limits import check_layout, check_policy, check_window
from megatron_dypo.models.shape import ModelShape, hf_folder, model_shape
from megatron_dypo.objectives.coefficients import needs_reference
from megatron_dypo.objectives.own_loss import load_own_loss, try_out
from megatron_dypo.objectives.recipes import recipe
from megatron_dypo.policy.accelerations import refusal
from megatron_dypo.records import Group, Prompt
from megatron_dypo.reward import build_reward
from megatron_dypo.rollout.engines import check_vllm, engine_name
from megatron_dypo.rollout.sampling import cannot_score, encode_prompts, trace_room
from megatron_dypo.rollout.server import server_token
from megatron_dypo.rollout.step_files import require_steps
from megatron_dypo.runtime import determinism, distributed, versions
from megatron_dypo.runtime.determinism import stable_hash

log = logging.getLogger(__name__)
TRACE_SECONDS = 60.0  # of startup, at most, to score traces whose rewards the recipe needs


@dataclass
class Inputs:
    """The checked inputs of a run."""

    shape: ModelShape
    tokenizer: Tokenizer
    train: list[list[Prompt]]  # data.train per stage
    held_out: list[Group]  # data.valid, encoded
    suites: dict[Suite, list[Prompt]]  # evaluation.suites
    checkpoints: list[int]  # of the run folder's complete checkpoints, oldest first
    lock: IO[str] | None  # held by rank 0 while the process lives
    experts: list[list[Prompt]] = field(default_factory=list)  # data.experts per stage that trains on them


def check_inputs(config: Config, source: str) -> Inputs:
    """Read and check model shape, layout, weights, tokenizer, data and run folder. Raises UserError, one line."""
    distributed.require_launcher()
    check_torch(distributed.device_kind(), torch.__version__)
    shape = model_shape(config.model)
    check_layout(config.parallel, shape, distributed.world_size(), source)
    check_policy(config.policy, shape, source)
    check_window(config, shape, source)
    engine = engine_name(config)
    if engine in ("vllm", "server"):
        check_vllm(config, shape, "sender" if engine == "server" else "engine")
    if engine == "vllm":
        determinism.refuse_batch_invariance(source)
    if engine == "server":
        server_token()
    names: dict[torch.dtype, Literal["bf16", "fp32"]] = {torch.bfloat16: "bf16", torch.float32: "fp32"}
    config.model.dtype = names[distributed.training_dtype(config.model.dtype)]
    if why := refusal(config.model, shape.head_dim):
        raise UserError(f"{source}: {why}")
    configs = [stage.config for stage in stages_of(config)]
    for objective in (one.objective for one in configs if one.objective.loss_function):
        try_out(load_own_loss(objective.loss_function), objective, needs_reference(objective))
    if config.model.hf:
        check_folder(hf_folder(config.model.hf), shape)
    loaded = {_rows(one.data): load_data(one.data, is_custom(config.reward.function)) for one in reversed(configs)}
    valid = loaded[_rows(configs[0].data)][1]
    with build_reward(config.reward) as reward:
        everything = itertools.chain(valid, *(prompts for prompts, _ in loaded.values()))
        reward.check(() if config.rollout.replay else everything)
    run_dir = Path(config.trainer.run_dir)
    tokenizer = load_tokenizer(config, shape, start_day(run_dir))
    train = _encodable(configs, {rows: prompts for rows, (prompts, _) in loaded.items()}, tokenizer)
    for stage, prompts in zip(stages_of(config), train, strict=True):
        if recipe(stage.config.objective).scores_traces and not config.rollout.replay:
            check_traces(prompts, tokenizer, shape, stage.config)
        if recipe(stage.config.objective).defers:
            check_queue(stage.config, prompts, tokenizer, shape, stage.where(source))
    held_out = encode_prompts(valid, tokenizer, config.data.max_prompt_tokens)
    experts = [_experts(stage.config, shape, tokenizer, valid, stage.where(source)) for stage in stages_of(config)]
    suites = {}
    if config.trainer.eval_every:
        suites = load_suites(config.evaluation.suites, config.evaluation, f"{source}: evaluation.suites")
    for prompts in suites.values():
        encode_prompts(prompts, tokenizer, config.data.max_prompt_tokens)
    lock = run_folder.claim(run_dir) if distributed.launch_rank() == 0 else None
    checkpoints = run_folder.checkpoints(config)
    if checkpoints:
        check_kept(run_dir, tokenizer)
    if config.rollout.replay:
        first = max(checkpoints, default=0) + 1
        require_steps(config.rollout.replay, range(first, config.trainer.steps + 1))
    return Inputs(shape, tokenizer, train, held_out, suites, checkpoints, lock, experts)


def _encodable(configs: list[Config], loaded: dict[tuple, list[Prompt]], tokenizer: Tokenizer) -> list[list[Prompt]]:
    """Return the training prompts of each stage from those ``loaded``, with their usable traces."""
    found: dict[tuple, list[Prompt]] = {}
    for data in (one.data for one in configs):
        rows = _rows(data)
        require_batch(loaded[rows], data)
        if rows not in found:
            longest = min(one.data.max_prompt_tokens for one in configs if _rows(one.data) == rows)
            encode_prompts(loaded[rows], tokenizer, longest)
            found[rows] = with_usable_traces(loaded[rows], tokenizer, data.skip_bad_rows)
    return [found[_rows(one.data)] for one in configs]


def _experts(
    config: Config, shape: ModelShape, tokenizer: Tokenizer, held_out: list[Prompt], source: str
) -> list[Prompt]:
    """Return the experts' rows that a stage may train on; none if its recipe does not use them."""
    if not recipe(config.objective).imitates_experts:
        return []
    if config.data.experts is None:
        raise UserError(f"{source}: data.experts: needed by objective.method: {config.objective.method}")
    experts = load_experts(config.data, held_out)
    encode_prompts(experts, tokenizer, config.data.max_prompt_tokens)
    return usable(experts, tokenizer, config.data, lambda prompt: trace_room(config, shape.max_position, prompt))


def check_traces(prompts: list[Prompt], tokenizer: Tokenizer, shape: ModelShape, config: Config) -> None:
    """Score the teachers' traces as training steps will, each rank its share of them.

    Raises UserError naming the first that may be drawn and cannot be scored. After ``TRACE_SECONDS`` the rest is left
    to those steps, which would end the run with the same line; the log says so.
    """
    traces = [(prompt, teacher) for prompt in prompts for teacher in prompt.teachers]
    mine = traces[distributed.launch_rank() :: distributed.world_size()]
    began, at_once = time.monotonic(), 8 * config.reward.workers
    with build_reward(config.reward) as reward:
        for start in range(0, len(mine), at_once):
            if time.monotonic() - began > TRACE_SECONDS:
                log.warning(
                    "data: %d of %d traces are scored before the first step, in %.0f s; the others in the steps that "
                    "draw them",
                    start,
                    len(mine),
                    TRACE_SECONDS,
                )
                return
            part = mine[start : start + at_once]
            scores = reward.scores([prompt for prompt, _ in part], [teacher.trace for _, teacher in part])
            for (prompt, teacher), (_, fault) in zip(part, scores, strict=True):
                room = trace_room(config, shape.max_position, len(tokenizer.encode_prompt(prompt))) if fault else 0
                if fault and len(tokenizer.encode_trace(teacher.trace, prompt)) <= room:
                    raise cannot_score(config, prompt, teacher, fault)


def check_queue(config: Config, train: list[Prompt], tokenizer: Tokenizer, shape: ModelShape, source: str) -> None:
    """Raise UserError if fewer training prompts have a drawable trace than the queue holds."""
    usable = 0
    for prompt in train:
        (group,) = encode_prompts([prompt], tokenizer, config.data.max_prompt_tokens)
        room = trace_room(config, shape.max_position, len(group.prompt_ids))
        usable += any(len(tokenizer.encode_trace(teacher.trace, prompt)) <= room for teacher in prompt.teachers)
        if usable == config.objective.queue_size:
            return
    data = f"data.train: {config.data.train}"
    if not any(prompt.teachers for prompt in train):
        method = f"objective.method: {config.objective.method}"
        raise UserError(f"{source}: {data}: no prompt has a teacher's trace, which {method} trains on")
    longest = config.data.max_teacher_tokens or config.rollout.max_response_tokens
    raise UserError(
        f"{source}: objective.queue_size: {config.objective.queue_size}, but of the prompts of {data} only {usable} "
        f"have a trace that may be drawn (of at most {longest} tokens: data.max_teacher_tokens)"
    )


def _rows(data: Data) -> tuple[str, bool, bool]:
    """Return the keys that determine a stage's prompts: stages with equal keys share them."""
    return data.train, data.skip_bad_rows, data.repair_escapes


def check_torch(kind: str, version: str) -> None:
    """Raise UserError if this torch cannot train on a device of ``kind``."""
    if kind == "cuda" and versions.release(version) < versions.TORCH_CUDA:
        least, row = versions.text(versions.TORCH_CUDA), versions.row_for(None)
        raise UserError(
            f"torch {version}: on CUDA {least} or later is needed (it adds a product of bf16 matrices to an fp32 sum): "
            f"pip install torch=={row.torch} vllm=={row.last}"
        )


def check_agreement(config: Config, inputs: Inputs) -> None:
    """Check that all ranks read the same configuration, data and run folder, once there is a process group."""
    held_out = [group.prompt for group in inputs.held_out]
    read = itertools.chain(*inputs.train, *inputs.experts, held_out, *inputs.suites.values())
    seen = {
        "the configuration": stable_hash(dump(config)),
        "the prompts": stable_hash(*map(repr, read)),
        "the tokenizer": (inputs.tokenizer.digest, inputs.tokenizer.template_digest),
        "the checkpoints to resume from": inputs.checkpoints,
    }
    for rank, theirs in enumerate(distributed.all_gather_objects(seen)):
        for what, value in seen.items():
            if theirs[what] != value:
                raise TrainingError(f"rank {distributed.launch_rank()} and rank {rank} do not agree on {what}")


def agree_on_day(config: Config, inputs: Inputs) -> None:
    """Use rank 0's date for templates that read the clock, and keep it in the folder; after ``check_agreement``."""
    tokenizer = inputs.tokenizer
    day = distributed.all_gather_objects(tokenizer.day)[0]
    if day != tokenizer.day:
        tokenizer.set_day(day)
        held_out = [group.prompt for group in inputs.held_out]
        inputs.held_out = encode_prompts(held_out, tokenizer, config.data.max_prompt_tokens)
    if distributed.launch_rank() == 0:
        keep(Path(config.trainer.run_dir), tokenizer)
