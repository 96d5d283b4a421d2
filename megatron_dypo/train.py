"""The training loop: roll out, reward, grade, update, sync, evaluate, save. One ``step`` is one rollout.

With ``rollout.async_rollout`` the next step's batch is sampled beside grade and update, and complete before the
sync: no response is sampled across an update.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from megatron_dypo.batching.grade import grade_groups
from megatron_dypo.checkpoint.checkpoint import load_newest
from megatron_dypo.checkpoint.counters import Counters
from megatron_dypo.checkpoint.folders import step_folder
from megatron_dypo.checkpoint.saver import Saver
from megatron_dypo.config.checks import warnings
from megatron_dypo.config.schema import Config
from megatron_dypo.convert.finite import require_finite
from megatron_dypo.convert.hf_folder import folder_weights
from megatron_dypo.convert.stream import random_weights
from megatron_dypo.errors import TrainingError
from megatron_dypo.evaluate.inside import evaluate_now
from megatron_dypo.monitor.monitor import Monitor
from megatron_dypo.plan.reference import place_reference
from megatron_dypo.policy.policy import Policy
from megatron_dypo.policy.probe import probe
from megatron_dypo.policy.schedule import learning_rate
from megatron_dypo.policy.shape import hf_folder
from megatron_dypo.preflight import Inputs, agree_on_day, check_agreement
from megatron_dypo.reward import build_reward
from megatron_dypo.rollout.engine import Engine, build_engine, engine_name
from megatron_dypo.rollout.source import RolloutSource
from megatron_dypo.rollout.staleness import check_staleness
from megatron_dypo.runtime import deterministic, distributed
from megatron_dypo.runtime.addresses import all_here
from megatron_dypo.runtime.distributed import Layout
from megatron_dypo.runtime.failure import begin_step, phase
from megatron_dypo.runtime.memory import device_bytes
from megatron_dypo.runtime.stop_request import StopRequest
from megatron_dypo.runtime.stopwatch import Stopwatch
from megatron_dypo.runtime.watchdog import Watchdog
from megatron_dypo.sync.sync import sync_weights
from megatron_dypo.update import update_policy, warm_up
from megatron_dypo.update.metrics import batch_metrics

log = logging.getLogger(__name__)


def train(config: Config, inputs: Inputs, start_engine: Callable[..., Engine | None] = build_engine) -> bool:
    """Run, or resume from the run folder's newest complete checkpoint, until ``trainer.steps``.

    ``start_engine``: called as ``build_engine`` is; one that is running already may be handed over.
    Returns False where a signal stopped it before (``runtime/stop_request.py``). Raises TrainingError when more than
    ``trainer.max_skipped_steps`` steps in a row were skipped.
    """
    if config.trainer.deterministic:
        deterministic.enable()
    with phase("joining the job"):
        layout = distributed.init(config.parallel, reaches_out=not all_here(config.rollout.servers))
    with Watchdog(config.parallel) as watchdog:
        return _train(config, inputs, layout, watchdog, start_engine)


def _place_reference(config: Config, inputs: Inputs, layout: Layout) -> str:
    """Settle ``model.reference_on``, the same on every rank; returns a line about it, empty where none is kept."""
    memory = min(filter(None, distributed.all_gather_objects(device_bytes())), default=None)
    engine = 0.0  # bytes of the device that it has for good
    if memory and not config.trainer.offload:
        held = {"vllm": config.rollout.engine_memory * memory, "transformers": 4.0 * inputs.shape.parameters}
        engine = held.get(engine_name(config), 0.0)
    config.model.reference_on, said = place_reference(config, inputs.shape, layout, memory, engine)
    return said


def _train(
    config: Config, inputs: Inputs, layout: Layout, watchdog: Watchdog, start_engine: Callable[..., Engine | None]
) -> bool:
    trainer, run_dir, tokenizer = config.trainer, Path(config.trainer.run_dir), inputs.tokenizer
    check_agreement(config, inputs)
    agree_on_day(config, inputs)
    log.info("%s; %s parameters; starting %s", layout, f"{inputs.shape.parameters:,}", engine_name(config))
    with phase("rollout engine start"), deterministic.trainer_kept():
        folder = run_dir / "engine" / f"rank_{layout.rank}"
        engine = start_engine(config, inputs.shape, tokenizer, folder, layout)
        distributed.claim_device()  # an engine may have chosen another
        if engine and trainer.offload:
            engine.sleep(keep_weights=False)
    with phase("policy start"):
        placed = _place_reference(config, inputs, layout)
        hf = config.model.hf
        read = folder_weights(hf_folder(hf)) if hf else random_weights(inputs.shape, trainer.seed)
        policy = Policy(config, inputs.shape, layout, read)
        if hf:
            require_finite(policy.parameters, inputs.shape, layout, f"model.hf: {hf}")
    if hf and (config.model.probe == "on" or (config.model.probe == "auto" and not inputs.checkpoints)):
        with phase("log-prob probe"):
            probe(policy, Path(hf_folder(hf)), tokenizer, config.parallel.timeout)
    counters = Counters()
    if inputs.checkpoints:
        with phase("checkpoint load"):
            counters = load_newest(run_dir, inputs.checkpoints, policy)
            require_finite(policy.parameters, inputs.shape, layout, f"trainer.run_dir: {run_dir}: step {counters.step}")
    if torch.cuda.is_available():  # nothing is compiled on the CPU
        with phase("warm-up"):
            log.info("compiled and warmed up in %.1f s, before the first step", warm_up(policy, config))
    saver = Saver(config, policy)

    reward = build_reward(config.reward)
    rollouts = RolloutSource(config, inputs.train, tokenizer, engine, reward, layout, inputs.shape)
    if counters.step:
        rollouts.resume(step_folder(run_dir, counters.step))

    def sync() -> None:
        if engine:
            sync_weights(policy, engine, config.rollout.sync_timeout)

    @contextmanager
    def engines_turn(keep_weights: bool) -> Iterator[None]:
        """The engine samples; with ``trainer.offload`` it has the device to itself, and gives it back at the end."""
        if not trainer.offload:
            yield
            return
        with policy.offload.on_host():
            yield
            if engine:
                engine.sleep(keep_weights)

    def evaluate(step: int) -> dict:
        due = trainer.eval_every and (step % trainer.eval_every == 0 or step == trainer.steps)
        if not engine or not due:
            return {}
        with engines_turn(keep_weights=True), phase("evaluation"):
            return evaluate_now(inputs, engine, config, reward, layout)

    with Monitor(config, layout, counters.step) as monitor, reward, StopRequest() as stop, watchdog.reporting():
        monitor.notice(warnings(config))
        if placed:
            monitor.say(placed)
        sync()
        if counters.step == 0 and (before := evaluate(0)):
            monitor.write(0, before)

        asked = None
        for step in range(counters.step + 1, trainer.steps + 1):
            begin_step(step)
            clock = Stopwatch()
            with engines_turn(keep_weights=False):  # a sync comes before the next turn
                batch = rollouts.batch(step, clock)
            check_staleness(batch.groups, policy.version, config)
            rollouts.begin_next(step)
            grade_groups(batch.sampled, config.objective, trainer.seed, step, rollouts.usable_teachers)
            rollouts.record(step, batch.groups)
            policy.refresh_reference(step)
            lr = learning_rate(step, config.optimizer)
            outcome = update_policy(policy, batch.groups, config, rollouts.encode_trace, lr, clock, counters.norms)
            rollouts.finish_next(clock)
            with clock("sync"):
                sync()

            counters.count(step, policy.version, outcome.skipped is not None, outcome.empty, outcome.norms)
            metrics = clock.metrics() | batch_metrics(batch.sampled, outcome.works) | outcome.metrics | outcome.memory
            metrics |= counters.metrics() | watchdog.metrics()
            if config.rollout.dynamic_sampling:
                metrics["rollout/refilled"] = len(batch.replaced)
            evaluation = evaluate(step)
            times = {"time/save": saver.take_seconds(), "time/offload": policy.offload.take_seconds()}
            monitor.step(step, metrics | {"train/lr": lr} | times | evaluation)
            if outcome.skipped:
                monitor.notice([f"step {step} skipped: {outcome.skipped}"])
            if counters.skipped_in_a_row > trainer.max_skipped_steps:
                in_a_row = f"{counters.skipped_in_a_row} steps in a row were skipped"
                raise TrainingError(f"{in_a_row}; the last: {outcome.skipped}")
            asked = stop.agreed() if step < trainer.steps else None
            with phase("checkpoint save"):
                in_flight = rollouts.in_flight.sampled if rollouts.in_flight else ()
                saver.after_step(counters, evaluation.get("eval/valid/greedy_accuracy"), in_flight, bool(asked))
            if asked:
                break
        with phase("checkpoint save"):
            saver.finish(counters)
        if asked:
            monitor.notice([f"stopped after step {counters.step} by {asked.name}; the same command goes on from there"])
            return False
        monitor.finish(len(inputs.held_out))
        return True
