"""Read a configuration file and overrides into one tree: text, old names, paths and positions in ``stages``."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from megatron_dypo.config import stages, synonyms
from megatron_dypo.config.renamed import answers, rename_tree
from megatron_dypo.config.schema import Config, walk
from megatron_dypo.config.yaml_text import parse_yaml
from megatron_dypo.errors import UserError
from megatron_dypo.escapes import swallowed

# Secrets must not reach a run folder or a log, not even in the error that refuses them.
_CREDENTIALS = re.compile(r"://[^/\s@]*:[^/\s@]*@")
_SECRET_NAME = re.compile("token$|password|passwd|secret|credential|api_?key", re.IGNORECASE)
SHOWN = 8  # unknown keys named in one line, at most
_VARIABLE = re.compile(r"\$(\w+|\{[^}]*\})")
_NO_TEXT = re.compile("[\0\ud800-\udfff]")  # YAML can escape these, but no path or file accepts them


def read_tree(path: Path, overrides: list[str], recorded: bool = False) -> dict[str, Any]:
    """Return the tree of file and overrides, with known keys only."""
    tree = _sections(path)
    if recorded:
        for _, part in stages.parts(tree):
            rename_tree(part)
    for override in overrides:
        apply_override(tree, override)
    _refuse_old_names(tree, str(path))
    for name, value in _leaves(tree):
        if fault := _unusable(value):
            raise UserError(f"{path}: {name}: {fault}")
    for prefix, part in stages.parts(tree):
        _expand_paths(part, f"{path}: {prefix}")
    require_known(tree, str(path))
    return tree


def _sections(path: Path) -> dict[str, Any]:
    """Read the sections of a YAML file."""
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot read the configuration: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: the configuration must be a mapping of sections")
    return tree


def spelled(overrides: list[str]) -> Iterator[str]:
    """Yield the overrides, with ``section.key=value`` for each key of a YAML file among them, its stages last."""
    for word in overrides:
        if "=" in word or not word.endswith((".yaml", ".yml")):
            yield word
            continue
        tree = _sections(Path(word))
        _refuse_old_names(tree, word)
        require_known(tree, word)
        keys = dict(_keys(tree))
        last = {"stages": keys.pop("stages")} if "stages" in keys else {}
        yield from (f"{dotted}={json.dumps(value)}" for dotted, value in (keys | last).items())


def _keys(section: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of every known key."""
    known = dict(walk())
    for name, value in section.items():
        dotted = f"{prefix}{name}"
        if isinstance(value, dict) and dotted not in known:
            yield from _keys(value, f"{dotted}.")
        else:
            yield dotted, value


def _refuse_old_names(tree: dict[str, Any], source: str) -> None:
    if old := [f"{prefix}{answer}" for prefix, part in stages.parts(tree) for answer in answers(part)]:
        raise UserError(f"{source}: {'; '.join(old)}")


def require_known(tree: dict[str, Any], source: str) -> None:
    """Raise UserError if a tree, or a stage of it, has an unknown key."""
    found = [_unknown_key(prefix, name) for prefix, part in stages.parts(tree) for name in _unknown(part, Config)]
    if found:
        more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        raise UserError(f"{source}: {'; '.join(found[:SHOWN])}{more}")


def apply_override(tree: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise UserError(f"override {override!r}: expected section.key=value")
    try:
        value = parse_yaml(text)
    except ValueError:
        value = text
    *parents, last = dotted.split(".")
    node: Any = tree
    if parents[:1] == ["stages"]:
        node, parents, last = _of_stage(tree, override, dotted)
    for parent in parents:
        child = node.get(parent)
        node[parent] = child if isinstance(child, dict) else {}
        node = node[parent]
    node[last] = value


def _of_stage(tree: dict[str, Any], override: str, dotted: str) -> tuple[Any, list[str], Any]:
    """Locate an override of ``stages.N...``: (list of stages or one of them, sections below it, last name)."""
    found = tree.get("stages")
    known = found if isinstance(found, list) else []
    _, index, *rest = dotted.split(".")
    if not index.isdecimal() or int(index) >= len(known):
        raise UserError(f"override {override!r:.80}: the configuration has {len(known)} stages, counted from 0")
    if not rest:
        return known, [], int(index)
    if not isinstance(known[int(index)], dict):
        known[int(index)] = {}
    return known[int(index)], rest[:-1], rest[-1]


def _expand_paths(tree: dict[str, Any], source: str) -> None:
    """Expand `~` and `$VARIABLE` in every key that is a path.

    Raises UserError for a variable that is not set and a user without a home folder.
    """
    for dotted, info in walk():
        *parents, last = dotted.split(".")
        node: Any = tree
        for parent in parents:
            node = node.get(parent) if isinstance(node, dict) else None
        if not info.json_schema_extra["path"] or not isinstance(node, dict) or not isinstance(node.get(last), str):
            continue
        value = node[last]
        node[last] = expanded = os.path.expanduser(os.path.expandvars(value))
        if unset := _VARIABLE.search(expanded):
            raise UserError(f"{source}{dotted}: {value}: the environment variable {unset[0]} is not set")
        if expanded.startswith("~"):
            raise UserError(f"{source}{dotted}: {value}: no home folder for {expanded.split('/')[0]}")


def _leaves(node: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of whatever YAML gave, including the keys of mappings themselves."""
    if isinstance(node, dict):
        for key, value in node.items():
            dotted = f"{name}.{key}" if name else str(key)
            yield dotted, key
            yield from _leaves(value, dotted)
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _leaves(value, f"{name}.{index}" if isinstance(value, dict) else name)
    else:
        yield name, node


def _unusable(value: Any) -> str | None:
    """Return why no key can use the value, or None."""
    if isinstance(value, int) and abs(value) >= 2**64:
        return "is out of range"
    if not isinstance(value, str):
        return None
    if not value.strip():
        return "is empty (to leave a key unset, leave it out or give null)"
    if _NO_TEXT.search(value):
        return "holds a character that no path or text file takes"
    if command := swallowed(value):
        return (
            f"holds a control character where {command!r:.40} was meant: within double quotes a backslash begins an "
            "escape; take single quotes"
        )
    if _CREDENTIALS.search(value):
        return "holds credentials, which belong in the environment: the configuration is copied into the run folder"
    return None


def _unknown(tree: dict[str, Any], section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield the file's keys that the schema lacks; of a foreign section, the leaves that we know by another name."""
    for name, value in tree.items():
        dotted, field = f"{prefix}{name}", section.model_fields.get(name)
        if field is None:
            yield from [leaf for leaf in _names(value, dotted) if synonyms.answer(leaf)] or [dotted]
        elif isinstance(value, dict) and isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _unknown(value, field.annotation, f"{dotted}.")


def _names(node: Any, dotted: str) -> Iterator[str]:
    """Yield the dotted names of all leaves at and below ``node``."""
    if isinstance(node, dict):
        for name, value in node.items():
            yield from _names(value, f"{dotted}.{name}")
    else:
        yield dotted


def _unknown_key(prefix: str, dotted: str) -> str:
    """Return what to write instead; ``prefix`` is that of the key's stage."""
    if _SECRET_NAME.search(dotted):
        return f"{prefix}{dotted}: no key holds a secret; it comes from the environment"
    if here := synonyms.answer(dotted):
        return f"{prefix}{dotted}: unknown key; here it is {here}"
    known = [name for name, _ in walk()]
    sections = sorted({name.rsplit(".", 1)[0] for name in known})
    near = difflib.get_close_matches(dotted, known + sections, n=1, cutoff=0.0)
    return f"{prefix}{dotted}: unknown key; the nearest known key is {near[0]}"
