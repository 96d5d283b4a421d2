"""Recorded rollouts: one JSON Lines file per step, one line per prompt, independent of layout (docs/data.md)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dypo.errors import UserError
from megatron_dypo.records import Group, Prompt, Response
from megatron_dypo.rollout.routed_experts import as_text, from_text
from megatron_dypo.rollout.step_files import read_lines, require_steps, step_file, token_ids
from megatron_dypo.runtime.fs import atomic_write


def record(folder: str | Path, step: int, groups: list[Group]) -> None:
    """Write the step's groups atomically; recording a step again overwrites it. Raises OSError (a full disk)."""
    path = step_file(folder, step)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, lines(groups))


def lines(groups: list[Group]) -> str:
    """Return the groups in the format of a recorded step."""
    return "".join(json.dumps(_line(group)) + "\n" for group in groups)


def replay(
    folder: str | Path, step: int, prompts: dict[str, Prompt], samples: int, *, vocab_size: int, longest: int
) -> list[Group]:
    """Return the recorded groups of a step (see ``read``). Raises UserError, also for a missing step."""
    require_steps(folder, range(step, step + 1))
    return read(step_file(folder, step), prompts, samples, vocab_size=vocab_size, longest=longest)


def read(path: Path, prompts: dict[str, Prompt], samples: int, *, vocab_size: int, longest: int) -> list[Group]:
    """Read a file's groups, rewards unchanged; ``prompts`` by id supply ground truths and teachers.

    Raises UserError naming file and line: empty file, malformed line, unknown prompt, wrong number of responses, an id
    that is not below ``vocab_size``, a prompt and response of more than ``longest`` tokens.
    """
    groups = []
    for number, group in read_lines(path, lambda line: _group(line, prompts, vocab_size, longest)):
        if len(group.responses) != samples:
            raise UserError(
                f"{path}:{number}: {len(group.responses)} responses, but rollout.samples_per_prompt is {samples}"
            )
        groups.append(group)
    if not groups:
        raise UserError(f"{path}: holds no group")
    return groups


def _line(group: Group) -> dict:
    responses = [
        {
            "ids": response.ids.tolist(),
            "logprobs": [float(value) for value in response.logprobs],
            "reward": response.reward,
            "finish_reason": response.finish_reason,
        }
        | ({} if response.fault is None else {"fault": response.fault})
        | ({} if response.experts is None else {"experts": as_text(response.experts)})
        for response in group.responses
    ]
    rewards = {"teacher_rewards": list(group.teacher_rewards)} if group.teacher_rewards else {}
    return {
        "id": group.prompt.id,
        "prompt_ids": group.prompt_ids.tolist(),
        "teacher_indices": None if group.teacher_indices is None else list(group.teacher_indices),
        "responses": responses,
        "weight_version": group.weight_version,
    } | rewards


def _of_kind(line: dict, name: str, kind: type) -> Any:
    """Return a value of exactly this type (a bool is not an int); raise ValueError otherwise."""
    if type(line[name]) is not kind:
        raise ValueError(f"{name} must be of type {kind.__name__}, not {type(line[name]).__name__}")
    return line[name]


def _ids(values: list[int], vocab_size: int) -> np.ndarray:
    return np.asarray(token_ids(values, vocab_size), np.int32)


def _group(line: dict, prompts: dict[str, Prompt], vocab_size: int, longest: int) -> Group:
    if line["id"] not in prompts:
        raise ValueError(f"prompt {line['id']!r} is not in data.train")
    prompt_ids = _ids(_of_kind(line, "prompt_ids", list), vocab_size)
    if not len(prompt_ids):
        raise ValueError(f"prompt {line['id']!r}: prompt_ids is empty")
    indices = None if line["teacher_indices"] is None else tuple(_of_kind(line, "teacher_indices", list))
    teachers = len(prompts[line["id"]].teachers)
    if indices is not None and not all(type(index) is int and 0 <= index < teachers for index in indices):
        raise ValueError(f"prompt {line['id']!r}: teacher_indices {indices}, but it has {teachers} teachers")
    version = _of_kind(line, "weight_version", int)
    responses = [
        Response(
            _ids(_of_kind(r, "ids", list), vocab_size),
            np.asarray(r["logprobs"], np.float32),
            _of_kind(r, "finish_reason", str),
            float(r["reward"]),
            version,
            None if r.get("fault") is None else _of_kind(r, "fault", str),
            None
            if r.get("experts") is None
            else from_text(_of_kind(r, "experts", str), len(prompt_ids) + len(r["ids"])),
        )
        for r in line["responses"]
    ]
    for response in responses:
        if response.ids.shape != response.logprobs.shape or not len(response.ids):
            raise ValueError(f"prompt {line['id']!r}: {len(response.ids)} ids and {response.logprobs.size} logprobs")
        if len(prompt_ids) + len(response.ids) > longest:
            raise ValueError(
                f"prompt {line['id']!r}: {len(prompt_ids)} + {len(response.ids)} tokens of prompt and response, "
                f"more than the model's {longest}"
            )
    return Group(
        prompt=prompts[line["id"]],
        prompt_ids=prompt_ids,
        responses=responses,
        teacher_indices=indices,
        teacher_rewards=tuple(float(reward) for reward in line.get("teacher_rewards", ())),
    )
