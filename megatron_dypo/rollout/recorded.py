"""Recorded rollouts: one JSON Lines file a step, one line a prompt, independent of layout (docs/data.md)."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

from megatron_dypo.errors import UserError
from megatron_dypo.records import Group, Prompt, Response


def step_file(folder: str | Path, step: int) -> Path:
    return Path(folder) / f"step_{step:06d}.jsonl"


def record(folder: str | Path, step: int, groups: list[Group]) -> None:
    """Write the step's groups, atomically; recording a step again overwrites it."""
    path = step_file(folder, step)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(_line(group)) for group in groups]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def require_steps(folder: str | Path, steps: range) -> None:
    """Raises UserError naming the first of ``steps`` that was never recorded in ``folder``."""
    for step in steps:
        if not step_file(folder, step).is_file():
            raise UserError(f"rollout.replay: {step_file(folder, step)}: no recorded step {step}")


def replay(
    folder: str | Path, step: int, prompts: dict[str, Prompt], samples: int, *, vocab_size: int, longest: int
) -> list[Group]:
    """The recorded groups of a step, rewards as they are; ``prompts`` by id supply ground truths and teachers.

    Raises UserError naming file and line: missing or empty step, malformed line, unknown prompt, another number of
    responses, an id that is not below ``vocab_size``, a prompt and response of more than ``longest`` tokens.
    """
    require_steps(folder, range(step, step + 1))
    path, groups = step_file(folder, step), []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            groups.append(_group(json.loads(line), prompts, vocab_size, longest))
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise UserError(f"{path}:{number}: not a recorded rollout: {error}") from None
        if len(groups[-1].responses) != samples:
            raise UserError(
                f"{path}:{number}: {len(groups[-1].responses)} responses, but rollout.samples_per_prompt is {samples}"
            )
    if not groups:
        raise UserError(f"rollout.replay: {path}: holds no group")
    return groups


def _line(group: Group) -> dict:
    responses = [
        {
            "ids": response.ids.tolist(),
            "logprobs": [float(value) for value in response.logprobs],
            "reward": response.reward,
            "finish_reason": response.finish_reason,
        }
        for response in group.responses
    ]
    return {
        "id": group.prompt.id,
        "prompt_ids": group.prompt_ids.tolist(),
        "teacher_indices": None if group.teacher_indices is None else list(group.teacher_indices),
        "responses": responses,
        "weight_version": group.weight_version,
    }


def _ids(values: list[int], vocab_size: int) -> np.ndarray:
    for value in values:
        if type(value) is not int or not 0 <= value < vocab_size:
            raise ValueError(f"{value!r} is no token id of a vocabulary of {vocab_size}")
    return np.asarray(values, np.int32)


def _group(line: dict, prompts: dict[str, Prompt], vocab_size: int, longest: int) -> Group:
    if line["id"] not in prompts:
        raise ValueError(f"prompt {line['id']!r} is not in data.train")
    if not line["prompt_ids"]:
        raise ValueError(f"prompt {line['id']!r}: prompt_ids is empty")
    indices = line["teacher_indices"]
    teachers = len(prompts[line["id"]].teachers)
    if indices is not None and not all(0 <= index < teachers for index in indices):
        raise ValueError(f"prompt {line['id']!r}: teacher_indices {indices}, but it has {teachers} teachers")
    responses = [
        Response(
            _ids(r["ids"], vocab_size),
            np.asarray(r["logprobs"], np.float32),
            r["finish_reason"],
            float(r["reward"]),
        )
        for r in line["responses"]
    ]
    prompt_ids = _ids(line["prompt_ids"], vocab_size)
    for response in responses:
        if len(response.ids) != len(response.logprobs) or not len(response.ids):
            raise ValueError(f"prompt {line['id']!r}: {len(response.ids)} ids and {len(response.logprobs)} logprobs")
        if len(prompt_ids) + len(response.ids) > longest:
            raise ValueError(
                f"prompt {line['id']!r}: {len(prompt_ids)} + {len(response.ids)} tokens of prompt and response, "
                f"more than the model's {longest}"
            )
    return Group(
        prompt=prompts[line["id"]],
        prompt_ids=prompt_ids,
        responses=responses,
        teacher_indices=None if indices is None else tuple(indices),
        weight_version=line["weight_version"],
    )
