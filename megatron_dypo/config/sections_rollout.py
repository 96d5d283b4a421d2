"""Keys of the way from a prompt to a scored response: data, sampling, reward."""

from __future__ import annotations

from typing import Literal

from megatron_dypo.config.section import YEAR, Section, key

REWARD_FUNCTIONS = ("math", "choice", "reasoning_gym")  # built in; others are a user's


class Data(Section):
    """Prompts, answers and teacher traces."""

    train: str = key(..., "JSON Lines or Parquet file, or `reasoning_gym:TASK?key=value&...&size=N`.", path=True)
    valid: str | None = key(None, "Held-out set of the same forms, for the evaluation inside training.", path=True)
    experts: str | None = key(
        None,
        "Prompts with traces to imitate, a data set beside `train` in the same forms; every trace of a row is one sequence. `ground_truth` is not needed.",
        path=True,
    )
    experts_per_step: int = key(64, "Traces of `experts` in a global batch.", ge=1)
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
        0, "The last N tokens before `rollout.max_response_tokens` cost (DAPO's soft punishment).", ge=0
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
    reward_unfinished: float | None = key(
        None,
        "Reward of a response that did not end by itself, whatever its text: it is not graded and pays no penalty (Oat-Zero: 0). Default: graded as it is.",
    )
    record: str | None = key(
        None, "Folder to write each step's rollouts to (`step_000001.jsonl`).", path=True, resumable=True
    )
    replay: str | None = key(
        None, "Folder to read recorded rollouts from (with `engine: replay`).", path=True, resumable=True
    )
    correction: Literal["none", "truncate", "mask", "icepop"] = key(
        "none",
        "Weight of a token's GRPO term by the ratio exp(old - rollout): the ratio, capped (`truncate`); 1 within [floor, cap] and 0 outside (`mask`); the ratio within [floor, cap] and 0 outside (`icepop`, arXiv 2510.18855: floor 0.5, cap 5).",
    )
    correction_cap: float = key(2.0, "Cap of the rollout correction: the largest ratio that counts as it is.", gt=1)
    correction_floor: float | None = key(
        None, "Lower end of the ratios that `mask` and `icepop` keep; default: 1 / `correction_cap`.", ge=0, lt=1
    )
    async_rollout: int = key(
        0,
        "Steps off policy, 0 or 1. With 1 the next batch is sampled while this one trains, with weights one step older; `correction` makes up for it. Of use with `engine: server`: an engine in process shares the trainer's device.",
        ge=0,
        le=1,
    )
    max_staleness: int | None = key(
        None,
        "Responses may come from weights at most N optimizer updates older than those they train first; default: `objective.updates_per_rollout` with `async_rollout` (one more with a queue), else 0. Not checked on replay unless it is set.",
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
    verify_sync: Literal["off", "sent", "stored"] = key(
        "off",
        "After each sync: compare checksums of the tensors that vLLM was given with the trainer's (`sent`), and of those that its layers hold then, where the forward pass takes them (`stored`). A missing, doubled or different tensor stops the run and is named.",
        resumable=True,
    )
    verify_syncs: int = key(
        20, "Every tensor is compared by `verify_sync` once in N syncs; 1: all, each time.", ge=1, resumable=True
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
