"""The training loop: roll out, reward, grade, update, sync, evaluate, save. One ``step`` is one rollout."""

from __future__ import annotations

import logging
from pathlib import Path

from megatron_dypo.checkpoint.folders import step_folder
from megatron_dypo.config.checks import warnings
from megatron_dypo.config.load import fingerprint
from megatron_dypo.config.schema import Config
from megatron_dypo.errors import TrainingError
from megatron_dypo.monitor.monitor import Monitor
from megatron_dypo.monitor.stopwatch import Stopwatch
from megatron_dypo.preflight import prepare
from megatron_dypo.runtime import distributed
from megatron_dypo.runtime.distributed import phase

log = logging.getLogger(__name__)


def train(config: Config, source: str = "config") -> None:
    """Run, or resume from the run folder's newest complete checkpoint, until ``trainer.steps``.

    Raises UserError before anything is built when the configuration or input is unusable, TrainingError when more than
    ``trainer.max_skipped_steps`` steps in a row were not finite.
    """
    inputs = prepare(config, source)
    layout = distributed.init(config.parallel.tensor, config.parallel.pipeline, config.parallel.timeout)

    # Imported late: megatron-core must find the CPU shim in force.
    from megatron_dypo.checkpoint import checkpoint
    from megatron_dypo.convert.hf_folder import folder_weights
    from megatron_dypo.convert.stream import random_weights
    from megatron_dypo.evaluate.greedy import greedy_accuracy
    from megatron_dypo.monitor.batch_metrics import batch_metrics
    from megatron_dypo.objectives.coefficients import needs_reference
    from megatron_dypo.policy.policy import Policy
    from megatron_dypo.policy.schedule import learning_rate
    from megatron_dypo.policy.shape import hf_folder
    from megatron_dypo.reward import MathReward
    from megatron_dypo.rollout.collect import encode_prompts
    from megatron_dypo.rollout.engine import build_engine
    from megatron_dypo.rollout.source import RolloutSource
    from megatron_dypo.sync.sync import sync_weights
    from megatron_dypo.update import logprob_passes, make_work, run_updates

    run_dir, trainer, tokenizer, shape = Path(config.trainer.run_dir), config.trainer, inputs.tokenizer, inputs.shape
    with phase("rollout engine start"):
        engine = build_engine(config, shape, tokenizer.eos_id, run_dir / "engine" / f"rank_{layout.rank}")
    read = folder_weights(hf_folder(config.model.hf)) if config.model.hf else random_weights(shape, trainer.seed)
    policy = Policy(config, shape, layout, read)
    refresh = config.objective.reference.partition("every:")[2]
    if needs_reference(config.objective) and config.objective.reference != "previous":
        policy.keep_reference()
    counters = checkpoint.Counters()
    if inputs.resume_step:
        with phase("checkpoint load"):
            counters = checkpoint.load(step_folder(run_dir, inputs.resume_step), policy)

    reward = MathReward()
    rollouts = RolloutSource(config, inputs.train, tokenizer, engine, reward, layout, shape.max_position)
    held_out = encode_prompts(inputs.valid, tokenizer, config.data.max_prompt_tokens)

    def evaluate() -> dict:
        return greedy_accuracy(held_out, engine, config, tokenizer, reward, layout)

    with Monitor(config, layout, counters.step) as monitor, reward:
        monitor.notice(warnings(config))
        if engine:
            sync_weights(policy, engine, config.rollout.sync_timeout)
        evaluating = engine is not None and trainer.eval_every > 0
        if evaluating and counters.step == 0:
            with phase("evaluation"):
                monitor.write(0, evaluate())

        for step in range(counters.step + 1, trainer.steps + 1):
            clock = Stopwatch()
            groups = rollouts.batch(step, policy.version, clock)
            if policy.reference is not None and refresh and (step - 1) % int(refresh) == 0:
                policy.keep_reference()
            works = make_work(policy, groups, config, rollouts.encode_trace)
            with clock("logprob"), phase("log-prob passes"):
                mismatch, offender = logprob_passes(policy, works, config)
            lr = learning_rate(step, config.optimizer)
            with clock("update"), phase("update"):
                outcome = run_updates(policy, works, config, lr) if offender is None else None
            skipped = offender or outcome.skipped
            counters.step, counters.weight_version = step, policy.version
            counters.empty_steps += bool(outcome and outcome.empty)
            counters.skipped_steps += bool(skipped)
            counters.skipped_in_a_row = counters.skipped_in_a_row + 1 if skipped else 0
            if engine:
                with clock("sync"), phase("weight sync"):
                    sync_weights(policy, engine, config.rollout.sync_timeout)

            metrics = batch_metrics(groups, works, config) | mismatch | (outcome.metrics if outcome else {})
            metrics |= {
                "train/lr": lr,
                "train/skipped_steps": counters.skipped_steps,
                "train/empty_steps": counters.empty_steps,
            }
            last = step == trainer.steps
            if evaluating and (step % trainer.eval_every == 0 or last):
                with phase("evaluation"):
                    metrics |= evaluate()
            monitor.step(step, metrics, clock)
            if skipped:
                log.warning("step %d skipped: %s", step, skipped)
                if counters.skipped_in_a_row > trainer.max_skipped_steps:
                    raise TrainingError(
                        f"{counters.skipped_in_a_row} steps in a row were not finite; the last: {skipped}"
                    )
            if trainer.save_every and (step % trainer.save_every == 0 or last):
                with phase("checkpoint save"):
                    checkpoint.save(run_dir, policy, counters, fingerprint(config), trainer.keep_checkpoints)
        monitor.finish(len(held_out))
