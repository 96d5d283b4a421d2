"""The keywords of torch and Megatron-Core functions that this project calls, by version.

``python -m tests.signatures WHEEL...`` reads them from wheels into ``signatures.json``, without installing or running
any of these.
"""

from __future__ import annotations

import ast
import json
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

RECORDED = Path(__file__).with_suffix(".json")
_PACKAGE = Path(__file__).parents[1] / "megatron_dypo"
_FROM = ("megatron.core", "torch.nn.attention")
_DISTRIBUTIONS = {"torch": "torch.nn.attention", "megatron_core": "megatron.core"}


def calls() -> Iterator[tuple[str, str, set[str]]]:
    """Yield (where, dotted function or class, keywords) of every keyword call of what is imported from ``_FROM``."""
    for path in sorted(_PACKAGE.rglob("*.py")):
        tree, imported = ast.parse(path.read_text()), {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(_FROM):
                imported |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            name, _, attribute = ast.unparse(node.func).partition(".")
            dotted = f"{imported.get(name, '')}{'.' if attribute else ''}{attribute}"
            keywords = {keyword.arg for keyword in node.keywords if keyword.arg}
            if node.args and ast.unparse(node.func) == "accepted":  # these may be unknown
                name, keywords = ast.unparse(node.args[0]), set()
                dotted = imported.get(name, "")
            if name in imported and keywords and "ModuleSpec" not in dotted:
                yield f"{path.relative_to(_PACKAGE)}:{node.lineno}", dotted, keywords


def recorded() -> dict[str, dict[str, list[str] | None]]:
    """Return dotted name -> version -> the names that may be given by keyword; None: any."""
    table = json.loads(RECORDED.read_text())
    return {
        dotted: {version: names and names.split() for version, names in versions.items()}
        for dotted, versions in table.items()
    }


def _record(wheel: Path, wanted: set[str]) -> dict[str, list[str] | None]:
    """Return what this wheel's source has of the ``wanted`` names."""
    package = _DISTRIBUTIONS[wheel.name.split("-")[0]]
    trees = []
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.startswith(package.replace(".", "/")) and name.endswith(".py"):
                trees.append(ast.parse(archive.read(name)))
    found: dict[str, ast.ClassDef | ast.FunctionDef] = {}
    for tree in trees:  # a name is unique in these packages, wherever it is defined
        for node in tree.body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                found.setdefault(node.name, node)
    names = {dotted: dotted.rpartition(".")[2] for dotted in wanted if dotted.startswith(package)}
    return {dotted: _keywords(found[name], found) for dotted, name in names.items() if name in found}


def _keywords(node: ast.ClassDef | ast.FunctionDef, found: dict) -> list[str] | None:
    if isinstance(node, ast.FunctionDef):
        for decorator in node.decorator_list:
            if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "copy_signature":
                return _keywords(found[ast.unparse(decorator.args[0])], found)
        every = [each.arg for each in node.args.args + node.args.kwonlyargs if each.arg != "self"]
        return None if node.args.kwarg else every
    for part in node.body:
        if isinstance(part, ast.FunctionDef) and part.name == "__init__":
            return _keywords(part, found)
    bases = [found[ast.unparse(base)] for base in node.bases if ast.unparse(base) in found]
    inherited = [name for base in bases for name in _keywords(base, found) or ()]
    own = [part.target.id for part in node.body if isinstance(part, ast.AnnAssign)]
    return list(dict.fromkeys([*inherited, *own]))


if __name__ == "__main__":
    table = recorded() if RECORDED.exists() else {}
    wanted = {dotted for _, dotted, _ in calls()} | {"torch.nn.attention.varlen.varlen_attn"}
    for wheel in map(Path, sys.argv[1:]):
        for dotted, keywords in _record(wheel, wanted).items():
            table.setdefault(dotted, {})[wheel.name.split("-")[1]] = keywords
    table = {
        dotted: {version: names and " ".join(names) for version, names in versions.items()}
        for dotted, versions in table.items()
    }
    RECORDED.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
