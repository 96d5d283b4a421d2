"""The ratchet of type errors (`make types`): no folder's number rises, and a lower one is recorded."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOUND = "def double(x: int) -> int:\n    return 2 * x\n"
WRONG = 'def double(x: int) -> int:\n    return "2" * x\n\n\ndouble("a")\n'  # 2 errors


def ratchet(folder: Path, *options: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, ROOT / "tools/type_ratchet.py", *options], cwd=folder, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """Return mypy's cache of the standard library."""
    return tmp_path_factory.mktemp("mypy_cache")


@pytest.fixture
def package(tmp_path, cache):
    """A repository with one package: ``a/`` is allowed 3 errors and has 2; ``b/`` and the top's ``c.py`` are clean."""
    pytest.importorskip("mypy", reason="an environment from before mypy was pinned: make venv")
    (tmp_path / "pyproject.toml").write_text(f'[tool.mypy]\nfiles = ["package"]\ncache_dir = "{cache}"\n')
    for name, text in {"a/m": WRONG, "b/m": SOUND, "c": SOUND}.items():
        path = tmp_path / "package" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / "__init__.py").touch()
        path.write_text(text)
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools/type_errors.json").write_text('{"package/a": 3}')
    return tmp_path


def allowed(package: Path) -> dict[str, int]:
    return json.loads((package / "tools/type_errors.json").read_text())


def test_a_number_that_has_fallen_is_told_and_lowered_when_asked(package):
    told = ratchet(package)
    assert told.returncode == 0 and "package/a: 2 type errors; tools/type_errors.json allows 3" in told.stdout
    assert allowed(package) == {"package/a": 3}
    assert ratchet(package, "--lower").returncode == 0
    assert allowed(package) == {"package/a": 2}
    (package / "package/a/m.py").write_text(SOUND)
    assert ratchet(package, "--lower").returncode == 0
    assert allowed(package) == {}


@pytest.mark.parametrize(
    ("name", "limits"), [("a/n", {"package/a": 3}), ("b/m", {"package/b": 0}), ("c", {"package/c.py": 0})]
)
def test_a_number_that_rises_fails_with_its_errors_and_is_never_written_down(package, name, limits):
    before = allowed(package)
    (package / f"package/{name}.py").write_text(WRONG)
    for options in ((), ("--lower",)):
        risen = ratchet(package, *options)
        assert risen.returncode == 1 and f"package/{name}.py:2: error: " in risen.stdout
        for place, number in limits.items():
            assert f"{place}: {number + 1 if number else 2} type errors; " in risen.stdout
        assert allowed(package) == before


def test_what_mypy_cannot_read_is_an_error_of_its_own(package):
    (package / "package/a/m.py").write_text("def double(:\n")
    unread = ratchet(package, "--lower")
    assert unread.returncode == 2 and "package/a/m.py:1: error: " in unread.stderr
    assert allowed(package) == {"package/a": 3}


def test_the_folders_that_are_clean_stay_off_the_list():
    clean = {"records.py", "errors.py", "config", "objectives", "training", "kernels"}
    listed = json.loads((ROOT / "tools/type_errors.json").read_text())
    assert not {f"megatron_dypo/{name}" for name in clean} & listed.keys()
    assert all((ROOT / place).exists() for place in listed)
