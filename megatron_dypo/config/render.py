"""The schema as text: the key reference of ``train --help`` and of docs/configuration.md."""

from __future__ import annotations

import textwrap
from typing import Literal, get_args, get_origin

from megatron_dypo.config.schema import Config, walk

_INTRODUCTION = """\
# Configuration

<!-- Written by `python -m megatron_dypo.config > docs/configuration.md` from megatron_dypo/config/schema.py. -->

One YAML file, checked as a whole before anything is built:
`python -m megatron_dypo train CONFIG [section.key=value ...]`.
An override on the command line replaces the file's value, and a later one an earlier. An unknown key is an error
that names the nearest known one, or ours where verl, TRL, Megatron-LM or vLLM have the key by that name.
Relative paths are relative to the working directory; `~` and `$VARIABLE` in a path stand for what they stand for in a
shell. Numbers are decimal (`010` is ten). Four keys have to be given: `model.preset` (or `model.hf`), `data.train`,
`trainer.steps` and `trainer.run_dir`.
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


def key_reference() -> str:
    """Every key with type, default and meaning, for a terminal."""
    lines = ["configuration keys:"]
    for dotted, info in walk():
        lines.append(f"  {dotted}  ({_type(info.annotation)}; {_default(info)})")
        lines.extend(textwrap.wrap(info.description, 100, initial_indent="      ", subsequent_indent="      "))
    return "\n".join(lines)


def page() -> str:
    """docs/configuration.md; ``python -m megatron_dypo.config`` prints it."""
    return _INTRODUCTION + markdown()


def markdown() -> str:
    """docs/configuration.md's tables, one a section."""
    lines, section = [], None
    for dotted, info in walk():
        name, _, leaf = dotted.partition(".")
        if name != section:
            section = name
            lines += [
                "",
                f"## `{name}`",
                "",
                Config.model_fields[name].description,
                "",
                "| key | type | default | meaning |",
                "|---|---|---|---|",
            ]
        resumable = " *(may change on resume)*" if info.json_schema_extra["resumable"] else ""
        cells = [f"`{leaf}`", _type(info.annotation), _default(info), info.description + resumable]
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n"
