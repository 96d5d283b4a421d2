"""Run ``objective CASE.json``: print one case's numbers as JSON, or as a readable table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_dypo.cases.evaluate import evaluate, learn
from megatron_dypo.cases.process import kept
from megatron_dypo.cases.schedules import curve, schedules, simulate, stages_by_step
from megatron_dypo.cases.translate import configuration
from megatron_dypo.config.load import load_keys
from megatron_dypo.errors import UserError


def result(case: dict[str, Any], source: str) -> dict[str, Any]:
    """Return the numbers of a case and, under ``config``, the keys it became. Raises UserError for an invalid case."""
    try:
        keys = configuration(case)
        config = load_keys([f"{name}={json.dumps(value)}" for name, value in keys.items()], "config")
        settings = case["settings"]
        if "sequences" in case and "beta" in settings:
            return learn(_objects(case["sequences"]), config) | {"config": keys}
        if "stages" in settings:
            return stages_by_step(config) | {"config": keys}
        if "solved" in settings:
            return kept(settings["solved"], config) | {"config": keys}
        if "rewards_seen" in settings:
            case = case | {"sequences": _rewarded(_objects(case.get("sequences")), settings["rewards_seen"])}
        if "sequences" in case:
            numbers = evaluate(_objects(case["sequences"]), config, _step(settings.get("step", 1)))
            return _of_critic(case, numbers) | {"config": keys}
        if "p" in settings:
            return curve(settings["p"], config.objective) | {"config": keys}
        steps = settings.get("steps", settings.get("step"))
        if steps not in (None, []):
            several = [_step(step) for step in steps] if isinstance(steps, list) else _step(steps)
            return schedules(several, config.objective) | {"config": keys}
        if "unsolved_of_step" in settings:
            return simulate(settings["unsolved_of_step"], config.objective) | {"config": keys}
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    raise UserError(f"{source}: sequences: missing; give one object per sequence of the update")


def _of_critic(case: dict[str, Any], numbers: dict[str, Any]) -> dict[str, Any]:
    """Keep only the critic's loss and derivatives if the case's ``id`` ends with ``-value`` or it expects no others.

    Otherwise ``loss`` is the policy's, and the critic's is ``value_loss``.
    """
    expected = case.get("expected")
    asked = isinstance(expected, dict) and "dloss_dvalue" in expected and "dloss_dlogp" not in expected
    if "value_loss" not in numbers or not (asked or str(case.get("id")).endswith("-value")):
        return numbers
    of_policy = ("loss", "dloss_dlogp", "value_loss")
    return {"loss": numbers["value_loss"]} | {name: each for name, each in numbers.items() if name not in of_policy}


def _rewarded(sequences: list[dict[str, Any]], rewards: Any) -> list[dict[str, Any]]:
    """Return the sequences with these rewards instead of their own."""
    if not isinstance(rewards, list) or len(rewards) != len(sequences):
        raise UserError("settings.rewards_seen: expected a number for each sequence")
    return [sequence | {"reward": reward} for sequence, reward in zip(sequences, rewards, strict=True)]


def _step(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise UserError(f"settings.step: expected a whole number from 0 on, got {value!r:.80}")
    return value


def _objects(sequences: Any) -> list[dict[str, Any]]:
    if not isinstance(sequences, list) or not sequences or not all(isinstance(each, dict) for each in sequences):
        raise UserError("sequences: expected a list of objects, one for each sequence")
    return sequences


def read(path: Path) -> dict[str, Any]:
    """Read a case's JSON object. Raises UserError naming the file."""
    try:
        case = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot read the case: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(case, dict):
        raise UserError(f"{path}: expected one case, an object with system, settings and sequences")
    return case


def show(path: Path, as_table: bool) -> None:
    """Print the numbers of the case in ``path``."""
    case = read(path)
    numbers = result(case, str(path))
    print("\n".join(table(case, numbers)) if as_table else json.dumps(numbers, indent=1))


SLOPES = {"dloss_dlogp": "logp", "dloss_dprm_logp": "prm_logp", "dloss_dvalue": "value"}  # derivative -> stream


def table(case: dict[str, Any], numbers: dict[str, Any]) -> list[str]:
    """Return one line per token, with its log-prob and derivatives; for a queue, one line per step."""
    lines = [f"{key}: {value}" for key, value in numbers["config"].items()]
    if "oldest_first" in numbers:
        orders = ("oldest_first", "newest_first")
        flushes = [(order, n, step) for order in orders for n, step in enumerate(numbers[order], start=1)]
        return [
            *lines,
            f"{'order':<14}{'step':>4}  trained on, left",
            *(f"{order:<14}{n:>4}  {step['flushed']}, {step['left']}" for order, n, step in flushes),
        ]
    if "f" not in numbers and "loss" not in numbers:
        return [*lines, *(f"{key}: {value}" for key, value in numbers.items() if key != "config")]
    if "loss" not in numbers:
        rows = zip(case["settings"]["p"], numbers["f"], numbers["df_dlogp"], strict=True)
        return [*lines, f"{'p':>12}{'f':>14}{'df/dlogp':>14}", *(f"{p:12g}{f:14.6g}{df:14.6g}" for p, f, df in rows)]
    of, slopes = next((of, numbers[name]) for name, of in SLOPES.items() if name in numbers)
    lines.append(f"loss {numbers['loss']:.10g}")
    lines.append(f"{'sequence':<14}{'token':>6}{of:>12}{f'dL/d{of}':>16}{'dL/dH':>14}")
    for i, sequence in enumerate(case["sequences"]):
        for t, (logp, slope) in enumerate(zip(sequence[of], slopes[i], strict=True)):
            bonus = f"{numbers['dloss_dentropy'][i][t]:14.6g}" if "dloss_dentropy" in numbers else f"{'-':>14}"
            lines.append(f"{sequence.get('name', i)!s:<14}{t:>6}{logp:12.5g}{slope:16.8g}{bonus}")
    return lines
