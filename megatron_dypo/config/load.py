"""YAML files + dotted overrides -> validated ``Config``; every complaint is one line that names file and key."""

from __future__ import annotations

import difflib
import json
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from megatron_dypo.config import synonyms
from megatron_dypo.config.checks import check
from megatron_dypo.config.reads import idle_keys, lookup, set_aside
from megatron_dypo.config.renamed import answers, rename_tree
from megatron_dypo.config.schema import Config, Parallel, walk
from megatron_dypo.config.yaml_text import parse_yaml
from megatron_dypo.errors import UserError
from megatron_dypo.escapes import swallowed

log = logging.getLogger(__name__)

# What must not get into a run folder or a log, even in the line that refuses it.
_CREDENTIALS = re.compile(r"://[^/\s@]*:[^/\s@]*@")
_SECRET_NAME = re.compile("token$|password|passwd|secret|credential|api_?key", re.IGNORECASE)
_OPAQUE = re.compile(r"[\w-]{20,}")
_VARIABLE = re.compile(r"\$(\w+|\{[^}]*\})")
SHOWN = 8  # unknown keys that one line names at most
_NO_TEXT = re.compile("[\0\ud800-\udfff]")  # what YAML can escape, and no path or file takes


def load_config(path: str | Path, overrides: list[str] | None = None, *, recorded: bool = False) -> Config:
    """Read ``path``, apply ``section.key=value`` overrides (a later one wins), validate.

    A word of ``overrides`` that ends in ``.yaml`` is a file, and stands for an override of each of its keys.
    A key of the file that is not read because of an override has its default, and a line of information says so.
    ``recorded``: a run folder's ``config.yaml``, in which keys that were renamed since are read.
    Raises UserError: unreadable file, bad YAML, unknown key (names the nearest known one), old name of a key (names
    today's), wrong type or value, a key that is not read, or a combination of values that cannot work.
    """
    path, overrides = Path(path), list(_spelled(overrides or []))
    config = _read(path, overrides, recorded)
    notes = _set_aside(config, overrides, str(path), recorded)
    if notes:
        said = [f"not read with {decided}: {', '.join(keys)}" for decided, keys in notes.items()]
        log.info("%s: %s", path, "; ".join(said))
    check(config, str(path))
    return config


def _set_aside(config: Config, overrides: list[str], source: str, recorded: bool = False) -> dict[str, list[str]]:
    """As ``reads.set_aside``, which does not know files."""
    named = tuple(f"{override.partition('=')[0]}." for override in overrides)
    try:
        return set_aside(config, {key for key, _ in walk() if f"{key}.".startswith(named)}, recorded)
    except ValueError as error:
        raise UserError(f"{source}: {error}") from None


def still_read(path: str | Path, overrides: list[str]) -> list[str]:
    """``overrides`` without those of keys that the others make idle."""
    idle = {each.key for each in idle_keys(_read(Path(path), list(_spelled(overrides))))}
    return [override for override in overrides if override.partition("=")[0] not in idle]


def _read(path: Path, overrides: list[str], recorded: bool = False) -> Config:
    """File and overrides, each key by itself as it must be."""
    tree = _tree(path)
    if recorded:
        rename_tree(tree)
    for override in overrides:
        _apply(tree, override)
    _refuse_old_names(tree, str(path))
    for name, value in _leaves(tree):
        if fault := _unusable(value):
            raise UserError(f"{path}: {name}: {fault}")
    _expand_paths(tree, str(path))
    return _validate(tree, str(path))


def _tree(path: Path) -> dict[str, Any]:
    """The sections of a YAML file."""
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot read the configuration: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: the configuration must be a mapping of sections")
    return tree


def _spelled(overrides: list[str]) -> Iterator[str]:
    """The overrides with ``section.key=value`` for each key of a word that is a YAML file."""
    for word in overrides:
        if "=" in word or not word.endswith((".yaml", ".yml")):
            yield word
            continue
        tree = _tree(Path(word))
        _refuse_old_names(tree, word)
        _require_known(tree, word)
        yield from (f"{dotted}={json.dumps(value)}" for dotted, value in _keys(tree))


