"""Named points at which a run can be stopped, set in a forked rank before it starts, without hooks in the product."""

from __future__ import annotations

import builtins
import functools
import importlib
import inspect
import io
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

FILE_CALLS = {"open": (builtins, io), "replace": (os,), "fsync": (os,), "unlink": (os,), "rmdir": (os,), "mkdir": (os,)}


@dataclass(frozen=True)
class Point:
    """The ``nth`` time that a rank reaches a place, counted from its start or, with ``from_step``, from that step on.

    ``what`` is one of
      ``phase NAME``        the product's own phases (``runtime.failure.phase``),
      ``call MODULE:NAME``  a function or method,
      ``open|replace|fsync|unlink|rmdir|mkdir GLOB``  a file operation on a path that ends like GLOB.
    ``edge``: ``before`` or ``after`` it happened.
    """

    what: str
    edge: str = "before"
    nth: int = 1
    from_step: int = 0

    def __str__(self) -> str:
        return f"{self.edge} {self.what}" + (f" #{self.nth}" if self.nth > 1 else "")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def mark(path: Path) -> None:
    os.mknod(path)  # not among the watched calls


def at(point: Point, act: Callable[[], None]) -> None:
    """Call ``act`` once, when this process reaches ``point``."""
    passed, step, busy = 0, 0, threading.RLock()

    def arrive(edge: str) -> None:
        nonlocal passed
        with busy:  # a writer's thread also comes here
            if edge != point.edge or step < point.from_step:
                return
            passed += 1
            if passed == point.nth:
                act()

    def start_step(source: Any, number: int, *arguments: Any) -> None:
        nonlocal step
        step = number

    if point.from_step:
        _wrap("megatron_dypo.rollout.manager:RolloutManager.batch", before=start_step)
    kind, _, name = point.what.partition(" ")
    if kind == "phase":
        _watch_phase(name, arrive)
    elif kind == "call":
        _wrap(name, before=lambda *_, **__: arrive("before"), after=lambda *_, **__: arrive("after"))
    else:
        _watch_files(kind, name, arrive)


def _watch_phase(wanted: str, arrive: Callable[[str], None]) -> None:
    from megatron_dypo.runtime import failure

    original = failure.phase

    @contextmanager
    def phase(name: str, *arguments: Any, **keywords: Any):
        with original(name, *arguments, **keywords):
            if name == wanted:
                arrive("before")
            yield
            if name == wanted:
                arrive("after")

    users = [module for name, module in sys.modules.items() if name.startswith("megatron_dypo")]
    users = [module for module in users if getattr(module, "phase", None) is original]
    assert len(users) > 3, "the modules of a run must have been imported"
    for module in users:
        module.phase = phase


def _wrap(place: str, before: Callable | None = None, after: Callable | None = None) -> None:
    """Wrap ``MODULE:NAME`` (or ``MODULE:CLASS.NAME``) with calls before and after it, with the same arguments."""
    module, _, path = place.partition(":")
    *outer, name = path.split(".")
    owner = functools.reduce(getattr, outer, importlib.import_module(module))
    original = inspect.getattr_static(owner, name)
    static = isinstance(original, staticmethod)
    function = original.__func__ if static else original

    @functools.wraps(function)
    def wrapped(*arguments: Any, **keywords: Any) -> Any:
        if before:
            before(*arguments, **keywords)
        result = function(*arguments, **keywords)
        if after:
            after(*arguments, **keywords)
        return result

    setattr(owner, name, staticmethod(wrapped) if static else wrapped)


def _watch_files(call: str, glob: str, arrive: Callable[[str], None]) -> None:
    for owner in FILE_CALLS[call]:

        def watched(path: Any, *arguments: Any, _original: Callable = getattr(owner, call), **keywords: Any) -> Any:
            hit = fnmatch(_path(path, keywords.get("dir_fd")), "*" + glob)
            if hit:
                arrive("before")
            result = _original(path, *arguments, **keywords)
            if hit:
                arrive("after")
            return result

        setattr(owner, call, watched)


def _path(path: Any, folder: int | None) -> str:
    """Return the full path of a path, a descriptor, or (as in ``shutil.rmtree``) a name in an open folder."""
    if isinstance(path, int):
        return os.readlink(f"/proc/self/fd/{path}") if path > 2 else ""
    if folder is not None:
        return os.path.join(os.readlink(f"/proc/self/fd/{folder}"), os.fsdecode(path))
    return os.path.abspath(os.fsdecode(path))
