"""YAML files + dotted overrides -> validated ``Config``; every complaint is one line that names file and key."""

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
    """Read ``path``, apply ``section.key=value`` overrides (a later one wins), validate.

    A word of ``overrides`` that ends in ``.yaml`` is a file, and stands for an override of each of its keys.
    A key of the file that is not read because of an override has its default, and a line of information says so.
    ``recorded``: a run folder's ``config.yaml``, in which keys that were renamed since are read.
    Raises UserError: unreadable file, bad YAML, unknown key (names the nearest known one), old name of a key (names
    today's), wrong type or value, a key that is not read, or a combination of values that cannot work.
    """
    path, overrides = Path(path), list(spelled(overrides or []))
    return _resolve(read_tree(path, overrides, recorded), overrides, str(path), recorded)


def still_read(path: str | Path, overrides: list[str]) -> list[str]:
    """``overrides`` without those of keys that the others make idle."""
    _, configs = _each_stage(read_tree(Path(path), list(spelled(overrides))), str(path))
    idle = set.intersection(*({each.key for each in idle_keys(config)} for config in configs))
    return [override for override in overrides if override.partition("=")[0] not in idle]


def _resolve(tree: dict[str, Any], overrides: list[str], source: str, recorded: bool = False) -> Config:
    """The configuration of a tree: of one stage, or joined from several, each as valid as a run of its own."""
    own, configs = _each_stage(tree, source)
    _refuse_hidden(own, overrides, source)
    not_read = [unread(config).keys() for config in configs]
    if not recorded and (dead := _hidden_by_stages(tree, overrides, own, not_read)):
        raise UserError(f"{source}: {dead}: never read: every stage that reads it sets its own")
    _set_aside(own, configs, overrides, source, recorded)
    broken = [fault(config) for config in configs]
    for index, said in enumerate(broken):
        if said:
            where = f"stages.{index}: " if len({*broken}) > 1 else ""  # the same in all: no stage's own
            raise UserError(f"{source}: {where}{said}")
    return configs[0] if tree.get("stages") is None else stages.joined(configs)


def _set_aside(
    own: list[dict[str, Any]], configs: list[Config], overrides: list[str], source: str, recorded: bool
) -> None:
    """Put defaults in place of what is not read: because of an override, or in this stage and not in others.

    Raises UserError where the file, or an override, gives a key that nothing reads. A ``recorded`` file may: it is of
    before such keys were refused.
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
    notes: dict[str, dict[str, None]] = {}  # in the order of the table
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
    """(what each stage gives itself, its configuration, each key by itself as it must be); one stage without any."""
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
    """The first key that the file gives for all stages, and none of them takes from there."""
    late = {name for index, given in enumerate(own) for name in _named_in_stage(overrides, index, given)}
    for name in sorted(leaves(dict(stages.parts(tree))[""]) - late):
        taken = [not has(given, name) and name not in unread for given, unread in zip(own, idle, strict=True)]
        if not any(taken) and any(has(given, name) for given in own):
            return name
    return None


def _named_in_stage(overrides: list[str], index: int, given: dict[str, Any]) -> Iterator[str]:
    """The keys that overrides of stage ``index`` give."""
    for override in overrides:
        name = override.partition("=")[0]
        if name in ("stages", f"stages.{index}"):
            yield from leaves(given)
        elif name.startswith(f"stages.{index}."):
            yield name.removeprefix(f"stages.{index}.")


def _refuse_hidden(own: list[dict[str, Any]], overrides: list[str], source: str) -> None:
    """Raise UserError where an override is for all stages, and one of them has a value of its own there already."""
    names = [override.partition("=")[0] for override in overrides]
    first = len(names) - names[::-1].index("stages") if "stages" in names else 0  # after the stages themselves
    for name in names[first:]:
        for index, given in enumerate(own):
            for key in sorted(leaves(given)):
                if f"{key}.".startswith(f"{name}.") or f"{name}.".startswith(f"{key}."):
                    raise UserError(f"{source}: override {name}: a stage sets its own; give stages.{index}.{key}=...")


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
    if any(override.startswith("stages") for override in overrides):
        del tree["trainer"]["steps"]
    for override in overrides:
        apply_override(tree, override)
    require_known(tree, source)
    return _resolve(tree, overrides, source)


def _validate(tree: dict[str, Any], source: str, own: dict[str, Any] | None = None, prefix: str = "") -> Config:
    """``own``: what of the tree is a stage's, whose keys are named with ``prefix``."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        dotted, said = _one_line(error)
        raise UserError(f"{source}: {prefix if own and has(own, dotted) else ''}{dotted}: {said}") from None


def _one_line(error: ValidationError) -> tuple[str, str]:
    """(the key, what is wrong with it)."""
    first = error.errors()[0]
    dotted = ".".join(str(part) for part in first["loc"])
    if first["type"] == "missing":
        return dotted, "required key is missing"
    message = first["msg"][0].lower() + first["msg"][1:]
    return dotted, f"{message} (got {_shown(first['input'])})"


def _shown(value: Any) -> str:
    """A value as an error quotes it; not a mapping, nor a word so long that it may be a key to something."""
    if isinstance(value, dict):
        return "a mapping"
    if _OPAQUE.search(str(value)):
        return f"{len(str(value))} characters"
    return f"{value!r:.80}"


def dump(config: Config) -> str:
    """The resolved configuration as YAML: every key with its value, or its default where this run does not read it.

    Of a run with stages, what a stage may give is in each of them, and nowhere else.
    """
    tree = config.model_dump()
    if config.stages is not None:
        own = {*stage_keys(), "stages"}
        tree = stages.tree_of(config, [name for name, _ in walk() if name not in own]) | {"stages": tree["stages"]}
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def fingerprint(config: Config) -> dict[str, Any]:
    """The keys a run folder belongs to: all but those marked ``resumable``. Flat: dotted key -> value as written.

    In a run with stages, what a stage may give is under ``stages``: such a mapping of each, its steps among them.
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
