"""Every configuration key: type, default, bounds and documentation, in one place.

``key(default, doc)`` declares a key. ``resumable=True`` marks those that may change when a run is resumed (layout,
logging, paths, number of steps, engine, micro-batch budget); all others make up the run's fingerprint. ``path=True``
marks those in which `~` and `$VARIABLE` stand for what they stand for in a shell.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

YEAR = 31_536_000  # seconds; what a deadline may be at most, so that every clock takes it


def key(default: Any = ..., doc: str = "", *, resumable: bool = False, path: bool = False, **bounds: Any) -> Any:
    return Field(default, description=doc, json_schema_extra={"resumable": resumable, "path": path}, **bounds)


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, validate_default=True, allow_inf_nan=False)


class Shape(Section):
    """Overrides of the model's shape; unset keys come from `model.hf` or `model.preset`."""

    family: Literal["llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen2_moe", "qwen3_moe"] | None = key(
        None, "Architecture family."
    )
    num_layers: int | None = key(None, "Transformer layers.", ge=1, le=10_000)
    hidden_size: int | None = key(None, "Width of the residual stream.", ge=1, lt=2**31)
    ffn_hidden_size: int | None = key(None, "Width of the gated MLP, or of each expert's.", ge=1, lt=2**31)
    num_attention_heads: int | None = key(None, "Query heads.", ge=1, lt=2**31)
    num_query_groups: int | None = key(None, "Key/value heads (grouped-query attention).", ge=1, lt=2**31)
    head_dim: int | None = key(None, "Width of one attention head.", ge=2, lt=2**31)
    vocab_size: int | None = key(
        None, "Vocabulary size before padding; must hold every id of the tokenizer.", ge=1, lt=2**31
    )
    max_position: int | None = key(None, "Longest sequence, in tokens.", ge=2, lt=2**31)
    rope_base: float | None = key(None, "RoPE base.", gt=0)
    norm_eps: float | None = key(None, "RMSNorm epsilon.", gt=0)
    tied_embeddings: bool | None = key(None, "Share the input embedding with the output head.")
    init_std: float | None = key(None, "Standard deviation of the random initial weights.", gt=0)
    num_experts: int | None = key(None, "Experts of each layer (families with a mixture of experts).", ge=1, lt=2**15)
    router_topk: int | None = key(None, "Experts that a token goes through.", ge=1, lt=2**15)
    norm_topk_prob: bool | None = key(None, "The weights of a token's experts sum to 1.")
    shared_expert_ffn_hidden_size: int | None = key(
        None, "Width of the experts that all tokens go through (`qwen2_moe`).", ge=1, lt=2**31
    )


class Model(Section):
    """The policy network."""

    hf: str | None = key(None, "Hugging Face folder or hub name to start from. Give this or `preset`.", path=True)
    preset: str | None = key(
        None, "Built-in shape with random initial weights (`tiny`, `tiny-moe`). Give this or `hf`."
    )
    shape: Shape = key(Shape(), "Overrides of single shape values.")
    tokenizer: str | None = key(
        None, "Tokenizer folder; default: `model.hf`, or the built-in arithmetic tokenizer for a preset.", path=True
    )
    dtype: Literal["auto", "fp32", "bf16"] = key("auto", "Training dtype; `auto` is bf16 on CUDA and fp32 on CPU.")
    probe: Literal["auto", "on", "off"] = key(
        "auto",
        "Compare the log-probs of a short text with transformers' on rank 0 after `model.hf` is loaded: `auto` at a fresh start, where the folder fits into a quarter of the free host memory, for a minute at most.",
        resumable=True,
    )
    attention_backend: Literal["auto", "sdpa", "flash", "te"] = key(
        "auto",
        "Core attention: torch's SDPA, torch's variable-length flash attention (CUDA), or Transformer Engine's (with `layer_spec: te`); `auto` is the last of these that this machine has.",
        resumable=True,
    )
    layer_spec: Literal["auto", "local", "te"] = key(
        "auto",
        "Megatron-Core layer spec: `local` needs neither Transformer Engine nor Apex; `auto` is `te` on CUDA where Transformer Engine is installed.",
        resumable=True,
    )
    recompute: Literal["none", "selective", "full"] = key(
        "none", "Activations computed again in the backward pass: `selective` is the MLPs', `full` all.", resumable=True
    )
    reference_on: Literal["auto", "device", "host"] = key(
        "auto",
        "Where the frozen reference is: on the device, where its pass costs nothing but its memory, or in (pinned) host memory; `auto` is the device where it fits there beside the planned peak, and not with `trainer.offload`.",
        resumable=True,
    )


