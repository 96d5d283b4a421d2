"""YAML file + dotted overrides -> validated ``Config``; every complaint is one line that names file and key."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from megatron_dypo.config.checks import check
from megatron_dypo.config.schema import Config, walk
from megatron_dypo.errors import UserError

# Keys (and values) that are reserved and do nothing yet.
_NOT_BUILT = {
    *("parallel.virtual_pipeline", "parallel.context", "parallel.expert", "parallel.expert_tensor"),
    *("rollout.verify_sync", "rollout.overlap", "rollout.max_staleness", "rollout.refill", "rollout.engine: server"),
    *("model.attention_backend: flash", "model.attention_backend: te", "model.layer_spec: te"),
}


class _Loader(yaml.SafeLoader):
    """YAML 1.2 where PyYAML's 1.1 surprises, and no key twice.

    ``1e-6`` is a number (not a string); ``off``, ``0x1f``, ``1_000`` and ``2020-01-01`` are strings (not false, other
    spellings of integers, and a date).
    """

    def compose_mapping_node(self, anchor):
        node, seen = super().compose_mapping_node(anchor), set()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise yaml.MarkedYAMLError(problem=f"key {key.value!r} occurs twice", problem_mark=key.start_mark)
            seen.add(str(key.value))
        return node


_TAG = "tag:yaml.org,2002:"
_REPLACED = {f"{_TAG}{name}" for name in ("bool", "int", "timestamp")}
_Loader.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if pair[0] not in _REPLACED]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _name, _pattern, _first in (
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("int", r"^[-+]?[0-9]+$", "-+0123456789"),
    ("float", r"^[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?$", "-+.0123456789"),
):
    _Loader.add_implicit_resolver(f"{_TAG}{_name}", re.compile(_pattern), list(_first))
_NOT_YAML = (yaml.YAMLError, ValueError, OverflowError, RecursionError)  # what yaml.load raises on text from outside


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read ``path``, apply ``section.key=value`` overrides (a later one wins), validate.

    Raises UserError: unreadable file, bad YAML, unknown key (names the nearest known one), wrong type or value, or a
    combination of values that cannot work.
    """
    path = Path(path)
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise UserError(f"{path}: cannot read the configuration: {error.strerror}") from None
    except _NOT_YAML as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: the configuration must be a mapping of sections")
    for override in overrides or []:
        _apply(tree, override)
    config = _validate(tree, str(path))
    check(config, str(path))
    return config


def _apply(tree: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise UserError(f"override {override!r}: expected section.key=value")
    try:
        value = yaml.load(text, _Loader)
    except _NOT_YAML:
        value = text
    *parents, last = dotted.split(".")
    node = tree
    for parent in parents:
        child = node.get(parent)
        node[parent] = child if isinstance(child, dict) else {}
        node = node[parent]
    node[last] = value


def _validate(tree: dict[str, Any], source: str) -> Config:
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{source}: {_one_line(error)}") from None


def _one_line(error: ValidationError) -> str:
    first = error.errors()[0]
    dotted = ".".join(str(part) for part in first["loc"])
    for name in (dotted, f"{dotted}: {first['input']}"):
        if name in _NOT_BUILT:
            return f"{name}: not built yet"
    if first["type"] == "extra_forbidden":
        known = [name for name, _ in walk()]
        sections = sorted({name.rsplit(".", 1)[0] for name in known})
        near = difflib.get_close_matches(dotted, known + sections, n=1, cutoff=0.0)
        return f"{dotted}: unknown key; the nearest known key is {near[0]}"
    if first["type"] == "missing":
        return f"{dotted}: required key is missing"
    message = first["msg"][0].lower() + first["msg"][1:]
    return f"{dotted}: {message} (got {first['input']!r:.80})"


def dump(config: Config) -> str:
    """The resolved configuration as YAML, every key with its value."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True)


def fingerprint(config: Config) -> dict[str, Any]:
    """The keys a run folder belongs to: all but those marked ``resumable``. Flat: dotted key -> value."""

    def lookup(dotted: str) -> Any:
        node: Any = config
        for part in dotted.split("."):
            node = getattr(node, part)
        return node

    return {name: lookup(name) for name, info in walk() if not info.json_schema_extra["resumable"]}
