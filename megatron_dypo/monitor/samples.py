"""Sample rollouts of the report: what the policy was asked, answered and got for it, from recorded steps.

Token ids become text by the run's tokenizer where that needs neither torch nor a network.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from html import escape
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dypo.config.reads import SAMPLING
from megatron_dypo.monitor.run_data import Run
from megatron_dypo.records import Regime
from megatron_dypo.rollout.step_files import read_lines, step_files, token_ids


def decoder(run: Run) -> tuple[Callable[[list[int]], str], str]:
    """Ids to text, special tokens included, and a sentence about it; the ids themselves where there is no other way."""
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
        except Exception:  # tokenizers has no type of its own for a file that it cannot read
            pass
        else:
            return lambda ids: tokens.decode(ids, skip_special_tokens=False), ""
    return lambda ids: " ".join(map(str, ids)), f"Token ids: {name or 'the tokenizer'} has no tokenizer.json here."


def _tokenizer_file(name: str) -> Path | None:
    """``tokenizer.json`` of a folder, or of a hub model that has been downloaded."""
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
GROUPS = 3  # of a step: one of each regime where there are, since each is trained on in its own way
SEARCHED = 64  # groups of a step that are looked through for them; a step may be gigabytes
RESPONSES = 8  # of a group
LONGEST = 1600  # characters of a text; what is more is cut out of its middle
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def sample_rollouts(run: Run, last_only: bool = False) -> str:
    """Markup of a few groups of the first, a middle and the last recorded step (or of the last only).

    Empty where the run recorded none, and with SFT, which records prompts without responses.
    Raises UserError for a file that is not a recorded step.
    """
    files = _files(run)
    if not files:
        return ""
    numbers = sorted(files)
    chosen = numbers[-1:] if last_only else sorted({numbers[0], numbers[len(numbers) // 2], numbers[-1]})
    text, how = decoder(run)
    parts = [_step(files[number], number, run, text, opened=number == chosen[-1]) for number in chosen]
    lead = f"One prompt of each regime where the step has one; a filled mark is a right response. {how}"
    return f'<p class="lead">{escape(lead)}</p>{"".join(parts)}'


def _files(run: Run) -> dict[int, Path]:
    """The recorded steps in which the run sampled responses, by number."""
    name, rewards = run.setting("rollout", "record"), run.columns.get("reward/mean")
    methods = run.settings("objective", "method")
    if not isinstance(name, str) or "\0" in name or (methods and not {*map(str, methods)} & {*SAMPLING}):
        return {}
    folders = [folder for folder in (Path(name), run.folder / name) if os.path.isdir(folder)]
    found = step_files(folders[0]) if folders else {}
    sampled = set() if rewards is None else set(run.steps[np.isfinite(rewards)].tolist())
    return {number: path for number, path in found.items() if number in sampled}


def _step(path: Path, step: int, run: Run, text: Callable[[list[int]], str], opened: bool) -> str:
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
    # One of each regime first, then more of those there are.
    ranked = sorted(
        (place, REGIMES.index(name), group["id"], name) for name in REGIMES for place, group in enumerate(groups[name])
    )
    picked = [(name, groups[name][place]) for place, _, _, name in ranked[:GROUPS]]
    order = sorted(picked, key=lambda item: REGIMES.index(item[0]))
    shown = [_group(name, group, threshold, text, opened and not place) for place, (name, group) in enumerate(order)]
    return f"<h4>Step {step:,}</h4>{''.join(shown)}"


def _checked(line: dict[str, Any]) -> dict[str, Any]:
    """A recorded group, as far as the report needs it."""
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


def _group(name: str, group: dict[str, Any], threshold: float, text: Callable[[list[int]], str], opened: bool) -> str:
    responses = group["responses"]
    right = [response["reward"] >= threshold for response in responses]
    marks = "".join(f'<i class="{_class(good)}"></i>' for good in right[:64])
    answers = "".join(
        _response(response, good, text) for response, good in list(zip(responses, right, strict=True))[:RESPONSES]
    )
    more = len(responses) - RESPONSES
    rest = f'<div class="asked"><p>and {more} more</p></div>' if more > 0 else ""
    return (
        f'<details class="group"{" open" if opened else ""}><summary><i class="badge {name}">{name}</i>'
        f"<b>{escape(_short(group['id'], 80))}</b><span>{sum(right)} of {len(right)} right</span>"
        f'<span class="marks">{marks}</span></summary>'
        f'<div class="asked"><p>prompt, {len(group["prompt_ids"]):,} tokens</p>'
        f"<pre>{escape(_short(text(group['prompt_ids'])))}</pre></div>{answers}{rest}</details>"
    )


def _response(response: dict[str, Any], good: bool, text: Callable[[list[int]], str]) -> str:
    facts = [f"{len(response['ids']):,} tokens", response["finish_reason"]]
    if response["fault"] is not None:
        facts.append(f"not scored: {response['fault']}")
    return (
        f'<div class="said {_class(good)}"><p><b>reward {response["reward"]:g}</b> · {_class(good)} · '
        f"{escape(_short(' · '.join(facts), 200))}</p><pre>{escape(_short(text(response['ids'])))}</pre></div>"
    )


def _class(good: bool) -> str:
    return "right" if good else "wrong"


def _short(text: str, limit: int = LONGEST) -> str:
    """At most ``limit`` characters and a note, without characters that no page may hold."""
    if len(text) > limit:
        head, tail = text[: limit * 2 // 3], text[-limit // 3 :]
        text = f"{head} … [{len(text) - len(head) - len(tail):,} characters left out] … {tail}"
    return _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text)
