"""Load the user's own functions from ``package.module:function`` or ``path/file.py:function``."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any


def load_function(named: str) -> Callable[..., Any]:
    """Import the function ``named``. Raises FileNotFoundError, AttributeError, or the error of the import itself."""
    where, _, name = named.rpartition(":")
    function = getattr(_module(where), name, None)
    if function is None:
        raise AttributeError(f"{where} has no {name}")
    return function


def _module(where: str) -> ModuleType:
    if not where.endswith(".py"):
        sys.path.insert(0, os.getcwd())  # as ``python -m`` would find it
        return importlib.import_module(where)
    path = Path(where).resolve()
    if not path.is_file():
        raise FileNotFoundError("no such file")
    sys.path.insert(0, str(path.parent))  # for modules next to it
    name = f"user_file_{path.stem}"  # not the stem alone, which may name a module of ours or of a library
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, "a .py file has both"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