class PolicyOptions(Section):
    """How a mixture of experts is trained; a dense policy asks for nothing here."""

    routing_replay: Literal["off", "old", "rollout"] = key(
        "off",
        "Who chooses a token's experts in training: the router as it is (`off`), as it was in the pass of old log-probs (`old`), or the rollout engine (`rollout`).",
    )
    aux_loss: float = key(
        0.0,
        "Coefficient of the load-balancing loss, over a whole mini-batch whatever the layout; above 0 a forward pass comes before each training pass.",
        ge=0,
    )


class Parallel(Section):
    """The layout. Data parallel is what is left of the world size."""

    tensor: int = key(1, "Tensor-parallel ranks.", ge=1, resumable=True)
    pipeline: int = key(1, "Pipeline-parallel ranks.", ge=1, resumable=True)
    virtual_pipeline: int = key(
        1,
        "Model chunks of each pipeline rank (interleaved schedule): a smaller pipeline bubble for more communication.",
        ge=1,
        resumable=True,
    )
    context: int = key(
        1, "Context-parallel ranks: each holds two slices of every packed sequence (zigzag).", ge=1, resumable=True
    )
    expert: int = key(
        1,
        "Expert-parallel ranks, which share out a layer's experts; they are taken from the tensor-, context- and data-parallel ones.",
        ge=1,
        resumable=True,
    )
    expert_tensor: int = key(1, "Ranks that cut each expert, as `tensor` cuts the rest.", ge=1, resumable=True)
    sequence_parallel: bool = key(
        False, "Shard activations between the tensor-parallel regions along the sequence.", resumable=True
    )
    timeout: float = key(
        1800.0,
        "Deadline of every collective and of every phase of a step (rollout, update, save, ...), in seconds; past it the job ends and says who was where.",
        gt=0,
        le=YEAR,
        resumable=True,
    )
    heartbeat_timeout: float = key(
        120.0,
        "A rank that gives no sign of life for so many seconds (frozen, or its machine gone) ends the job.",
        gt=0,
        le=YEAR,
        resumable=True,
    )


class Data(Section):
    """Prompts, answers and teacher traces."""

    train: str = key(..., "JSON Lines or Parquet file, or `reasoning_gym:TASK?key=value&...&size=N`.", path=True)
    valid: str | None = key(None, "Held-out set of the same forms, for the evaluation inside training.", path=True)
    prompts_per_step: int = key(64, "Prompts in a global batch (Q).", ge=1)
    max_prompt_tokens: int = key(1024, "A longer prompt is an error that names it.", ge=1)
    max_teacher_tokens: int | None = key(
        None,
        "A longer teacher trace (its end token included) is never drawn; default: `rollout.max_response_tokens`.",
        ge=1,
    )
    seed: int = key(0, "Seed of the order in which prompts are visited.", ge=0, lt=2**63)
    max_tokens_per_microbatch: int = key(
        16384, "Token budget of one packed micro-batch on one data-parallel rank.", ge=1, resumable=True
    )
    accept_changed: bool = key(
        False,
        "A run that is resumed goes on although a file of prompts has changed since it was last started.",
        resumable=True,
    )
    skip_bad_rows: bool = key(False, "Leave out malformed rows (and count them) instead of stopping.")
    repair_escapes: bool = key(
        False,
        "Put the backslash back (and count the rows) where a control character stands in place of the begin of a LaTeX command (a form feed and `rac` for `\\frac`), instead of refusing the row.",
    )
    plain_chat: bool = key(
        False, "Without a chat template, join a chat's texts with newlines, without roles, instead of refusing it."
    )


