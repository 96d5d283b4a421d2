"""Load YAML files and dotted overrides into a validated ``Config``; each error is one line that names file and key."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from megatron_dypo.config import stages
from megatron_dypo.config.checks import fault
from megatron_dypo.config.reads import deciding, idle_keys, lookup, put_aside, refusal, unread
from megatron_dypo.config.schema import Config, Parallel, walk
from megatron_dypo.config.stages import has, leaves, stage_keys
from megatron_dypo.config.tree import apply_override, read_tree, require_known, spelled
from megatron_dypo.errors import UserError

log = logging.getLogger(__name__)

_OPAQUE = re.compile(r"[\w-]{20,}")


def load_config(path: str | Path, overrides: list[str] | None = None, *, recorded: bool = False) -> Config:
    """Read ``path``, apply ``section.key=value`` overrides (the last one wins), validate.

    A word of ``overrides`` that ends in ``.yaml`` is a file that overrides each of its keys.
    A key of the file that an override makes idle gets its default, and one log line says so.
    ``recorded``: accept renamed keys, as in the ``config.yaml`` of an older run folder.
    Raises UserError: unreadable file, bad YAML, unknown key (names the nearest known one), old name of a key (names
    the current one), wrong type or value, a key that is not read, or a combination of values that cannot work.
    """
    path, overrides = Path(path), list(spelled(overrides or []))
    return _resolve(read_tree(path, overrides, recorded), overrides, str(path), recorded)


def still_read(path: str | Path, overrides: list[str]) -> list[str]:
    """Return ``overrides`` without the keys that the other overrides make idle."""
    _, configs = _each_stage(read_tree(Path(path), list(spelled(overrides))), str(path))
    idle = set.intersection(*({each.key for each in idle_keys(config)} for config in configs))
    return [override for override in overrides if override.partition("=")[0] not in idle]


def _resolve(tree: dict[str, Any], overrides: list[str], source: str, recorded: bool = False) -> Config:
    """Return the configuration of a tree: of its one stage, or joined from several, each valid as a run by itself."""
    own, configs = _each_stage(tree, source)
    _refuse_hidden(own, overrides, source)
    not_read = [unread(config).keys() for config in configs]
    if not recorded and (dead := _hidden_by_stages(tree, overrides, own, not_read)):
        raise UserError(f"{source}: {dead}: never read: every stage that reads it sets its own")
    _set_aside(own, configs, overrides, source, recorded)
    broken = [fault(config) for config in configs]
    for index, said in enumerate(broken):
        if said:
            where = f"stages.{index}: " if len({*broken}) > 1 else ""  # the same in all stages: the run's
            raise UserError(f"{source}: {where}{said}")
    return configs[0] if tree.get("stages") is None else stages.joined(configs)


def _set_aside(
    own: list[dict[str, Any]], configs: list[Config], overrides: list[str], source: str, recorded: bool
) -> None:
    """Reset keys that are not read to their defaults: those that an override or another stage makes idle.

    Raises UserError if the file or an override sets a key that nothing reads, unless ``recorded``: such a file may be
    older than that rule.
    """
    idle = [{each.key: each for each in idle_keys(config)} for config in configs]
    nowhere = set.intersection(*(set(unread(config)) for config in configs))
    refused: dict[str, list[str | None]] = {}
    for index, (given, config, found) in enumerate(zip(own, configs, idle, strict=True)):
        names = [override.partition("=")[0] for override in overrides]
        named = tuple(f"{name}." for name in [*names, *_named_in_stage(overrides, index, given)])
        keys = {key for key, _ in walk() if f"{key}.".startswith(named)}
        for key, each in found.items():
            if recorded or not (key in nowhere or has(given, key)):
                continue
            said = refusal(config, each, keys)
            if said and has(given, key):
                raise UserError(f"{source}: stages.{index}.{said}")
            refused.setdefault(key, []).append(said)
    for everywhere in refused.values():
        if all(everywhere):
            raise UserError(f"{source}: {everywhere[0]}")
    notes: dict[str, dict[str, None]] = {}  # in the order of READ_WITH
    of_stages = stage_keys()
    for config, found in zip(configs, idle, strict=True):
        for key, each in found.items():
            if key in nowhere:
                notes.setdefault(deciding(config, each.failing[0]), {})[key] = None
            if key in nowhere or key in of_stages:
                put_aside(config, each)
    if notes:
        lines = [f"not read with {decided}: {', '.join(keys)}" for decided, keys in notes.items()]
        log.info("%s: %s", source, "; ".join(lines))


def _each_stage(tree: dict[str, Any], source: str) -> tuple[list[dict[str, Any]], list[Config]]:
    """Return what each stage sets, and its configuration, validated key by key; a run without stages has one."""
    sections = dict(stages.parts(tree))
    base = sections.pop("")
    if tree.get("stages") is None:
        return [{}], [_validate(base, source)]
    for said in stages.faults(tree):
        raise UserError(f"{source}: {said}")
    own = list(sections.values())
    return own, [_validate(stages.merged(base, part), source, part, prefix) for prefix, part in sections.items()]


def _hidden_by_stages(
    tree: dict[str, Any], overrides: list[str], own: list[dict[str, Any]], idle: Sequence[Collection[str]]
) -> str | None:
    """Return the first key that the file sets for all stages although no stage takes it from there."""
    late = {name for index, given in enumerate(own) for name in _named_in_stage(overrides, index, given)}
    for name in sorted(leaves(dict(stages.parts(tree))[""]) - late):
        taken = [not has(given, name) and name not in unread for given, unread in zip(own, idle, strict=True)]
        if not any(taken) and any(has(given, name) for given in own):
            return name
    return None


def _named_in_stage(overrides: list[str], index: int, given: dict[str, Any]) -> Iterator[str]:
    """Yield the keys that the overrides of stage ``index`` set."""
    for override in overrides:
        name = override.partition("=")[0]
        if name in ("stages", f"stages.{index}"):
            yield from leaves(given)
        elif name.startswith(f"stages.{index}."):
            yield name.removeprefix(f"stages.{index}.")


def _refuse_hidden(own: list[dict[str, Any]], overrides: list[str], source: str) -> None:
    """Raise UserError if an override applies to all stages and one of them sets the key itself."""
    names = [override.partition("=")[0] for override in overrides]
    first = len(names) - names[::-1].index("stages") if "stages" in names else 0  # after the stages themselves
    for name in names[first:]:
        for index, given in enumerate(own):
            for key in sorted(leaves(given)):
                if f"{key}.".startswith(f"{name}.") or f"{name}.".startswith(f"{key}."):
                    raise UserError(f"{source}: override {name}: a stage sets its own; give stages.{index}.{key}=...")


def load_parallel(overrides: list[str], source: str) -> Parallel:
    """Load a layout from ``parallel.key=value`` overrides. Raises UserError as ``load_config``, and for other keys."""
    for override in overrides:
        if not override.startswith("parallel."):
            raise UserError(f"{source}: override {override!r:.80}: expected parallel.key=value")
    return load_keys(overrides, source).parallel


def load_keys(overrides: list[str], source: str) -> Config:
    """Load a configuration from ``section.key=value`` overrides alone, with placeholders for model and data.

    Raises UserError as ``load_config``.
    """
    tree: dict[str, Any] = {"model": {"preset": "any"}, "data": {"train": "any"}}
    tree["trainer"] = {"steps": 1, "run_dir": "any"}
    if any(override.startswith("stages") for override in overrides):
        del tree["trainer"]["steps"]
    for override in overrides:
        apply_override(tree, override)
    require_known(tree, source)
    return _resolve(tree, overrides, source)


def _validate(tree: dict[str, Any], source: str, own: dict[str, Any] | None = None, prefix: str = "") -> Config:
    """Validate a tree; errors name the keys in ``own``, which a stage set, with ``prefix``."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        dotted, said = _one_line(error)
        raise UserError(f"{source}: {prefix if own and has(own, dotted) else ''}{dotted}: {said}") from None