def _keys(section: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every known key."""
    known = dict(walk())
    for name, value in section.items():
        dotted = f"{prefix}{name}"
        if isinstance(value, dict) and dotted not in known:
            yield from _keys(value, f"{dotted}.")
        else:
            yield dotted, value


def load_parallel(overrides: list[str], source: str) -> Parallel:
    """A layout from ``parallel.key=value`` overrides alone. Raises UserError as ``load_config``, and for other keys."""
    for override in overrides:
        if not override.startswith("parallel."):
            raise UserError(f"{source}: override {override!r:.80}: expected parallel.key=value")
    return load_keys(overrides, source).parallel


def load_keys(overrides: list[str], source: str) -> Config:
    """The configuration of ``section.key=value`` overrides alone, of made-up model and data.

    Raises UserError as ``load_config``.
    """
    tree: dict[str, Any] = {"model": {"preset": "any"}, "data": {"train": "any"}}
    tree["trainer"] = {"steps": 1, "run_dir": "any"}
    for override in overrides:
        _apply(tree, override)
    config = _validate(tree, source)
    _set_aside(config, overrides, source)
    check(config, source)
    return config


def _apply(tree: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise UserError(f"override {override!r}: expected section.key=value")
    try:
        value = parse_yaml(text)
    except ValueError:
        value = text
    *parents, last = dotted.split(".")
    node = tree
    for parent in parents:
        child = node.get(parent)
        node[parent] = child if isinstance(child, dict) else {}
        node = node[parent]
    node[last] = value


def _expand_paths(tree: dict[str, Any], source: str) -> None:
    """Put a home folder for `~` and the environment's value for `$VARIABLE` into every key that is a path.

    Raises UserError for a variable that is not set and a user who has no home folder.
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
            raise UserError(f"{source}: {dotted}: {value}: the environment has no {unset[0]}")
        if expanded.startswith("~"):
            raise UserError(f"{source}: {dotted}: {value}: no home folder for {expanded.split('/')[0]}")


def _leaves(node: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of whatever YAML gave, keys of mappings themselves included."""
    if isinstance(node, dict):
        for key, value in node.items():
            dotted = f"{name}.{key}" if name else str(key)
            yield dotted, key
            yield from _leaves(value, dotted)
    elif isinstance(node, list):
        for value in node:
            yield from _leaves(value, name)
    else:
        yield name, node


def _unusable(value: Any) -> str | None:
    """What no key can use, whatever it is for."""
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


def _refuse_old_names(tree: dict[str, Any], source: str) -> None:
    if old := answers(tree):
        raise UserError(f"{source}: {'; '.join(old)}")


def _require_known(tree: dict[str, Any], source: str) -> None:
    if unknown := [_unknown_key(dotted) for dotted in _unknown(tree, Config)]:
        more = f"; and {len(unknown) - SHOWN} more" if len(unknown) > SHOWN else ""
        raise UserError(f"{source}: {'; '.join(unknown[:SHOWN])}{more}")


def _validate(tree: dict[str, Any], source: str) -> Config:
    _require_known(tree, source)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{source}: {_one_line(error)}") from None


def _unknown(tree: dict[str, Any], section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """What the file has and the schema has not: of a foreign section the leaves that we know by another name."""
    for name, value in tree.items():
        dotted, field = f"{prefix}{name}", section.model_fields.get(name)
        if field is None:
            yield from [leaf for leaf in _names(value, dotted) if synonyms.answer(leaf)] or [dotted]
        elif isinstance(value, dict) and isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _unknown(value, field.annotation, f"{dotted}.")


def _names(node: Any, dotted: str) -> Iterator[str]:
    """The dotted name of whatever is not a mapping at and below ``node``."""
    if isinstance(node, dict):
        for name, value in node.items():
            yield from _names(value, f"{dotted}.{name}")
    else:
        yield dotted


def _unknown_key(dotted: str) -> str:
    """Say what to write instead."""
    if _SECRET_NAME.search(dotted):
        return f"{dotted}: no key holds a secret; it comes from the environment"
    if here := synonyms.answer(dotted):
        return f"{dotted}: unknown key; here it is {here}"
    known = [name for name, _ in walk()]
    sections = sorted({name.rsplit(".", 1)[0] for name in known})
    near = difflib.get_close_matches(dotted, known + sections, n=1, cutoff=0.0)
    return f"{dotted}: unknown key; the nearest known key is {near[0]}"


def _one_line(error: ValidationError) -> str:
    first = error.errors()[0]
    dotted = ".".join(str(part) for part in first["loc"])
    if first["type"] == "missing":
        return f"{dotted}: required key is missing"
    message = first["msg"][0].lower() + first["msg"][1:]
    return f"{dotted}: {message} (got {_shown(first['input'])})"


def _shown(value: Any) -> str:
    """A value as an error quotes it; not a mapping, nor a word so long that it may be a key to something."""
    if isinstance(value, dict):
        return "a mapping"
    if _OPAQUE.search(str(value)):
        return f"{len(str(value))} characters"
    return f"{value!r:.80}"


def dump(config: Config) -> str:
    """The resolved configuration as YAML: every key with its value, or its default where this run does not read it."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True)


def fingerprint(config: Config) -> dict[str, Any]:
    """The keys a run folder belongs to: all but those marked ``resumable``. Flat: dotted key -> value as written."""
    kept = [name for name, info in walk() if not info.json_schema_extra["resumable"]]
    return {name: config.written[name] if name in config.written else lookup(config, name) for name in kept}
