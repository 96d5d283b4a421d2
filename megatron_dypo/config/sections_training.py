"""Declare the keys from scored responses to a trained, evaluated and logged model."""

from __future__ import annotations

from typing import Literal

from megatron_dypo.config.section import Section, key


class Mix(Section):
    """The experts' share mu of the loss, by step (objectives/schedule.py); rollouts weigh 1 - mu."""

    warmup: int = key(0, "Steps of the linear rise of mu from 0 to `peak`.", ge=0)
    decay: int = key(200, "Steps of the half-cosine fall of mu to `valley`; 0: at once.", ge=0)
    peak: float = key(0.9, "Value of mu where the decay begins.", ge=0, le=1)
    valley: float = key(0.05, "Value of mu from the end of the decay on.", ge=0, le=1)


class Objective(Section):
    """What is optimised (docs/objective.md)."""

    method: Literal["chord", "dypo", "grpo", "luffy", "ppo", "prime", "relift", "sft", "srft", "switch"] = key(
        "dypo",
        "Recipe: which regime trains which term. `dypo`: the paper's; `grpo`, `sft`: a single term; `ppo`: PPO with a critic; `prime`: a learned process reward; `switch`: a prompt trains on its responses or, if Hard, on a trace (SuperRL, HPT); `luffy`: the trace joins the prompt's group; `srft`: the trace is imitated too, and responses by whether they are right; `relift`: failed prompts wait for an update on their traces; `chord`: adds the rows of `data.experts` with the share of `mix`.",
    )
    gate: Literal["reward", "advantage"] = key(
        "reward",
        "What makes a group Hard: the number of right responses, or (`advantage`) equal rewards throughout.",
    )
    scale: Literal["token", "trajectory"] = key(
        "token", "Unit of all three terms: means over a response's tokens, or sums (the paper's literal form)."
    )
    alpha: float = key(0.5, "Mid: weight of GRPO; GAL has 1 - alpha.", ge=0, le=1)
    beta_gal: float = key(1.0, "GAL's inverse temperature.", gt=0)
    gamma: float = key(1.0, "Weight of SFT on a teacher's trace (of Hard prompts, in recipes with regimes).", ge=0)
    clip_low: float = key(0.2, "GRPO: lower clip distance of the ratio.", ge=0, le=1)
    clip_high: float = key(0.2, "GRPO: upper clip distance of the ratio.", ge=0)
    surrogate: Literal["clip", "cispo", "sapo"] = key(
        "clip",
        "GRPO: how the ratio is bounded. `clip`: PPO's minimum; `cispo`: the clipped ratio, detached, times A logp, so that every token keeps a gradient; `sapo`: the soft 4 / tau sigmoid(tau (ratio - 1)).",
    )
    loss_function: str | None = key(
        None,
        "A loss of your own in place of the surrogate, run unfused: `path/file.py:function` or `package.module:function` (docs/add-an-algorithm.md).",
        path=True,
    )
    sapo_tau_pos: float = key(
        1.0, "SAPO's temperature for positive advantages: larger values damp distant ratios sooner.", gt=0
    )
    sapo_tau_neg: float = key(1.05, "SAPO's temperature for the other advantages.", gt=0)
    kl_coef: float = key(0.0, "GRPO: weight of the k3 estimate of KL(policy || reference).", ge=0)
    entropy_coef: float = key(
        0.0, "Weight of the entropy bonus: the mean entropy of all trained tokens, subtracted from the loss.", ge=0
    )
    hard_max_solved: int = key(0, "Hard if at most N of the k responses are right; -1: no group is Hard.", ge=-1)
    easy_min_solved: int | None = key(
        None, "Easy if at least N of the k responses are right; default: all; k + 1: no group is Easy.", ge=1
    )
    reward_threshold: float = key(0.5, "Smallest reward of a right response.")
    teachers_per_prompt: int = key(
        1, "Hard: teacher traces per prompt, drawn without replacement; their losses are averaged.", ge=1
    )
    aggregation: Literal["scale", "token_mean", "constant"] = key(
        "scale",
        "How GRPO aggregates tokens: as `scale` says; one mean over all Mid tokens of the batch; or sums divided by `aggregation_constant`.",
    )
    aggregation_constant: int | None = key(
        None, "Divisor for `aggregation: constant`; default: `rollout.max_response_tokens`.", ge=1
    )
    gal_length_normalize: bool | None = key(
        None, "GAL's log-ratio as a mean over tokens (true) or a sum (false); default: as `scale` says."
    )
    sft_length_normalize: bool | None = key(
        None, "SFT as a mean over tokens (true) or a sum (false); default: as `scale` says."
    )
    normalize: Literal["all", "active"] = key(
        "all", "Q counts all prompts of the batch, or only those that contribute."
    )
    ratio_base: Literal["old", "reference"] = key(
        "old", "Denominator of GRPO's ratio: the behaviour policy, or the reference (the paper's literal form)."
    )
    ratio_level: Literal["token", "sequence"] = key("token", "GRPO's ratio per token, or one per response.")
    reference: str = key(
        "initial",
        "Frozen reference: `initial` weights, `previous` (at the last rollout), or `every:N` steps.",
        pattern=r"^(initial|previous|every:[1-9][0-9]*)$",
    )
    advantage_std: Literal["population", "sample", "none"] = key(
        "population", "Divisor of the group advantage; `none` is Dr. GRPO's."
    )
    shape: Literal["luffy", "p", "nll", "phi", "sg_p"] | None = key(
        None,
        "Function of a trace token's probability p that its advantage multiplies: `luffy`: p / (p + `shape_gamma`); `p`; `nll`: log p; `phi` and `sg_p`: log p times a detached p (1 - p) or p. Default: the recipe's own.",
    )
    shape_gamma: float = key(
        0.1, "Probability at which the shaped value is one half; less likely tokens weigh more.", gt=0
    )
    demo_aggregation: Literal["scale", "token_mean"] = key(
        "scale", "How SFT aggregates tokens: as `scale` says, or one mean over all trace tokens of the batch."
    )
    mask_truncated: bool = key(
        False,
        "Exclude responses without an end token from loss, KL, entropy and pairs; they still count in their group's baseline (DAPO's overlong filtering, TRL's `mask_truncated_completions`).",
    )
    mix: Mix = key(Mix(), "The experts' share of the loss.")
    queue_size: int = key(
        128,
        "Failed prompts to collect before an update on their teachers' traces, the last of its step; at most one such update per step.",
        ge=1,
    )
    queue_order: Literal["oldest", "newest"] = key(
        "oldest",
        "Which queued prompts train first. With `newest` (ReLIFT's code) old ones may wait forever.",
    )
    process_beta: float = key(
        0.05, "PRIME: scale of a response's summed process rewards, giving the logit of being right.", gt=0
    )
    process_baseline: Literal["code", "paper"] = key(
        "code",
        "PRIME: baseline of a token's process reward: the mean of the other responses' means (`paper`), or that of PRIME's published code (`code`).",
    )
    gae_gamma: float = key(1.0, "PPO: discount per token of later rewards.", ge=0, le=1)
    gae_lambda: float = key(
        1.0,
        "PPO: lambda of GAE: 0 bootstraps advantages from the next token's value, 1 uses the rewards to the response's end.",
        ge=0,
        le=1,
    )
    kl_in_reward: float = key(
        0.0,
        "PPO: coefficient of the per-token KL penalty, log(old policy / reference), subtracted from the rewards.",
        ge=0,
    )
    value_clip: float | None = key(
        0.2,
        "PPO: clip distance of a value from its old value in the critic's loss; null: no clipping.",
        gt=0,
    )
    tilt_demo: float = key(
        -1.0, "Weight of a trace's tokens: exp(`tilt_demo` H), with H the policy's entropy in nats, detached."
    )
    tilt_right: float = key(1.0, "As `tilt_demo`, for tokens of right responses.")
    weight_right: float = key(0.1, "Weight of -log p in right responses; in wrong ones it is -1, without tilt.", ge=0)
    tilt_level: Literal["token", "sequence"] = key(
        "token",
        "H is each token's entropy, or the mean over its sequence (HPT's form), which costs a pass over the traces.",
    )
    updates_per_rollout: int = key(1, "Optimizer updates per rollout, each on a mini-batch of whole prompts.", ge=1)
    refresh_pair_weights: bool = key(True, "With several updates, recompute the trajectory coefficients before each.")


