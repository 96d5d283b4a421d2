"""List renamed keys and values: the one table for configurations, run folders and checkpoints."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Renamed:
    """The current name of a key; ``values`` maps old values to new ones, and is empty if they stay."""

    name: str
    values: dict[Any, Any] = field(default_factory=dict)


RENAMED = {
    "rollout.overlap": Renamed("rollout.async_rollout", {False: 0, True: 1}),
    "rollout.refill": Renamed("rollout.dynamic_sampling"),
    "rollout.verify_sync": Renamed("rollout.verify_sync", {False: "off", True: "sent"}),
    "policy.routing": Renamed(
        "policy.routing_replay", {"own": "off", "replay_old": "old", "replay_rollout": "rollout"}
    ),
    "model.shape.normalized_routing": Renamed("model.shape.norm_topk_prob"),
    "model.shape.shared_ffn_hidden_size": Renamed("model.shape.shared_expert_ffn_hidden_size"),
}


def rename(flat: dict[str, Any]) -> dict[str, Any]:
    """Return ``flat`` (dotted key -> value) with current keys and values, in the same order."""
    return dict(_today(dotted, value) for dotted, value in flat.items())


def rename_tree(tree: dict[str, Any]) -> None:
    """Replace the old keys and values in a configuration's nested mappings, in place."""
    for old in RENAMED:
        section, leaf = _find(tree, old)
        if leaf in section:
            name, value = _today(old, section.pop(leaf))
            section[name.rpartition(".")[2]] = value


def answers(tree: dict[str, Any]) -> list[str]:
    """Return one line for each old key or value in a configuration, naming the current one."""
    found = []
    for old, renamed in RENAMED.items():
        section, leaf = _find(tree, old)
        if leaf in section and (old != renamed.name or _is_old(renamed, section[leaf])):
            new = "" if old == renamed.name else f" {renamed.name}"
            choices = [f"{_text(value)} (was {_text(before)})" for before, value in renamed.values.items()]
            found.append(f"{old} is now{new}{':' if new and choices else ''} {' or '.join(choices)}".rstrip())
    return found


def _today(dotted: str, value: Any) -> tuple[str, Any]:
    renamed = RENAMED.get(dotted, Renamed(dotted))
    return renamed.name, renamed.values[value] if _is_old(renamed, value) else value


def _is_old(renamed: Renamed, value: Any) -> bool:
    return isinstance(value, bool | str) and value in renamed.values


def _find(tree: dict[str, Any], dotted: str) -> tuple[dict[str, Any], str]:
    """Return (section that holds the key, its name there); the section is empty if the file lacks it."""
    *parents, leaf = dotted.split(".")
    section: Any = tree
    for parent in parents:
        section = section.get(parent) if isinstance(section, dict) else None
    return section if isinstance(section, dict) else {}, leaf


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
