"""Declare the keys of the model, its layout over ranks, and its experts."""

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
    num_experts: int | None = key(None, "Experts per layer (mixture-of-experts families).", ge=1, lt=2**15)
    router_topk: int | None = key(None, "Experts that each token is routed to.", ge=1, lt=2**15)
    norm_topk_prob: bool | None = key(None, "Normalise the weights of a token's experts to sum to 1.")
    shared_expert_ffn_hidden_size: int | None = key(None, "Width of the shared experts (`qwen2_moe`).", ge=1, lt=2**31)


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
        "Compare the log-probs of a short text with those of transformers on rank 0 after loading `model.hf`. `auto`: at a fresh start, if the folder fits into a quarter of the free host memory, for at most a minute.",
        resumable=True,
    )
    attention_backend: Literal["auto", "sdpa", "flash", "te"] = key(
        "auto",
        "Core attention: torch's SDPA, torch's variable-length flash attention (CUDA), or Transformer Engine's (with `layer_spec: te`); `auto` is the last of these that is available.",
        resumable=True,
    )
    layer_spec: Literal["auto", "local", "te"] = key(
        "auto",
        "Megatron-Core layer spec: `local` needs neither Transformer Engine nor Apex; `auto` is `te` on CUDA if Transformer Engine is installed.",
        resumable=True,
    )
    recompute: Literal["none", "selective", "full"] = key(
        "none",
        "Activations to recompute in the backward pass: none, those of the MLPs (`selective`), or all (`full`).",
        resumable=True,
    )
    reference_on: Literal["auto", "device", "host"] = key(
        "auto",
        "Where the frozen reference lives: on the device, which costs memory only, or in (pinned) host memory. `auto` is the device if it fits beside the planned peak and `trainer.offload` is off.",
        resumable=True,
    )


class PolicyOptions(Section):
    """How a mixture of experts is trained; a dense policy sets none of these keys."""

    routing_replay: Literal["off", "old", "rollout"] = key(
        "off",
        "Which routing training replays: none (`off`: the router decides anew), that of the old-log-prob pass (`old`), or that of the rollout engine (`rollout`, R3).",
    )
    aux_loss: float = key(
        0.0,
        "Coefficient of the load-balancing loss, computed over the whole mini-batch in every layout; above 0 it costs one more forward pass per training pass.",
        ge=0,
    )


class Parallel(Section):
    """The layout. Data parallelism takes the remaining ranks."""

    tensor: int = key(1, "Tensor-parallel ranks.", ge=1, resumable=True)
    pipeline: int = key(1, "Pipeline-parallel ranks.", ge=1, resumable=True)
    virtual_pipeline: int = key(
        1,
        "Model chunks per pipeline rank (interleaved schedule): a smaller pipeline bubble for more communication.",
        ge=1,
        resumable=True,
    )
    context: int = key(
        1, "Context-parallel ranks: each holds two slices of every packed sequence (zigzag).", ge=1, resumable=True
    )
    expert: int = key(
        1,
        "Expert-parallel ranks, which split a layer's experts among them; taken from the tensor-, context- and data-parallel ranks.",
        ge=1,
        resumable=True,
    )
    expert_tensor: int = key(
        1, "Tensor-parallel ranks of each expert, as `tensor` is of the other weights.", ge=1, resumable=True
    )
    sequence_parallel: bool = key(
        False, "Shard activations between the tensor-parallel regions along the sequence.", resumable=True
    )
    timeout: float = key(
        1800.0,
        "Deadline of each collective and each phase of a step (rollout, update, save, ...), in seconds; after it the job ends and reports the phase of every rank.",
        gt=0,
        le=YEAR,
        resumable=True,
    )
    heartbeat_timeout: float = key(
        120.0,
        "End the job if a rank sends no heartbeat for N seconds (frozen, or its machine lost).",
        gt=0,
        le=YEAR,
        resumable=True,
    )
