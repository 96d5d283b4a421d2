"""Declare the keys from prompt to scored response: data, sampling, reward."""

from __future__ import annotations

from typing import Literal

from megatron_dypo.config.section import YEAR, Section, key

REWARD_FUNCTIONS = ("math", "choice", "reasoning_gym")  # built in; any other is a user function


class Data(Section):
    """Prompts, answers and teacher traces."""

    train: str = key(..., "JSON Lines or Parquet file, or `reasoning_gym:TASK?key=value&...&size=N`.", path=True)
    valid: str | None = key(None, "Held-out set in the same forms, for evaluation during training.", path=True)
    experts: str | None = key(
        None,
        "Second data set, of prompts with traces to imitate, in the same forms as `train`; each trace is one sequence. `ground_truth` is not needed.",
        path=True,
    )
    experts_per_step: int = key(64, "Traces of `experts` per global batch.", ge=1)
    prompts_per_step: int = key(64, "Prompts per global batch (Q).", ge=1)
    max_prompt_tokens: int = key(1024, "Longest prompt, in tokens; a longer one is an error that names it.", ge=1)
    max_teacher_tokens: int | None = key(
        None,
        "Longest teacher trace, in tokens with its end token; longer ones are never drawn. Default: `rollout.max_response_tokens`.",
        ge=1,
    )
    seed: int = key(0, "Seed of the prompt order.", ge=0, lt=2**63)
    max_tokens_per_microbatch: int = key(
        16384, "Token budget of one packed micro-batch on one data-parallel rank.", ge=1, resumable=True
    )
    accept_changed: bool = key(
        False,
        "Resume although a file of prompts has changed since the run was last started.",
        resumable=True,
    )
    skip_bad_rows: bool = key(False, "Skip (and count) malformed rows instead of stopping.")
    repair_escapes: bool = key(
        False,
        "Restore the backslash (and count the rows) where a control character replaced the start of a LaTeX command (a form feed and `rac` for `\\frac`), instead of refusing the row.",
    )
    plain_chat: bool = key(
        False,
        "Without a chat template, join the messages of a chat with newlines, without roles, instead of refusing it.",
    )


class Reward(Section):
    """How responses are scored."""

    function: str = key(
        "math",
        "Scorer: `math` (the final answer is equivalent to the ground truth), `choice` (the letter of an option), `reasoning_gym` (the task's own score), or your own `package.module:function` or `path/file.py:function`, called as verl calls `compute_score(data_source, solution_str, ground_truth, extra_info)`.",
        path=True,
    )
    extract: Literal["boxed", "marked", "number"] = key(
        "boxed",
        "Final answer (`math`, `choice`, `reasoning_gym`): the last complete `\\boxed{}`; `marked`: else what follows the last `####`; `number`: else the last number or option of the response.",
    )
    format: Literal["none", "boxed", "think"] = key(
        "none",
        "Required form of a response: a complete box, or `<think>...</think>` (the chat template may supply the first tag) followed by a box.",
    )
    format_penalty: float = key(0.0, "Subtracted from the reward of a response in any other form.", ge=0)
    overlong_tokens: int = key(
        0, "Penalise the last N tokens before `rollout.max_response_tokens` (DAPO's soft overlong punishment).", ge=0
    )
    overlong_penalty: float = key(
        1.0, "Subtracted from the reward at full length, linearly less before; needs `overlong_tokens`.", ge=0
    )
    cpu_seconds: float = key(
        5.0, "CPU seconds to grade one answer; past that it scores 0 and is counted.", gt=0, le=YEAR, resumable=True
    )
    workers: int = key(1, "Grading processes per rank.", ge=1, le=1024, resumable=True)


