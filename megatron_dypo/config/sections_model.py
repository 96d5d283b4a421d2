"""Keys of the model, of how it is laid out over ranks, and of its experts."""

from __future__ import annotations

from typing import Literal

from megatron_dypo.config.section import YEAR, Section, key


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