def _one_line(error: ValidationError) -> tuple[str, str]:
    """Return (key, what is wrong with it) of pydantic's first error."""
    first = error.errors()[0]
    dotted = ".".join(str(part) for part in first["loc"])
    if first["type"] == "missing":
        return dotted, "required key is missing"
    message = first["msg"][0].lower() + first["msg"][1:]
    return dotted, f"{message} (got {_shown(first['input'])})"


def _shown(value: Any) -> str:
    """Format a value for an error; hide mappings, and words long enough to be a secret."""
    if isinstance(value, dict):
        return "a mapping"
    if _OPAQUE.search(str(value)):
        return f"{len(str(value))} characters"
    return f"{value!r:.80}"


def dump(config: Config) -> str:
    """Return the resolved configuration as YAML: every key with its value, or its default if this run does not read it.

    In a run with stages, the keys of stages appear in each stage, and nowhere else.
    """
    tree = config.model_dump()
    if config.stages is not None:
        own = {*stage_keys(), "stages"}
        tree = stages.tree_of(config, [name for name, _ in walk() if name not in own]) | {"stages": tree["stages"]}
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def fingerprint(config: Config) -> dict[str, Any]:
    """Return the keys that identify a run, all but the ``resumable`` ones: flat, dotted key -> value as written.

    In a run with stages, ``stages`` holds one such mapping per stage, its number of steps included.
    """
    kept = [name for name, info in walk() if not info.json_schema_extra["resumable"]]
    if config.stages is None:
        return {name: config.written.get(name, lookup(config, name)) for name in kept}
    own = [name for name in stage_keys() if name in kept or name == stages.STEPS]
    values = {name: config.written.get(name, lookup(config, name)) for name in kept if name not in own}
    return values | {
        "stages": [
            {name: config.written.get(f"stages.{at.index}.{name}", lookup(at.config, name)) for name in own}
            for at in stages.stages_of(config)
        ]
    }
