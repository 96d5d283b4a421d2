"""Render the schema as text: the key reference in ``train --help`` and docs/configuration.md."""

from __future__ import annotations

import textwrap
from typing import Literal, get_args, get_origin

from megatron_dypo.config.reads import KINDS, read_with
from megatron_dypo.config.schema import Config, walk
from megatron_dypo.config.stages import BESIDES, OF_THE_RUN, SECTIONS

_INTRODUCTION = """\
# Configuration

<!-- Written by `python -m megatron_dypo.config > docs/configuration.md` from megatron_dypo/config/. -->

A run is configured by one YAML file, checked as a whole before anything is built:
`python -m megatron_dypo train CONFIG [section.key=value | FILE.yaml ...]`.
Overrides on the command line replace values of the file; the last one wins. A further YAML file overrides each key it
contains: `examples/systems/run.sh` lays recipes over the quickstart this way. An unknown key is an error that names the
nearest known key, or our name for it if verl, TRL, Megatron-LM or vLLM has a key by that name.
Relative paths are relative to the working directory; `~` and `$VARIABLE` in a path are expanded. Numbers are decimal
(`010` is ten). Four keys are required: `model.preset` (or `model.hf`), `data.train`, `trainer.steps` and
`trainer.run_dir`.

"Read with" states the condition under which a key is read. Setting a key that is not read is an error that names it and
the key that decides, if the file sets both or the command line sets the idle key. If an override makes a key of the
file idle (`objective.method=sft` with `objective.alpha` in the file), one line says so and the run ignores that key.
The kinds of recipes (`objective.method`) are:

| kind | recipes |
|---|---|
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

A stage may set the keys of {_listed(SECTIONS)} that may not change on resume, except
{_listed(OF_THE_RUN)}; and also
{_listed(BESIDES)}.
All other keys belong to the run. A stage takes what it does not set from the rest of the file, where each key must be
read by at least one stage. On the command line, `stages.0.optimizer.lr=...` sets a key of the first stage. What starts
afresh with a stage: [objective.md](objective.md#stages). On resume, `trainer.steps` of the current stage may change,
and later stages may be replaced.
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
    """Return what a key is for, and when it is read."""
    when = read_with(dotted)
    return f"{info.description} Read with {when}." if when else info.description


def key_reference() -> str:
    """Return every key with type, default and meaning, for a terminal."""
    lines = ["kinds of recipes (objective.method):"]
    lines += [f"  {kind}: {', '.join(methods)}" for kind, methods in KINDS.items()]
    lines += ["", "configuration keys:"]
    for dotted, info in walk():
        lines.append(f"  {dotted}  ({_type(info.annotation)}; {_default(info)})")
        lines.extend(textwrap.wrap(_meaning(dotted, info), 100, initial_indent="      ", subsequent_indent="      "))
    return "\n".join(lines)


def page() -> str:
    """Return docs/configuration.md, as ``python -m megatron_dypo.config`` prints it."""
    kinds = [f"| {kind} | {', '.join(f'`{method}`' for method in methods)} |\n" for kind, methods in KINDS.items()]
    return _INTRODUCTION + "".join(kinds) + markdown()


def markdown() -> str:
    """Return the tables of docs/configuration.md, one per section."""
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