class Rollout(Section):
    """Sampling from the policy."""

    engine: Literal["auto", "vllm", "server", "transformers", "replay"] = key(
        "auto",
        "Sampling engine. `vllm` runs in process; `server` is one or more vLLM servers (`rollout.servers`); `transformers` is the slow fallback; `replay` reads recorded steps; `auto` is vllm if installed, else transformers.",
        resumable=True,
    )
    servers: list[str] = key(
        [],
        "Addresses of the vLLM servers (`http://host:port`), started by `launch/servers.sh`. Their token comes from the environment variable `MEGATRON_DYPO_SERVER_TOKEN`.",
        resumable=True,
    )
    server_timeout: float = key(
        30.0,
        "A server that answers no health check for N seconds counts as lost until it returns; its requests go to the others.",
        gt=0,
        le=YEAR,
        resumable=True,
    )
    request_timeout: float = key(
        1800.0,
        "Seconds that a server may take for one response; past that another server samples it.",
        gt=0,
        le=YEAR,
        resumable=True,
    )
    samples_per_prompt: int = key(8, "Responses per prompt (k).", ge=1)
    temperature: float = key(1.0, "Sampling temperature; log-probs are those of softmax(logits / temperature).", gt=0)
    top_p: float = key(1.0, "Nucleus sampling; below 1 the behaviour policy is truncated.", gt=0, le=1)
    max_response_tokens: int = key(8192, "Longest response, in tokens with its end token.", ge=1)
    reward_unfinished: float | None = key(
        None,
        "Fixed reward of a response without an end token, which is then neither graded nor penalised (Oat-Zero: 0). Default: grade it as it is.",
    )
    record: str | None = key(
        None, "Folder to write each step's rollouts to (`step_000001.jsonl`).", path=True, resumable=True
    )
    replay: str | None = key(
        None, "Folder to read recorded rollouts from (with `engine: replay`).", path=True, resumable=True
    )
    correction: Literal["none", "truncate", "mask", "icepop"] = key(
        "none",
        "Weight of a token's GRPO term, from the ratio r = exp(old - rollout) of its log-probs: `truncate`: min(r, cap) (TIS); `mask`: 1 within [floor, cap], else 0; `icepop`: r within [floor, cap], else 0 (arXiv 2510.18855: floor 0.5, cap 5).",
    )
    correction_cap: float = key(2.0, "Cap of the rollout correction: the largest ratio left unchanged.", gt=1)
    correction_floor: float | None = key(
        None, "Smallest ratio that `mask` and `icepop` keep; default: 1 / `correction_cap`.", ge=0, lt=1
    )
    async_rollout: int = key(
        0,
        "Steps off policy, 0 or 1. With 1, the next batch is sampled while this one trains, from weights one step older; `correction` compensates. Useful with `engine: server`; an in-process engine shares the trainer's device.",
        ge=0,
        le=1,
    )
    max_staleness: int | None = key(
        None,
        "Maximum staleness: optimizer updates between the weights that sampled a response and the weights it first trains. Default: `objective.updates_per_rollout` with `async_rollout` (one more with a queue), else 0. Replay checks it only if it is set.",
        ge=0,
        resumable=True,
    )
    dynamic_sampling: bool = key(
        False,
        "Replace prompts whose groups would train nothing by others, sampled in the same step (DAPO).",
    )
    refill_rounds: int = key(3, "Most replacements of one prompt per step.", ge=1)
    sync_backend: Literal["auto", "nccl", "sparse_nccl", "ipc", "shared_memory"] = key(
        "auto",
        "How weights reach the servers, by vLLM's names: `nccl` (all, packed), `sparse_nccl` (only the bf16 values that changed, for small learning rates), `ipc` (same GPU), or `shared_memory` (CPU, same machine). `auto` is nccl on CUDA, else shared_memory.",
        resumable=True,
    )
    sync_timeout: float = key(
        600.0, "Deadline of one weight sync, and of server startup, in seconds.", gt=0, le=YEAR, resumable=True
    )
    verify_sync: Literal["off", "sent", "stored"] = key(
        "off",
        "After each sync, compare with the trainer's checksums those of the tensors vLLM received (`sent`), or also of those its layers then hold and compute with (`stored`). A missing, duplicate or different tensor stops the run and is named.",
        resumable=True,
    )
    verify_syncs: int = key(
        20, "Syncs in which `verify_sync` compares each tensor once; 1: all tensors, every time.", ge=1, resumable=True
    )
    engine_eager: bool = key(
        False,
        "Run vLLM without torch.compile and CUDA graphs: it starts in seconds instead of minutes and samples more slowly. For short runs; always so on CPU.",
        resumable=True,
    )
    head_dtype: Literal["auto", "float32", "model"] = key(
        "auto",
        "Dtype of vLLM's logits: `float32` from 16-bit hidden states and weights, as in the trainer, or the `model`'s dtype, which rounds each logit. `auto` is float32 if the installed vLLM supports it (0.26 and later).",
        resumable=True,
    )
    engine_memory: float = key(
        0.25, "vLLM's share of GPU memory; on CPU, GiB of key/value cache.", gt=0, le=2**20, resumable=True
    )
