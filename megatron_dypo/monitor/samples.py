"""Sample rollouts of the report: prompts, responses and rewards from recorded steps.

Token ids are decoded with the run's tokenizer if that needs neither torch nor a network.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dypo.config.reads import SAMPLING
from megatron_dypo.monitor.run_data import Run
from megatron_dypo.records import Regime
from megatron_dypo.rollout.step_files import read_lines, step_files, token_ids


def decoder(run: Run) -> tuple[Callable[[list[int]], str], str]:
    """Return a decoder (special tokens included) and a note about it; without a tokenizer it prints the ids."""
    name = run.setting("model", "tokenizer") or run.setting("model", "hf")
    if name is None and run.setting("model", "preset") is not None:
        from megatron_dypo.data.arithmetic import arithmetic_tokens

        tokens = arithmetic_tokens()
        return lambda ids: tokens.decode(ids, skip_special_tokens=False), ""
    path = _tokenizer_file(str(name)) if name is not None else None
    if path is not None:
        from tokenizers import Tokenizer

        try:
            tokens = Tokenizer.from_file(str(path))
        except Exception:  # tokenizers raises plain Exception for an unreadable file
            pass
        else:
            return lambda ids: tokens.decode(ids, skip_special_tokens=False), ""
    return lambda ids: " ".join(map(str, ids)), f"Token ids: {name or 'the tokenizer'} has no tokenizer.json here."


def _tokenizer_file(name: str) -> Path | None:
    """Return ``tokenizer.json`` of a folder, or of a hub model in the local cache; None if there is none."""
    if "\0" in name:
        return None
    path = Path(name) / "tokenizer.json"
    if os.path.isfile(path):
        return path
    if os.path.isabs(name) or name.count("/") != 1:
        return None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(name, "tokenizer.json")
    except HFValidationError:
        return None
    return Path(cached) if isinstance(cached, str) else None


REGIMES = tuple(regime.name.lower() for regime in Regime)
GROUPS = 3  # per step: one of each regime if possible, since each is trained differently
SEARCHED = 64  # groups searched for them per step; a step may be gigabytes
RESPONSES = 8  # of a group
LONGEST = 1600  # characters of a text; longer ones lose their middle
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


@dataclass(frozen=True)
class Said:
    """One response; ``facts``: its length, how it ended, and why it was not scored."""

    right: bool
    reward: float
    facts: str
    text: str


@dataclass(frozen=True)
class Sample:
    """A prompt and its first responses; ``marks`` say for all responses whether they are correct."""

    regime: str
    id: str
    prompt: str
    prompt_tokens: int
    marks: list[bool]
    responses: list[Said]


@dataclass(frozen=True)
class Step:
    number: int
    groups: list[Sample]


@dataclass(frozen=True)
class Samples:
    """The sampled steps; ``note``: a sentence about the tokenizer, or ""."""

    steps: list[Step]
    note: str


def sample_rollouts(run: Run, last_only: bool = False) -> Samples | None:
    """Return a few groups of the first, a middle and the last recorded step (or only the last).

    None if the run recorded none, or with SFT, which records prompts without responses. Raises UserError for a file
    that is not a recorded step.
    """
    files = _files(run)
    if not files:
        return None
    numbers = sorted(files)
    chosen = numbers[-1:] if last_only else sorted({numbers[0], numbers[len(numbers) // 2], numbers[-1]})
    text, note = decoder(run)
    return Samples([_step(files[number], number, run, text) for number in chosen], note)


def _files(run: Run) -> dict[int, Path]:
    """Return the recorded steps in which the run sampled responses, by number."""
    name, rewards = run.setting("rollout", "record"), run.columns.get("reward/mean")
    methods = run.settings("objective", "method")
    if not isinstance(name, str) or "\0" in name or (methods and not {*map(str, methods)} & {*SAMPLING}):
        return {}
    folders = [folder for folder in (Path(name), run.folder / name) if os.path.isdir(folder)]
    found = step_files(folders[0]) if folders else {}
    sampled = set() if rewards is None else set(run.steps[np.isfinite(rewards)].tolist())
    return {number: path for number, path in found.items() if number in sampled}


def _step(path: Path, step: int, run: Run, text: Callable[[list[int]], str]) -> Step:
    threshold, most = run.setting("objective", "reward_threshold"), run.setting("objective", "hard_max_solved")
    threshold = threshold if isinstance(threshold, (int, float)) else 0.5
    most = most if isinstance(most, int) else 0
    least = run.setting("objective", "easy_min_solved")
    least = least if isinstance(least, int) else None
    groups: dict[str, list[dict[str, Any]]] = {name: [] for name in REGIMES}
    for _, group in islice(read_lines(path, _checked), SEARCHED):
        solved = sum(response["reward"] >= threshold for response in group["responses"])
        groups[Regime.of(solved, len(group["responses"]), most, least).name.lower()].append(group)
        if all(groups.values()):
            break
    # One of each regime first, then further ones.
    ranked = sorted(
        (place, REGIMES.index(name), group["id"], name) for name in REGIMES for place, group in enumerate(groups[name])
    )
    picked = [(name, groups[name][place]) for place, _, _, name in ranked[:GROUPS]]
    order = sorted(picked, key=lambda item: REGIMES.index(item[0]))
    return Step(step, [_group(name, group, threshold, text) for name, group in order])


def _checked(line: dict[str, Any]) -> dict[str, Any]:
    """Return the parts of a recorded group that the report uses. Raises ValueError if it has no response."""
    responses = [
        {
            "ids": token_ids(response["ids"]),
            "reward": float(response["reward"]),
            "finish_reason": str(response["finish_reason"]),
            "fault": response.get("fault"),
        }
        for response in line["responses"]
    ]
    if not responses:
        raise ValueError("no response")
    return {"id": str(line["id"]), "prompt_ids": token_ids(line["prompt_ids"]), "responses": responses}


def _group(name: str, group: dict[str, Any], threshold: float, text: Callable[[list[int]], str]) -> Sample:
    responses, prompt = group["responses"], group["prompt_ids"]
    marks = [response["reward"] >= threshold for response in responses]
    said = [_said(response, right, text) for response, right in zip(responses[:RESPONSES], marks, strict=False)]
    return Sample(name, _short(group["id"], 80), _short(text(prompt)), len(prompt), marks, said)


def _said(response: dict[str, Any], right: bool, text: Callable[[list[int]], str]) -> Said:
    facts = [f"{len(response['ids']):,} tokens", response["finish_reason"]]
    if response["fault"] is not None:
        facts.append(f"not scored: {response['fault']}")
    return Said(right, response["reward"], _short(" · ".join(facts), 200), _short(text(response["ids"])))


def _short(text: str, limit: int = LONGEST) -> str:
    """Shorten to ``limit`` characters and a note, replacing characters that HTML does not allow."""
    if len(text) > limit:
        head, tail = text[: limit * 2 // 3], text[-limit // 3 :]
        text = f"{head} … [{len(text) - len(head) - len(tail):,} characters left out] … {tail}"
    return _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text)