class Adam(Section):
    """Adam's settings and its learning rate's schedule."""

    lr: float = key(1e-6, "Peak learning rate.", gt=0)
    min_lr: float = key(0.0, "Final learning rate of a decaying schedule.", ge=0)
    schedule: Literal["constant", "linear", "cosine"] = key("constant", "Decay after the warm-up.")
    schedule_steps: int | None = key(
        None, "Steps over which the schedule decays; needed by `linear` and `cosine`.", ge=1
    )
    warmup_steps: int = key(0, "Steps of linear warm-up.", ge=0)
    betas: list[float] = key([0.9, 0.95], "Adam's betas.", min_length=2, max_length=2)
    eps: float = key(1e-8, "Adam's epsilon.", gt=0)
    weight_decay: float = key(0.0, "Decoupled weight decay (norms and biases excepted).", ge=0)
    clip_grad: float = key(1.0, "Largest global gradient norm; 0 is off.", ge=0)


class Optimizer(Adam):
    """Adam, as in Megatron-Core."""

    distributed: bool = key(
        False,
        "Shard the optimizer state over data-parallel ranks; may be switched on resume.",
        resumable=True,
    )
    overlap_grad_reduce: bool = key(
        False, "Reduce gradients over data-parallel ranks during the backward pass.", resumable=True
    )


