"""Parse untrusted YAML as plain data: by the rules of YAML 1.2 where PyYAML's 1.1 surprises, without tags or aliases.

``1e-6`` is a number (not a string), and ``010`` is ten (not eight); ``off``, ``0x1f``, ``1_000`` and ``2020-01-01`` are
strings (not false, other spellings of integers, and a date). Duplicate keys, tags, anchors and aliases are refused, so
no text can create objects or grow when parsed.
"""

from __future__ import annotations

import re
from typing import Any

import yaml


def parse_yaml(text: str) -> Any:
    """Return the value of ``text``. Raises ValueError, in one line, if it is not such YAML."""
    try:
        return _Loader(text).get_single_data()
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except yaml.MarkedYAMLError as error:  # without its excerpt of the text, which may hold a secret
        mark = error.problem_mark or error.context_mark
        said = ", ".join(filter(None, [error.context, error.problem]))
        raise ValueError(f"line {mark.line + 1}, column {mark.column + 1}: {said}") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise ValueError(" ".join(str(error).split())) from None


class _Loader(yaml.SafeLoader):
    def compose_node(self, parent, index):
        event = self.peek_event()
        if event.anchor is not None or getattr(event, "tag", None) is not None:
            problem = "tags, anchors and aliases are not read"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def compose_mapping_node(self, anchor):
        node, seen = super().compose_mapping_node(anchor), set()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise yaml.MarkedYAMLError(problem=f"key {key.value!r} occurs twice", problem_mark=key.start_mark)
            seen.add(str(key.value))
        return node


_TAG = "tag:yaml.org,2002:"
_REPLACED = {f"{_TAG}{name}" for name in ("bool", "int", "timestamp", "merge", "value")}
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
_Loader.add_constructor(f"{_TAG}int", lambda loader, node: int(loader.construct_scalar(node)))
