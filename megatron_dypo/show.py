"""``show``: print the first prompts, traces and options exactly as the model will see them, with warnings.

Meant to be read before spending GPU hours: input that training would reject is shown as well, with a warning.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dypo.config.checks import is_custom
from megatron_dypo.config.schema import Config
from megatron_dypo.config.stages import stages_of
from megatron_dypo.data.dataset import load_prompts, read_prompts
from megatron_dypo.data.provenance import start_day
from megatron_dypo.data.rows import Escapes, strings
from megatron_dypo.data.tokenizer import Tokenizer, joined, load_tokenizer
from megatron_dypo.data.traces import THOUGHTS, opening_fault, thought_fault
from megatron_dypo.escapes import swallowed_in
from megatron_dypo.evaluate.suites import load_suites
from megatron_dypo.models.shape import model_shape
from megatron_dypo.records import Prompt, Teacher

_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_LONGEST = 3000  # characters of a printed text; JSON has all


def show(config: Config, count: int, as_json: bool) -> None:
    """Print the first ``count`` prompts of `data.train` and `data.experts` with their traces, and one of each suite.

    The JSON is a list of ``{"id", "prompt_ids", "prompt", "traces": [{"name", "ids", "text"}], "warnings"}``, with
    ``stage`` (its number, steps and recipe) in a run of several. Raises UserError if model, tokenizer or data cannot be
    read.
    """
    found = entries(config, count)
    if as_json:
        print(json.dumps(found, ensure_ascii=False))
        return
    stage = None
    for entry in found:
        if entry.get("stage") != stage:
            stage = entry["stage"]
            print(f"##### {stage}")
        print(f"=== {entry['id']}: {len(entry['prompt_ids'])} tokens")
        print(_printed(entry["prompt"]))
        for trace in entry["traces"]:
            print(f"--- trace of {trace['name']}: {len(trace['ids'])} tokens")
            print(_printed(trace["text"]))
        for warning in entry["warnings"]:
            print(f"warning: {warning}")
        print()


def entries(config: Config, count: int) -> list[dict[str, Any]]:
    """Return the entries that ``show`` prints."""
    asked_plain, config.data.plain_chat = config.data.plain_chat, True  # shown with a warning instead of rejected
    tokenizer = load_tokenizer(config, model_shape(config.model), start_day(Path(config.trainer.run_dir)))
    own, settings, found = is_custom(config.reward.function), config.evaluation, []
    for stage in stages_of(config):
        data = stage.config.data
        escapes: Escapes = "repair" if data.repair_escapes else "keep"
        prompts = load_prompts(data.train, data.skip_bad_rows, escapes=escapes, any_truth=own)[:count]
        if data.experts:
            prompts += read_prompts(data.experts, data.skip_bad_rows, escapes=escapes, graded=False)[:count]
        of_it = {"stage": stage.title} if stage.named else {}
        found += [_entry(prompt, tokenizer, stage.config, asked_plain) | of_it for prompt in prompts]
    if settings.suites and (settings.data or config.trainer.eval_every):
        suites = load_suites(settings.suites, settings, "evaluation.suites").values()
        of_it = {"stage": "evaluation"} if config.stages else {}
        found += [_entry(first, tokenizer, config, asked_plain) | of_it for first, *_ in suites]
    return found


def _entry(prompt: Prompt, tokenizer: Tokenizer, config: Config, plain_chat: bool) -> dict[str, Any]:
    ids = tokenizer.encode_prompt(prompt)
    warnings = _prompt_warnings(prompt, tokenizer, plain_chat)
    if len(ids) > (most := config.data.max_prompt_tokens):
        warnings.append(f"has {len(ids)} tokens, and data.max_prompt_tokens is {most}: training refuses it")
    if len(ids) and ids[-1] in tokenizer.end_ids:
        warnings.append("the prompt ends with an end token, from which the model must continue")
    traces = []
    for teacher in prompt.teachers:
        trace, said = _trace(prompt, teacher, tokenizer, config)
        traces.append(trace)
        warnings += said
    text = tokenizer.show(ids)
    return {"id": prompt.id, "prompt_ids": ids.tolist(), "prompt": text, "traces": traces, "warnings": warnings}


def _prompt_warnings(prompt: Prompt, tokenizer: Tokenizer, plain_chat: bool) -> list[str]:
    found, template, text = [], tokenizer.template, joined(prompt)
    if prompt.messages and not template:
        what = "joined with newlines, without roles" if plain_chat else "training refuses it without data.plain_chat"
        found.append(f"the prompt is a chat, and the tokenizer has no chat template: {what}")
    if prompt.messages and template:
        if template.reads_clock:
            found.append(
                f"the chat template contains a date: {tokenizer.day}, that of the run's start, throughout the run"
            )
        if template.closing.strip() and template.end_of_answer(tokenizer.end_ids) is None:
            end = tokenizer.show(np.array([tokenizer.eos_id]))
            found.append(
                f"the chat template writes {template.closing!r:.60} after an answer, which holds none of the model's "
                f"end tokens: traces end with {end}"
            )
    teachers = [teacher.trace for teacher in prompt.teachers]
    if field := swallowed_in({"prompt": text, "ground_truth": prompt.ground_truth, "teachers": teachers}):
        found.append(f"{field}; training refuses it without data.repair_escapes")
    texts = {"prompt": [text], "ground_truth": strings(prompt.ground_truth)}
    texts |= {f"trace of {teacher.name}": [teacher.trace] for teacher in prompt.teachers}
    for where, parts in texts.items():
        if controls := sorted(set(_CONTROL.findall("".join(parts)))):
            found.append(f"{where}: holds control characters: {', '.join(f'U+{ord(each):04X}' for each in controls)}")
    if spelled := tokenizer.spelled(text):
        found.append(f"the prompt's own text spells special tokens: {', '.join(spelled)}")
    return found


def _trace(prompt: Prompt, teacher: Teacher, tokenizer: Tokenizer, config: Config) -> tuple[dict[str, Any], list[str]]:
    """Return one trace and its warnings."""
    found, opening = [], tokenizer.opening(prompt)
    if fault := thought_fault(teacher.trace):
        found.append(fault)
    if fault := opening_fault(opening, teacher.trace):
        found.append(fault)
    for opens, _ in THOUGHTS:
        if opening.rstrip().endswith(opens) and teacher.trace.lstrip().startswith(opens):
            found.append(f"begins with {opens}, which already ends the prompt: it is kept once")
    text = teacher.trace
    ids: list[int] = []
    if end := tokenizer.end_inside(teacher.trace):
        found.append(f"holds the end token {end} before its end: training refuses it, or leaves it out as a bad row")
    else:
        encoded = tokenizer.encode_trace(teacher.trace, prompt)
        ids, text = encoded.tolist(), tokenizer.show(encoded)
    most = config.data.max_teacher_tokens or config.rollout.max_response_tokens
    if len(ids) > most:
        found.append(f"has {len(ids)} tokens, more than {most} (data.max_teacher_tokens): it is never drawn")
    named = [f"the trace of {teacher.name} {fault}" for fault in found]
    return {"name": teacher.name, "ids": ids, "text": text}, named


def _printed(text: str) -> str:
    """Format for a terminal: cut the middle of long texts, and show control characters as codes."""
    if len(text) > _LONGEST:
        half = _LONGEST // 2
        text = f"{text[:half]}\n[... {len(text) - _LONGEST} characters ...]\n{text[-half:]}"
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)
