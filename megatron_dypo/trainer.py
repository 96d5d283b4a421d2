"""The training loop: roll out, reward, grade, update, sync, evaluate, save. One ``step`` is one rollout.

With ``rollout.async_rollout`` the next step's batch is sampled during grade and update, and complete before the sync:
no response is sampled across an update.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from megatron_dypo import run_folder
from megatron_dypo.checkpoint.catalog import prefetched_file, step_folder
from megatron_dypo.checkpoint.manager import Counters, Saver, load_newest
from megatron_dypo.config.checks import warnings
from megatron_dypo.config.schema import Config
from megatron_dypo.config.stages import Stage, stage_at, stages_of
from megatron_dypo.convert.hf_weights import folder_weights
from megatron_dypo.errors import TrainingError
from megatron_dypo.evaluate.in_training import evaluate_now
from megatron_dypo.models.shape import hf_folder
from megatron_dypo.models.sharding import random_weights, require_finite
from megatron_dypo.monitor.monitor import Monitor
from megatron_dypo.monitor.trace_file import Tracing
from megatron_dypo.objectives.queue import DeferredQueue, failed
from megatron_dypo.objectives.recipes import recipe
from megatron_dypo.planner.placement import place_reference, require_room
from megatron_dypo.policy.hf_probe import probe
from megatron_dypo.policy.policy import Policy
from megatron_dypo.preflight import Inputs, agree_on_day, check_agreement, check_inputs
from megatron_dypo.reward import build_reward
from megatron_dypo.rollout.engine import Engine
from megatron_dypo.rollout.engines import build_engine, engine_name
from megatron_dypo.rollout.manager import RolloutManager, check_staleness
from megatron_dypo.runtime import determinism, distributed
from megatron_dypo.runtime.distributed import Layout, all_here
from megatron_dypo.runtime.failure import begin_step, phase
from megatron_dypo.runtime.measure import StepTimer, device_bytes
from megatron_dypo.runtime.stop_request import StopRequest
from megatron_dypo.runtime.watchdog import Watchdog
from megatron_dypo.training.metrics import batch_metrics
from megatron_dypo.training.minibatch import grade_groups
from megatron_dypo.training.passes import warm_up
from megatron_dypo.training.sides import build_side
from megatron_dypo.training.step import StepContext, update_policy
from megatron_dypo.weight_sync.source import sync_weights

log = logging.getLogger(__name__)


def train(
    config: Config, inputs: Inputs | None = None, start_engine: Callable[..., Engine | None] = build_engine
) -> bool:
    """Run, or resume from the run folder's newest complete checkpoint, until ``trainer.steps`` or the last stage ends.

    ``inputs``: the result of ``check_inputs``; by default they are read and checked here. ``start_engine``: called like
    ``build_engine``; it may return an engine that is already running.
    Returns False if a signal stopped it early (``runtime/stop_request.py``). Raises TrainingError if more than
    ``trainer.max_skipped_steps`` consecutive steps were skipped.
    """
    inputs = inputs or check_inputs(config, "configuration")
    if config.trainer.deterministic:
        determinism.enable()
    with phase("joining the job"):
        layout = distributed.init(config.parallel, reaches_out=not all_here(config.rollout.servers))
    with Watchdog(config.parallel) as watchdog, Tracing(config, layout) as tracing:
        return _train(config, inputs, layout, watchdog, tracing, start_engine)


def _place_reference(config: Config, inputs: Inputs, layout: Layout, memory: int | None) -> str:
    """Resolve ``model.reference_on``, equal on every rank; return a log line about it, "" without a reference."""
    engine = 0.0  # bytes of the device that it occupies permanently
    if memory and not config.trainer.offload:
        held = {"vllm": config.rollout.engine_memory * memory, "transformers": 4.0 * inputs.shape.parameters}
        engine = held.get(engine_name(config), 0.0)
    config.model.reference_on, said = place_reference(config, inputs.shape, layout, memory, engine)
    return said


def _train(
    config: Config,
    inputs: Inputs,
    layout: Layout,
    watchdog: Watchdog,
    tracing: Tracing,
    start_engine: Callable[..., Engine | None],
) -> bool:
    trainer, run_dir, tokenizer = config.trainer, Path(config.trainer.run_dir), inputs.tokenizer
    stages = stages_of(config)
    check_agreement(config, inputs)
    agree_on_day(config, inputs)
    log.info("%s; %s parameters; starting %s", layout, f"{inputs.shape.parameters:,}", engine_name(config))
    memory = min(filter(None, distributed.all_gather_objects(device_bytes())), default=None)  # of the smallest GPU
    require_room(config, inputs.shape, layout, memory)
    with phase("rollout engine start"), determinism.trainer_kept():
        folder = run_dir / "engine" / f"rank_{layout.rank}"
        engine = start_engine(config, inputs.shape, tokenizer, folder, layout)
        distributed.claim_device()  # an engine may have selected another
        if engine and trainer.offload:
            engine.sleep(keep_weights=False)
    with phase("policy start"):
        placed = _place_reference(config, inputs, layout, memory)
        hf = config.model.hf
        read = folder_weights(hf_folder(hf)) if hf else random_weights(inputs.shape, trainer.seed)
        policy = Policy(config, inputs.shape, layout, read)
        if hf:
            require_finite(policy.parameters, inputs.shape, layout, f"model.hf: {hf}")
        side = build_side(config, inputs.shape, layout, read)
    if hf and (config.model.probe == "on" or (config.model.probe == "auto" and not inputs.checkpoints)):
        with phase("log-prob probe"):
            probe(policy, Path(hf_folder(hf)), tokenizer, config.parallel.timeout)
    counters = Counters()
    if inputs.checkpoints:
        with phase("checkpoint load"):
            counters = load_newest(run_dir, inputs.checkpoints, policy, side.policy if side else None)
            require_finite(policy.parameters, inputs.shape, layout, f"trainer.run_dir: {run_dir}: step {counters.step}")
    if torch.cuda.is_available():  # nothing is compiled on the CPU
        with phase("warm-up"):
            seconds = sum(warm_up(policy, stage.config) for stage in stages)
            log.info("compiled and warmed up in %.1f s, before the first step", seconds)
    saver = Saver(config, policy, side.policy if side else None)
    offloads = [policy.offload] + ([side.policy.offload] if side else [])

    reward = build_reward(config.reward)
    rollouts_of = [
        RolloutManager(stage.config, prompts, tokenizer, engine, reward, layout, inputs.shape, experts, stage.before)
        for stage, prompts, experts in zip(stages, inputs.train, inputs.experts, strict=True)
    ]
    under_way = stage_at(stages, counters.step + 1)
    if counters.step > under_way.before:
        rollouts_of[under_way.index].deferred(counters.queue)  # raises if something is missing
        if file := prefetched_file(step_folder(run_dir, counters.step)):
            rollouts_of[under_way.index].resume(file)

    def enter(step: int) -> tuple[Stage, RolloutManager, DeferredQueue]:
        """Return the stage of a step, its rollouts and queue; at its start the policy keeps only its weights."""
        stage = stage_at(stages, step)
        if stage.own(step) == 1:
            policy.begin_stage(stage.config)
            counters.begin_stage(policy.version)
            if stage.named:
                monitor.say(stage.title)
        objective = stage.config.objective
        return (
            stage,
            rollouts_of[stage.index],
            DeferredQueue(objective.queue_size, objective.queue_order, counters.queue),
        )

    def sync() -> None:
        if engine:
            sync_weights(policy, engine, config.rollout.sync_timeout)

    @contextmanager
    def engines_turn(keep_weights: bool) -> Iterator[None]:
        """Give the engine its turn; with ``trainer.offload`` it has the device to itself until the end of the block."""
        if not trainer.offload:
            yield
            return
        with ExitStack() as others_turn:
            for offload in offloads:
                others_turn.enter_context(offload.on_host())
            yield
            if engine:
                engine.sleep(keep_weights)

    def evaluate(step: int) -> dict:
        due = trainer.eval_every and (step % trainer.eval_every == 0 or step == trainer.steps)
        if not engine or not due:
            return {}
        with engines_turn(keep_weights=True), phase("evaluation"):
            return evaluate_now(inputs.held_out, inputs.suites, tokenizer, engine, config, reward, layout)

    if layout.is_main:
        run_folder.describe(config, run_dir)
    with Monitor(config, layout, counters.step) as monitor, reward, StopRequest() as stop, watchdog.reporting():
        monitor.notice([f"{stage.prefix}{line}" for stage in stages for line in warnings(stage.config)])
        if placed:
            monitor.say(placed)
        sync()
        if counters.step == 0 and (before := evaluate(0)):
            monitor.write(0, before)

        asked = None
        for step in range(counters.step + 1, trainer.steps + 1):
            begin_step(step)
            (stage, rollouts, queue), clock = enter(step), StepTimer()
            with engines_turn(keep_weights=False):  # a sync comes before the next turn
                batch = rollouts.batch(step, clock)
            check_staleness(batch.groups, policy.version, stage.config)
            with rollouts.prefetch(step + 1, clock):
                grade_groups(batch.sampled, stage.config.objective, trainer.seed, step, rollouts.usable_teachers)
                rollouts.record(step, batch.groups)
                policy.refresh_reference(stage.own(step))
                past = counters.grad_norms, counters.flush_norms
                context = StepContext(stage.own(step), stage.lr(step), clock, *past, side)
                queue.add(failed(batch.sampled, stage.config.objective))
                due = rollouts.deferred(queue.due)
                groups = batch.groups + batch.experts
                result = update_policy(policy, groups, stage.config, rollouts.encode_trace, context, due)
                if result.flush_norms:
                    queue.remove_due()
            with clock("sync"):
                sync()

            skipped, norms = result.skipped is not None, (result.grad_norms, result.flush_norms)
            counters.count(step, policy.version, skipped, result.empty, *norms, queue.waiting)
            sampled = batch_metrics(batch.sampled, result.minibatches, stage.config.objective)
            metrics = clock.metrics() | sampled | result.metrics | result.memory
            metrics |= counters.metrics() | watchdog.metrics() | stage.metrics
            if stage.config.rollout.dynamic_sampling:
                metrics["rollout/refilled"] = len(batch.replaced)
            if recipe(stage.config.objective).defers:
                metrics["queue/length"] = len(queue.waiting)
            evaluation = evaluate(step)
            times = {
                "time/save": saver.clock.take(),
                "time/offload": sum(offload.clock.take() for offload in offloads),
            }
            devices = {"devices": layout.world + (engine.devices if engine else 0)}
            monitor.step(step, metrics | {"train/lr": context.lr} | times | devices | evaluation)
            if result.skipped:
                monitor.notice([f"step {step} skipped: {result.skipped}"])
            if counters.skipped_in_a_row > trainer.max_skipped_steps:
                in_a_row = f"{counters.skipped_in_a_row} steps in a row were skipped"
                raise TrainingError(f"{in_a_row}; the last: {result.skipped}")
            asked = stop.agreed() if step < trainer.steps else None
            with phase("checkpoint save"):
                accuracy = evaluation.get("eval/valid/greedy_accuracy")
                saver.after_step(counters, accuracy, rollouts.in_flight, bool(asked))
            tracing.write()
            if asked:
                break
        with phase("checkpoint save"):
            saver.finish(counters)
        tracing.write()
        if asked:
            monitor.notice([f"stopped after step {counters.step} by {asked.name}; the same command resumes from there"])
            return False
        monitor.finish(len(inputs.held_out))
        return True