class Reward(Section):
    """How responses are scored."""

    function: str = key(
        "math",
        "Who scores: `math` (the final answer is equivalent to the ground truth), `choice` (the letter of an option), `reasoning_gym` (the task's own score), or `package.module:function` or `path/file.py:function`, called as verl calls `compute_score(data_source, solution_str, ground_truth, extra_info)`.",
        path=True,
    )
    extract: Literal["boxed", "marked", "number"] = key(
        "boxed",
        "What counts as the final answer (`math`, `choice`, `reasoning_gym`): the last complete `\\boxed{}`; without one, what follows the last `####` (`marked`); without that, the last number or option of the response (`number`).",
    )
    format: Literal["none", "boxed", "think"] = key(
        "none",
        "The form that a response ought to have: a complete box, or `<think>...</think>` (whose first tag the chat template may have written) and a box after it.",
    )
    format_penalty: float = key(0.0, "Taken off the reward of a response of another form.", ge=0)
    overlong_tokens: int = key(
        0, "The last so many tokens before `rollout.max_response_tokens` cost (DAPO's soft punishment).", ge=0
    )
    overlong_penalty: float = key(
        1.0, "Taken off the reward at the full length, linearly less before; needs `overlong_tokens`.", ge=0
    )
    cpu_seconds: float = key(
        5.0, "One answer may take so much CPU time; past it, it scores 0 and is counted.", gt=0, le=YEAR, resumable=True
    )
    workers: int = key(1, "Worker processes of each rank.", ge=1, le=1024, resumable=True)


class Rollout(Section):
    """Sampling from the policy."""

    engine: Literal["auto", "vllm", "server", "transformers", "replay"] = key(
        "auto",
        "Who samples. `vllm` runs in process; `server` is one or more vLLM servers (`rollout.servers`); `transformers` is the slow fallback; `replay` reads recorded steps; `auto` is vllm where it is installed, else transformers.",
        resumable=True,
    )
    servers: list[str] = key(
        [],
        "Addresses of the vLLM servers (`http://host:port`), started by `launch/servers.sh`. Their token comes from the environment (`MEGATRON_DYPO_SERVER_TOKEN`).",
        resumable=True,
    )
    server_timeout: float = key(
        30.0,
        "A server that does not answer a health check for so many seconds is lost until it returns; its requests go to the others.",
        gt=0,
        le=YEAR,
        resumable=True,
    )
    request_timeout: float = key(
        1800.0,
        "One response may take a server so many seconds; past that another server samples it.",
        gt=0,
        le=YEAR,
        resumable=True,
    )
    samples_per_prompt: int = key(8, "Responses per prompt (k).", ge=1)
    temperature: float = key(1.0, "Sampling temperature; on-policy log-probs are of softmax(z / temperature).", gt=0)
    top_p: float = key(1.0, "Nucleus sampling; below 1 the behaviour policy is a truncated one.", gt=0, le=1)
    max_response_tokens: int = key(8192, "Longest response, end token included.", ge=1)
    record: str | None = key(
        None, "Folder to write each step's rollouts to (`step_000001.jsonl`).", path=True, resumable=True
    )
    replay: str | None = key(
        None, "Folder to read recorded rollouts from (with `engine: replay`).", path=True, resumable=True
    )
    correction: Literal["none", "truncate", "mask"] = key(
        "none", "Weight of a token's GRPO term by exp(old - rollout): capped, or dropped outside [1/cap, cap]."
    )
    correction_cap: float = key(2.0, "Cap of the rollout correction.", gt=1)
    async_rollout: int = key(
        0,
        "Steps off policy, 0 or 1. With 1 the next batch is sampled while this one trains, with weights one step older; `correction` makes up for it. Of use with `engine: server`: an engine in process shares the trainer's device.",
        ge=0,
        le=1,
    )
    max_staleness: int | None = key(
        None,
        "Responses may come from weights at most so many optimizer updates older than those they train first; default: `objective.updates_per_rollout` with `async_rollout`, else 0. Not checked on replay unless it is set.",
        ge=0,
        resumable=True,
    )
    dynamic_sampling: bool = key(
        False,
        "A prompt whose group would train nothing is replaced by another, and that one sampled in the same step.",
    )
    refill_rounds: int = key(3, "Replacements of one prompt in one step, at most.", ge=1)
    sync_backend: Literal["auto", "nccl", "ipc", "shared_memory"] = key(
        "auto",
        "How weights reach servers: vLLM's NCCL or CUDA IPC transfer, or (CPU, same machine) shared memory; `auto` is nccl on CUDA, else shared_memory.",
        resumable=True,
    )
    sync_timeout: float = key(
        600.0, "Deadline of one weight sync, and of the servers' start, in seconds.", gt=0, le=YEAR, resumable=True
    )
    verify_sync: Literal["off", "sent"] = key(
        "off",
        "With `sent`, after each sync: compare a checksum of every tensor that the engine took with the trainer's; a difference stops the run and names the tensor.",
        resumable=True,
    )
    engine_eager: bool = key(
        False,
        "vLLM without torch.compile and CUDA graphs: starts in seconds instead of minutes and samples more slowly. For short runs; on the CPU it is always so.",
        resumable=True,
    )
    head_dtype: Literal["auto", "float32", "model"] = key(
        "auto",
        "In what vLLM forms its logits: `float32` from 16-bit hidden states and weights, as the trainer does, or the `model`'s dtype, which rounds each logit; `auto` is float32 where the installed vLLM has it (0.26 and later).",
        resumable=True,
    )
    engine_memory: float = key(
        0.25, "vLLM's share of the GPU's memory; on CPU, GiB of key/value cache.", gt=0, le=2**20, resumable=True
    )


