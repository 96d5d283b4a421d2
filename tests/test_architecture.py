"""The shape of the package: folders in layers, modules of useful size, and the documented Python API."""

import ast
import re
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from megatron_dypo.objectives.recipes import RECIPES

PACKAGE = Path(__file__).parents[1] / "megatron_dypo"
MODULES = {path: path.relative_to(PACKAGE.parent).with_suffix("").parts for path in PACKAGE.rglob("*.py")}


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Yield (module, line) of every import of this package, including inside functions and under TYPE_CHECKING."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def room(parts: tuple[str, ...]) -> str | None:
    """Return the folder of a dotted name, or the top-level module; None for the package's own ``__init__``."""
    top = PACKAGE / parts[1] if len(parts) > 1 else PACKAGE
    if top == PACKAGE or parts[1] == "__init__" or not (top.is_dir() or top.with_suffix(".py").is_file()):
        return None
    return parts[1]


def edges(modules: dict[Path, tuple[str, ...]] = MODULES) -> dict[str, dict[str, str]]:
    """Return room -> the rooms it imports, each with one place of an import."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for path, parts in modules.items():
        for name, line in imports(path):
            names = tuple(name.split("."))
            if names[0] != "megatron_dypo" or (target := room(names)) is None:
                continue
            if (source := room(parts)) and source != target:
                found[source][target] = f"{path.relative_to(PACKAGE)}:{line}"
    return found


def cycle(graph: dict[str, dict[str, str]]) -> list[str] | None:
    """Return one cycle of rooms as its imports, or None."""
    done: set[str] = set()

    def walk(at: str, path: list[str]) -> list[str] | None:
        if at in path:
            circle = [*path[path.index(at) :], at]
            return [f"{graph[a][b]} imports {b}" for a, b in pairwise(circle)]
        if at in done:
            return None
        for target in graph.get(at, {}):
            if found := walk(target, [*path, at]):
                return found
        done.add(at)
        return None

    return next((found for start in list(graph) if (found := walk(start, []))), None)


def test_folders_import_each_other_in_one_direction_only():
    assert cycle(edges()) is None


def test_a_circle_of_folders_is_found():
    graph = edges()
    graph["kernels"] = graph.get("kernels", {}) | {"trainer": "kernels/head.py:1"}
    found = cycle(graph)
    assert found and any("kernels/head.py:1 imports trainer" in step for step in found)


def test_modules_are_worth_opening_and_none_is_too_long():
    lengths = {path: len(path.read_text().splitlines()) for path in MODULES if path.name != "__init__.py"}
    assert 120 <= statistics.median(lengths.values()) <= 180
    too_long = {str(path.relative_to(PACKAGE)): lines for path, lines in lengths.items() if lines > 350}
    assert not too_long


@pytest.mark.parametrize("folder", ["kernels", "objectives"])
def test_kernels_and_objectives_need_torch_alone(folder):
    check = (
        f"import sys, megatron_dypo.{folder}\n"
        "print(*sorted({name.split('.')[0] for name in sys.modules} & {'megatron', 'vllm', 'transformers', 'ray'}))"
    )
    ran = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=120, check=True)
    assert ran.stdout.split() == []


KNOW_RECIPES = {"objectives/recipes.py", "config/reads.py", "config/sections_training.py"}


def compared_names(source: str) -> Iterator[str]:
    """Yield comparisons of a source text with a recipe's name; ``luffy`` is a shape's name, too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            operands = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            operands = [node.value]
        else:
            continue
        leaves = [leaf for operand in operands for leaf in (operand, *getattr(operand, "elts", ()))]
        constants = {leaf.value for leaf in leaves if isinstance(leaf, ast.Constant)}
        if constants & RECIPES.keys() and "shape" not in ast.unparse(node).lower():
            yield f"line {node.lineno if isinstance(node, ast.Compare) else node.value.lineno}: {ast.unparse(node)}"


def test_no_recipe_s_name_is_tested_but_in_the_table_and_in_what_config_knows_of_it():
    sources = {str(path.relative_to(PACKAGE)): path.read_text() for path in MODULES}
    assert sources.keys() >= KNOW_RECIPES
    assert not {f"{name}: {found}" for name in sources.keys() - KNOW_RECIPES for found in compared_names(sources[name])}


@pytest.mark.parametrize(
    "line",
    [
        'if objective.method == "grpo": pass',
        'alone = config.objective.method not in ("sft", "other")',
        'if run.setting("objective", "method") != "sft": pass',
        'match method:\n    case "luffy": pass',
    ],
)
def test_a_recipe_s_name_that_is_tested_is_found(line):
    assert list(compared_names(line)) and not list(compared_names('if rule.shape == "luffy" or name == "dypos": pass'))


API = """
import megatron_dypo
from megatron_dypo.objectives import Regime, grade, group_advantages, gal_coefficients, dypo_loss
from megatron_dypo.kernels import linear_logprob, linear_loss
from megatron_dypo.config.schema import Reward
from megatron_dypo.records import Prompt
from megatron_dypo.reward import build_reward
from megatron_dypo import load_config, Config, train, Policy, linear_logprob, linear_loss, dypo_loss
from megatron_dypo import build_reward, final_answer, plan
"""


@pytest.mark.parametrize("line", API.strip().splitlines())
def test_every_import_of_the_python_api_works(line):
    exec(line, {})  # noqa: S102 - the lines above


def names_of_files() -> Iterator[tuple[str, str]]:
    """Yield (where, name) of every file of the package named by docs, docstrings and comments."""
    pages = [PACKAGE.parent / "README.md", *(PACKAGE.parent / "docs").glob("*.md")]
    for path in [*MODULES, *pages]:
        for name in re.findall(r"(?<![\w/.<])(?:[a-z_]+/)*[a-z_0-9]+\.py\b", path.read_text()):
            yield str(path.relative_to(PACKAGE.parent)), name


def test_every_file_that_docs_and_docstrings_name_is_there():
    """Names are relative to a module's folder, the package or the repository; a page may name any of the files."""
    of_others = {
        "path/file.py",
        "cute/interface.py",
        "tools/checkpoint/convert.py",
        "short.py",
        "make_data.py",
        "reward.py",
    }
    anywhere = {path.name for path in MODULES}
    missing = {
        (where, name)
        for where, name in names_of_files()
        if name not in of_others
        and not (where.endswith(".md") and name in anywhere)
        and not any(
            (folder / name).exists()
            for folder in (PACKAGE, PACKAGE.parent, PACKAGE.parent / "docs", (PACKAGE.parent / where).parent)
        )
    }
    assert not missing
