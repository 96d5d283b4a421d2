"""The report's charts: one table from metric keys to panels, in reading order.

A panel with a ``family`` takes every metric whose name starts with it: a new term of a recipe needs no edit here.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Curve:
    """One metric of a panel, with its ``label`` (may hold markup characters) and its colour class ``color``."""

    key: str
    label: str
    color: str


@dataclass(frozen=True)
class Panel:
    """One chart: ``layers`` are stacked areas, ``lines`` go on top. ``unit`` names the vertical axis.

    ``family``: prefix of further metrics that become curves of this panel: layers if it has layers.
    """

    title: str
    note: str
    unit: str
    lines: tuple[Curve, ...] = ()
    layers: tuple[Curve, ...] = ()
    percent: bool = False
    log: bool = False
    band: bool = False
    points: bool = False
    exact: bool = False
    count: bool = False
    relative: bool = False  # layers as fractions of their sum
    quiet: bool = False  # curves that are 0 throughout are left out, and so is a panel without others
    family: str = ""

    @property
    def curves(self) -> tuple[Curve, ...]:
        return (*self.layers, *self.lines)


PALETTE = ("c1", "c2", "c3", "c4", "c5", "c6")  # Okabe and Ito's, distinguishable with colour blindness
EVALUATION = "Held-out evaluation"
RUN_COLORS = ("c1", "c2", "c3", "c4", "c5", "ink", "c7", "c8", "c6", "c9", "c10", "c11")  # of the compared runs

LEARNING = (
    Panel(
        "Regimes",
        "Share of the batch's prompts by the outcome of their k responses. Line: trained Hard / trained prompts.",
        "share of prompts",
        layers=(
            Curve("dypo/easy_frac", "easy", "easy"),
            Curve("dypo/mid_frac", "mid", "mid"),
            Curve("dypo/hard_frac", "hard", "hard"),
        ),
        lines=(Curve("dypo/offline_ratio", "offline ratio", "ink"),),
        percent=True,
    ),
    Panel("Reward", "Mean over all sampled responses.", "mean reward", (Curve("reward/mean", "reward", "c1"),)),
)

OPTIMISATION = (
    Panel(
        "Losses",
        "Each of the recipe's terms, unweighted, and the weighted total.",
        "loss",
        (
            Curve("loss/total", "total", "ink"),
            Curve("loss/grpo", "GRPO", "c1"),
            Curve("loss/gal", "GAL", "c4"),
            Curve("loss/sft", "SFT", "c2"),
            Curve("loss/kl", "KL", "c6"),
            Curve("loss/aux", "load balance", "c5"),
        ),
        family="loss/",
        quiet=True,
    ),
    Panel(
        "Gradient shares",
        "Each term's part of the sum of |dL/dlogp|: a term near 0% does not train.",
        "share of gradient",
        percent=True,
        relative=True,
        layers=(
            Curve("grad_share/grpo", "GRPO", "c1"),
            Curve("grad_share/gal", "GAL", "c4"),
            Curve("grad_share/sft", "SFT", "c2"),
        ),
        family="grad_share/",
        quiet=True,
    ),
    Panel(
        "Trained tokens",
        "Sources of the trained tokens: responses, traces of the step's prompts, the expert data set.",
        "share of tokens",
        percent=True,
        layers=(
            Curve("source_share/rollout", "responses", "c1"),
            Curve("source_share/teacher", "traces", "c2"),
            Curve("source_share/expert", "experts", "c5"),
        ),
        family="source_share/",
        quiet=True,
    ),
    Panel(
        "Schedules",
        "Values that the recipe changes over steps, such as a term's share of the loss.",
        "value",
        family="objective/",
        exact=True,
    ),
    Panel(
        "Queue",
        "Prompts waiting for an update of their own.",
        "prompts",
        family="queue/",
        exact=True,
        count=True,
    ),
    Panel(
        "Updates of the queue",
        "Loss and gradient norm of those prompts' updates.",
        "loss, global norm",
        family="flush/",
        points=True,
    ),
    Panel(
        "Second model", "Its loss, gradient norm, and accuracy or values.", "loss, share, global norm", family="side/"
    ),
    Panel("Stage", "The run's current stage, counted from 0.", "stage", family="stage", exact=True, count=True),
    Panel(
        "Gradient norm",
        "Before clipping. Rolling mean and one standard deviation on either side.",
        "global norm",
        (Curve("train/grad_norm", "gradient norm", "c1"),),
        band=True,
    ),
    Panel(
        "Policy entropy",
        "A fall to 0: no exploration is left. A rise to several nats: random answers. Trained: over GRPO's tokens.",
        "nats per token",
        (Curve("policy/entropy", "trained", "c3"), Curve("rollout/entropy", "sampled", "c1")),
    ),
    Panel(
        "Clip fraction",
        "Tokens whose GRPO ratio left the clip range.",
        "share of tokens",
        (Curve("policy/clip_frac", "clipped", "c5"),),
        percent=True,
    ),
    Panel(
        "GAL pairs",
        "eta: mean squared pair weight (discrimination difficulty). Saturated: weight below 0.01 or above 0.99.",
        "share, mean",
        (Curve("gal/eta", "eta", "c4"), Curve("gal/saturated_frac", "saturated", "c2")),
    ),
    Panel(
        "GAL spread",
        "Spread of the log-ratio difference between right and wrong responses.",
        "nats",
        (Curve("gal/spread", "spread", "c4"),),
    ),
    Panel(
        "Expert load",
        "Tokens of a layer's busiest and idlest expert, mean over layers; 1 is an even share.",
        "even shares",
        (Curve("moe/load_max", "busiest", "c2"), Curve("moe/load_min", "idlest", "c1")),
    ),
    Panel(
        "Rerouted",
        "Replayed choices of experts that the router would not have made.",
        "share of choices",
        (Curve("moe/rerouted_frac", "rerouted", "c5"),),
        percent=True,
    ),
    Panel("Learning rate", "", "learning rate", (Curve("train/lr", "learning rate", "c3"),), exact=True),
    Panel(
        "Left out",
        "Steps skipped (not finite, a spike) or empty (nothing to train on); Hard prompts without a teacher's trace.",
        "count",
        (
            Curve("train/skipped_steps", "skipped steps", "c2"),
            Curve("train/empty_steps", "empty steps", "c1"),
            Curve("dypo/hard_without_teacher", "Hard, no teacher", "c5"),
        ),
        exact=True,
        count=True,
    ),
    Panel("Warnings", "Total so far.", "count", (Curve("train/warnings", "warnings", "c2"),), exact=True, count=True),
)

ROLLOUT = (
    Panel(
        "Trainer / rollout mismatch",
        "|log-prob| difference between trainer and engine on the sampled tokens, and the KL estimate.",
        "nats per token, log scale",
        (
            Curve("rollout/mismatch_max", "max", "c2"),
            Curve("rollout/mismatch_mean", "mean", "c1"),
            Curve("rollout/mismatch_kl", "KL", "c6"),
        ),
        log=True,
    ),
    Panel(
        "Mismatch by size",
        "Sampled tokens by |log-prob| difference between trainer and engine, in nats.",
        "share of tokens",
        layers=(
            Curve("rollout/mismatch_share/0", "< 1e-6", "s1"),
            Curve("rollout/mismatch_share/1e-06", "1e-6 – 1e-5", "s2"),
            Curve("rollout/mismatch_share/1e-05", "1e-5 – 1e-4", "s3"),
            Curve("rollout/mismatch_share/0.0001", "1e-4 – 1e-3", "s4"),
            Curve("rollout/mismatch_share/0.001", "1e-3 – 0.01", "s5"),
            Curve("rollout/mismatch_share/0.01", "0.01 – 0.1", "s6"),
            Curve("rollout/mismatch_share/0.1", "0.1 – 1", "s7"),
            Curve("rollout/mismatch_share/1", "≥ 1", "s8"),
        ),
        percent=True,
    ),
    Panel(
        "Staleness",
        "Optimizer updates between the weights that sampled a response and those that train on it.",
        "updates",
        (Curve("rollout/staleness_max", "max", "c2"), Curve("rollout/staleness_mean", "mean", "c1")),
        exact=True,
        count=True,
        quiet=True,
    ),
    Panel(
        "Rollout correction",
        "Tokens whose weight in GRPO is capped, or 0 (masked).",
        "share of tokens",
        (
            Curve("rollout/corrected_frac", "corrected", "c5"),
            Curve("rollout/corrected_low_frac", "below the floor", "c2"),
        ),
        percent=True,
    ),
    Panel(
        "Response length",
        "Mean over all sampled responses, end token included.",
        "tokens",
        (Curve("rollout/response_tokens", "response", "c1"),),
        count=True,
    ),
    Panel(
        "Truncated responses",
        "Cut off at the longest allowed response. Masked: left out of the loss (objective.mask_truncated).",
        "share of responses",
        (Curve("rollout/truncated_frac", "truncated", "c2"), Curve("rollout/masked_frac", "masked", "c1")),
        percent=True,
    ),
    Panel(
        "Responses not scored",
        "The reward function failed on them; they count as wrong.",
        "responses per step",
        (Curve("reward/failed", "not scored", "c2"),),
        exact=True,
        count=True,
        quiet=True,
    ),
    Panel(
        "Refilled prompts",
        "Sampled in place of prompts whose group would train nothing.",
        "prompts per step",
        (Curve("rollout/refilled", "refilled", "c3"),),
        exact=True,
        count=True,
    ),
)

SPEED = (
    Panel(
        "Time per phase",
        "Line: the whole step; below the areas if sampling runs alongside training.",
        "seconds per step",
        layers=(
            Curve("time/rollout", "rollout", "c1"),
            Curve("time/reward", "reward", "c6"),
            Curve("time/logprob", "log-prob", "c3"),
            Curve("time/update", "update", "c5"),
            Curve("time/sync", "sync", "c4"),
            Curve("time/offload", "offload", "c2"),
            Curve("time/save", "save", "s6"),
        ),
        lines=(Curve("time/step", "step", "ink"),),
    ),
    Panel(
        "Waiting for rollouts",
        "Time that training waited for the batch sampled alongside it.",
        "seconds per step",
        (Curve("time/rollout_wait", "wait", "c1"),),
    ),
    Panel(
        "Peak memory",
        "Maximum over processes: host memory since its start, device memory in the step.",
        "GiB",
        (Curve("perf/host_memory_gib", "host", "c1"), Curve("perf/device_memory_gib", "device", "c2")),
    ),
    Panel(
        "Rollout imbalance",
        "The slowest rank's rollouts and rewards over the mean of all ranks; at 1 no rank waits.",
        "slowest / mean seconds",
        (Curve("perf/rollout_imbalance", "imbalance", "c2"),),
    ),
    Panel(
        "Slowest rank",
        "If it is always the same one, check its machine.",
        "rank",
        (Curve("perf/straggler_rank", "slowest rank", "c4"),),
        points=True,
        exact=True,
        count=True,
    ),
    Panel(
        "Missed heartbeats",
        "Longest time without a heartbeat from any rank; parallel.heartbeat_timeout ends the job.",
        "seconds",
        (Curve("perf/heartbeat_gap", "silence", "c6"),),
        exact=True,
    ),
    Panel("Throughput", "", "tokens per second", (Curve("perf/tokens_per_second", "tokens/s", "c3"),)),
    Panel("Model FLOP utilisation", "", "share of peak", (Curve("perf/mfu", "MFU", "c1"),), percent=True),
)


TABLE = {"Learning": LEARNING, "Optimisation": OPTIMISATION, "Rollout": ROLLOUT, "Speed": SPEED}