class Side(Adam):
    """The optimizer of a recipe's second model (`ppo`'s critic, `prime`), which has the policy's layout."""

    updates: int = key(1, "PPO: critic updates per step, each on a mini-batch of whole prompts.", ge=1)


class Trainer(Section):
    """The loop."""

    steps: int = key(..., "Training steps (rollouts).", ge=1, resumable=True)
    seed: int = key(0, "Seed of initial weights, sampling and teacher draws.", ge=0, lt=2**63)
    deterministic: bool = key(
        False,
        "CUDA: use deterministic kernels only, in training and in vLLM, so that a run repeats bit for bit on the same machine and layout; slower. CPU runs repeat anyway.",
        resumable=True,
    )
    offload: bool = key(
        False,
        "Policy and rollout engine take turns on the GPU, so that each may use most of its memory: weights, gradients and optimizer state move to host memory while the engine samples, and the engine sleeps while the policy trains. No effect on CPU.",
        resumable=True,
    )
    eval_every: int = key(
        0,
        "Evaluate greedily on `data.valid` every N steps, and before and after training; 0: never.",
        ge=0,
        resumable=True,
    )
    save_every: int = key(0, "Save a checkpoint every N steps, and at the end; 0: never.", ge=0, resumable=True)
    save_blocking: bool = key(
        False,
        "Pause training while a checkpoint is written, in pieces of at most 1 GB, instead of taking a snapshot in host memory.",
        resumable=True,
    )
    keep_checkpoints: int = key(2, "Number of newest checkpoints to keep.", ge=1, resumable=True)
    max_skipped_steps: int = key(
        5, "Stop the run after N consecutive skipped steps (not finite, or a spike).", ge=1, resumable=True
    )
    spike_factor: float = key(
        0.0,
        "Skip an update whose gradient norm exceeds N times the median of the last 50 applied ones (at least 20); 0: never.",
        ge=0,
        resumable=True,
    )
    max_grad_norm_to_apply: float = key(
        0.0,
        "Skip an update whose gradient norm, before clipping, exceeds this (HPT's bound, as an absolute number); 0: never.",
        ge=0,
        resumable=True,
    )
    run_dir: str = key(..., "Run folder.", path=True, resumable=True)


class Evaluation(Section):
    """The suites that `evaluate` and `trainer.eval_every` run."""

    suites: list[str] = key(
        [],
        "Suites for `trainer.eval_every`: `aime24`, `aime25`, `amc23`, `math500`, `minerva`, `arc_c`, `gpqa_diamond`, `gsm8k`, or your own files (`[NAME=]FILE[?samples=N&extract=number]`).",
        resumable=True,
    )
    data: str | None = key(
        None,
        "Folder of the suites' files; default: the Hugging Face hub (through `datasets`).",
        path=True,
        resumable=True,
    )
    samples: int | None = key(
        None, "Responses per problem; default: each suite's own (32 for AIME and AMC, else 1).", ge=1, resumable=True
    )
    temperature: float = key(0.6, "Sampling temperature; 0 is greedy.", ge=0, resumable=True)
    top_p: float = key(1.0, "Nucleus sampling.", gt=0, le=1, resumable=True)
    max_response_tokens: int | None = key(
        None, "Longest response; default: `rollout.max_response_tokens`.", ge=1, resumable=True
    )
    extract: Literal["boxed", "marked", "number"] | None = key(
        None, "As `reward.extract`; default: each suite's own (`number` for GSM8K, else `boxed`).", resumable=True
    )
    system: str | None = key(
        None, "System message before each problem; default: the file's own, or none.", resumable=True
    )
    instruction: str | None = key(
        "Please reason step by step, and put your final answer within \\boxed{}.",
        "Text after each problem and a blank line; null: none.",
        resumable=True,
    )
    shuffle_options: bool = key(True, "Multiple choice: shuffle the options by `seed`.", resumable=True)
    limit: int | None = key(None, "Evaluate the first N problems of each suite; default: all.", ge=1, resumable=True)
    seed: int = key(0, "Seed of samples, shuffles and confidence intervals.", ge=0, lt=2**63, resumable=True)


class Logging(Section):
    """Where metrics are logged."""

    wandb: Literal["off", "offline", "online"] = key("off", "Weights & Biases.", resumable=True)
    wandb_project: str = key("megatron_dypo", "Weights & Biases project.", resumable=True)
    tensorboard: bool = key(False, "TensorBoard event files in the run folder.", resumable=True)
    trace: bool = key(
        False,
        "Write `trace.json`: when each rank was in which phase, micro-batch and sync, and each rollout server at work; "
        "ui.perfetto.dev opens it.",
        resumable=True,
    )