class Objective(Section):
    """What is optimised (docs/objective.md)."""

    method: Literal["dypo", "grpo", "sft"] = key(
        "dypo", "Recipe: which regime trains which term. `grpo` and `sft` are the comparisons' single-term recipes."
    )
    scale: Literal["token", "trajectory"] = key(
        "token", "One unit for all three terms: means over a response's tokens, or sums (the paper's literal form)."
    )
    alpha: float = key(0.5, "Mid: weight of GRPO; GAL has 1 - alpha.", ge=0, le=1)
    beta_gal: float = key(1.0, "GAL's inverse temperature.", gt=0)
    gamma: float = key(1.0, "Hard: weight of SFT on a teacher's trace.", ge=0)
    clip_low: float = key(0.2, "GRPO: lower clip distance of the ratio.", ge=0, le=1)
    clip_high: float = key(0.2, "GRPO: upper clip distance of the ratio.", ge=0)
    kl_coef: float = key(0.0, "GRPO: weight of the k3 estimate of KL(policy || reference).", ge=0)
    hard_max_solved: int = key(0, "Hard if at most so many of the k responses are right.", ge=0)
    reward_threshold: float = key(0.5, "A response is right from this reward on.")
    teachers_per_prompt: int = key(
        1, "Hard: teacher traces drawn without replacement; their losses are averaged.", ge=1
    )
    aggregation: Literal["scale", "token_mean", "constant"] = key(
        "scale",
        "GRPO over tokens: as `scale` says; one mean over all Mid tokens of the batch; or sums divided by `aggregation_constant`.",
    )
    aggregation_constant: int | None = key(
        None, "Fixed length of `aggregation: constant`; default: `rollout.max_response_tokens`.", ge=1
    )
    gal_length_normalize: bool | None = key(
        None, "GAL's log-ratio as a mean over tokens (true) or a sum (false); default: as `scale` says."
    )
    sft_length_normalize: bool | None = key(
        None, "SFT as a mean over tokens (true) or a sum (false); default: as `scale` says."
    )
    normalize: Literal["all", "active"] = key("all", "Q counts all prompts of the batch, or those that contribute.")
    ratio_base: Literal["old", "reference"] = key(
        "old", "GRPO's ratio is against the behaviour policy, or against the reference (the paper's literal form)."
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
    updates_per_rollout: int = key(1, "Optimizer updates per rollout: mini-batches of whole prompts.", ge=1)
    refresh_pair_weights: bool = key(True, "Several updates: recompute the trajectory coefficients before each.")


class Optimizer(Section):
    """Adam, as Megatron-Core runs it."""

    lr: float = key(1e-6, "Peak learning rate.", gt=0)
    min_lr: float = key(0.0, "Final learning rate of a decaying schedule.", ge=0)
    schedule: Literal["constant", "linear", "cosine"] = key("constant", "Decay after the warm-up.")
    schedule_steps: int | None = key(
        None, "Steps over which the schedule decays; needed by `linear` and `cosine`.", ge=1
    )
    warmup_steps: int = key(0, "Linear warm-up.", ge=0)
    betas: list[float] = key([0.9, 0.95], "Adam's betas.", min_length=2, max_length=2)
    eps: float = key(1e-8, "Adam's epsilon.", gt=0)
    weight_decay: float = key(0.0, "Decoupled weight decay (not on norms and biases).", ge=0)
    clip_grad: float = key(1.0, "Largest global gradient norm; 0 is off.", ge=0)
    distributed: bool = key(
        False,
        "Shard the optimizer's state over data-parallel ranks; may be switched on resume.",
        resumable=True,
    )
    overlap_grad_reduce: bool = key(
        False, "Sum gradients over data-parallel ranks while the backward pass goes on.", resumable=True
    )


class Trainer(Section):
    """The loop."""

    steps: int = key(..., "Training steps (rollouts).", ge=1, resumable=True)
    seed: int = key(0, "Seed of initial weights, sampling and teacher draws.", ge=0, lt=2**63)
    deterministic: bool = key(
        False,
        "CUDA: only kernels with one result, in training and in vLLM, so that a run repeats bit for bit on the same machine and layout; slower. CPU runs repeat anyway.",
        resumable=True,
    )
    offload: bool = key(
        False,
        "Policy and rollout engine take turns on the GPU, so that each may need most of its memory: weights, gradients and optimizer state are in host memory while the engine samples, and the engine gives its memory back while the policy trains. No use on CPU.",
        resumable=True,
    )
    eval_every: int = key(
        0,
        "Greedy evaluation on `data.valid` every so many steps, and before and after training; 0: never.",
        ge=0,
        resumable=True,
    )
    save_every: int = key(0, "Checkpoint every so many steps, and at the end; 0: never.", ge=0, resumable=True)
    keep_checkpoints: int = key(2, "Newest checkpoints kept.", ge=1, resumable=True)
    max_skipped_steps: int = key(
        5, "Skipped steps (not finite, or a spike) in a row before the run stops.", ge=1, resumable=True
    )
    spike_factor: float = key(
        0.0,
        "Skip an update whose gradient norm exceeds so many times the median of the last 50 applied ones (20 at least); 0: never.",
        ge=0,
        resumable=True,
    )
    run_dir: str = key(..., "Run folder.", path=True, resumable=True)


class Evaluation(Section):
    """The suites that `evaluate` and `trainer.eval_every` run."""

    suites: list[str] = key(
        [],
        "Suites for `trainer.eval_every`: `aime24`, `aime25`, `amc23`, `math500`, `minerva`, `arc_c`, `gpqa_diamond`, `gsm8k`, or files of one's own (`[NAME=]FILE[?samples=N&extract=number]`).",
        resumable=True,
    )
    data: str | None = key(
        None,
        "Folder of the suites' files; default: the Hugging Face hub (library `datasets`).",
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
        "Follows each problem, after a blank line; null: nothing does.",
        resumable=True,
    )
    shuffle_options: bool = key(True, "Multiple choice: shuffle the options, by `seed`.", resumable=True)
    limit: int | None = key(None, "The first so many problems of each suite; default: all.", ge=1, resumable=True)
    seed: int = key(0, "Seed of samples, shuffles and confidence intervals.", ge=0, lt=2**63, resumable=True)


class Logging(Section):
    """Who is told."""

    wandb: Literal["off", "offline", "online"] = key("off", "Weights & Biases.", resumable=True)
    wandb_project: str = key("megatron_dypo", "Weights & Biases project.", resumable=True)
    tensorboard: bool = key(False, "TensorBoard event files in the run folder.", resumable=True)


class Config(Section):
    """A whole run."""

    model: Model = Field(description="The policy network.")
    policy: PolicyOptions = Field(PolicyOptions(), description="How a mixture of experts is trained.")
    parallel: Parallel = Field(Parallel(), description="The layout.")
    data: Data = Field(description="Prompts, answers and teacher traces.")
    rollout: Rollout = Field(Rollout(), description="Sampling from the policy.")
    reward: Reward = Field(Reward(), description="How responses are scored.")
    objective: Objective = Field(Objective(), description="What is optimised.")
    optimizer: Optimizer = Field(Optimizer(), description="Adam.")
    trainer: Trainer = Field(description="The loop.")
    evaluation: Evaluation = Field(Evaluation(), description="Evaluation suites.")
    logging: Logging = Field(Logging(), description="Who is told.")

    @property
    def window(self) -> int:
        """Tokens of the longest prompt and response that the engine makes room for."""
        responses = self.rollout.max_response_tokens, self.evaluation.max_response_tokens or 0
        return self.data.max_prompt_tokens + max(responses)


def walk(section: type[BaseModel] = Config, prefix: str = ""):
    """Yield (dotted key, field) for every leaf key, in the order of declaration."""
    for name, info in section.model_fields.items():
        dotted = f"{prefix}{name}"
        nested = info.annotation
        if isinstance(nested, type) and issubclass(nested, BaseModel):
            yield from walk(nested, dotted + ".")
        else:
            yield dotted, info
