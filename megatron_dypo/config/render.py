"""The schema as text: the key reference of ``train --help`` and of docs/configuration.md."""

from __future__ import annotations

import textwrap
from typing import Literal, get_args, get_origin

from megatron_dypo.config.reads import read_with
from megatron_dypo.config.schema import Config, walk
from megatron_dypo.config.stages import BESIDES, OF_THE_RUN, SECTIONS

_INTRODUCTION = """\
# Configuration

<!-- Written by `python -m megatron_dypo.config > docs/configuration.md` from megatron_dypo/config/. -->

One YAML file, checked as a whole before anything is built:
`python -m megatron_dypo train CONFIG [section.key=value | FILE.yaml ...]`.
An override on the command line replaces the file's value, and a later one an earlier. A further YAML file stands for an
override of each of its keys: `examples/systems/run.sh` lays recipes over the quickstart. An unknown key is an error
that names the nearest known one, or ours where verl, TRL, Megatron-LM or vLLM have the key by that name.
Relative paths are relative to the working directory; `~` and `$VARIABLE` in a path stand for what they stand for in a
shell. Numbers are decimal (`010` is ten). Four keys have to be given: `model.preset` (or `model.hf`), `data.train`,
`trainer.steps` and `trainer.run_dir`.

A key that is set and not read is an error that names it and the key that decides, where both are in the file, or where
the key is on the command line. A key of the file that an override makes idle (`objective.method=sft` with
`objective.alpha` in the file) is named in one line, and the run goes on without it.
"""


def _listed(names: tuple[str, ...]) -> str:
    return " and ".join(", ".join(f"`{name}`" for name in part) for part in (names[:-1], names[-1:]))


_STAGES = f"""
```yaml
trainer:
  run_dir: runs/sft_then_rl        # and no trainer.steps: the run ends with the last stage
stages:
- objective:
    method: sft
  optimizer:
    lr: 5.0e-5
  trainer:
    steps: 500
- objective:
    method: grpo
  trainer:
    steps: 500
```

A stage may give the keys of {_listed(SECTIONS)} that may not change on resume, but for
{_listed(OF_THE_RUN)}; and beside them
{_listed(BESIDES)}.
All other keys are the run's. What a stage does not give is taken from the rest of the file, where a key need be read by
one stage only. On the command line `stages.0.optimizer.lr=...` is the first stage's. What begins anew with a stage:
[objective.md](objective.md#stages). On resume the stage under way may get another `trainer.steps`, and those after it
may be others altogether.
"""


def _type(annotation: object) -> str:
    if get_origin(annotation) is Literal:
        return " | ".join(map(str, get_args(annotation)))
    arms = get_args(annotation)
    if type(None) in arms:
        return _type(next(arm for arm in arms if arm is not type(None)))
    return getattr(annotation, "__name__", str(annotation))


def _default(info) -> str:
    if info.is_required():
        return "required"
    return (
        "unset"
        if info.default is None
        else str(info.default).lower()
        if isinstance(info.default, bool)
        else str(info.default)
    )


def _meaning(dotted: str, info) -> str:
    """What a key is for, and when it is read."""
    when = read_with(dotted)
    return f"{info.description} Read with {when}." if when else info.description


def key_reference() -> str:
    """Every key with type, default and meaning, for a terminal."""
    lines = ["configuration keys:"]
    for dotted, info in walk():
        lines.append(f"  {dotted}  ({_type(info.annotation)}; {_default(info)})")
        lines.extend(textwrap.wrap(_meaning(dotted, info), 100, initial_indent="      ", subsequent_indent="      "))
    return "\n".join(lines)


def page() -> str:
    """docs/configuration.md; ``python -m megatron_dypo.config`` prints it."""
    return _INTRODUCTION + markdown()


def markdown() -> str:
    """docs/configuration.md's tables, one a section."""
    lines, section = [], None
    for dotted, info in walk():
        name, _, leaf = dotted.partition(".")
        if not leaf:
            lines += ["", f"## `{name}`", "", str(info.description), *_STAGES.splitlines()]
            continue
        if name != section:
            section = name
            lines += [
                "",
                f"## `{name}`",
                "",
                str(Config.model_fields[name].description),
                "",
                "| key | type | default | meaning |",
                "|---|---|---|---|",
            ]
        resumable = " *(may change on resume)*" if info.json_schema_extra["resumable"] else ""
        cells = [f"`{leaf}`", _type(info.annotation), _default(info), _meaning(dotted, info) + resumable]
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n"
