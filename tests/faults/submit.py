"""Run ``train`` in this process up to the point where it would start to build: refused, or ready."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_dypo import preflight
from megatron_dypo.cli import main

FACTOR = int(os.environ.get("MEGATRON_DYPO_FUZZ", "1"))  # multiplies the examples of a CI run, with random ones
PATIENCE = 20.0  # seconds for one input that takes about 0.02
LONGEST_LINE = 4000  # characters
T = TypeVar("T")


class Hangs(BaseException):
    """Not an Exception, so that the product cannot handle it as an error of its own."""


class Ready(BaseException):
    """The result of ``prepare``; training would begin here."""

    def __init__(self, config: Any, inputs: preflight.Inputs):
        self.config, self.inputs = config, inputs


@contextmanager
def bounded() -> Iterator[None]:
    """Raise Hangs if the block takes longer than any input may."""

    def give_up(*_: object) -> None:
        raise Hangs(f"not done within {PATIENCE:g} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Submit:
    """Runs commands; counts ``refused`` lines by what was fuzzed."""

    def __init__(self, capfd: pytest.CaptureFixture[str]):
        self._capfd = capfd

    def __call__(self, *arguments: str) -> str | Ready | None:
        """Return the line that refuses the input, what training would start with, or None if all went well.

        Fails on anything else.
        """
        self._capfd.readouterr()
        try:
            with bounded():
                code = main(list(arguments))
        except Ready as ready:
            if ready.inputs.lock:
                ready.inputs.lock.close()
            return ready
        printed = self._capfd.readouterr()
        if code == 0:
            return None
        assert code == 2, f"exit code {code}: {printed.err}"
        assert printed.err.startswith("megatron_dypo: ") and printed.err.endswith("\n"), printed.err
        line = printed.err.removeprefix("megatron_dypo: ")[:-1]
        assert line.isprintable() and len(line) < LONGEST_LINE, f"not one clear line: {line[:LONGEST_LINE]!r}"
        return line


@pytest.fixture
def submit(capfd, monkeypatch, tmp_path) -> Submit:
    """Return the command line, stopped where training would begin; no network, and harmless relative paths."""
    import huggingface_hub.constants
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # noqa: F401 - slow once, and none of an input's time

    real = preflight.check_inputs

    def prepare(config: Any, source: str) -> None:
        raise Ready(config, real(config, source))

    monkeypatch.setattr(preflight, "check_inputs", prepare)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return Submit(capfd)


def hunt(inputs: st.SearchStrategy[T], refuses: Callable[[T], bool], examples: int, malformed: int) -> int:
    """Try ``examples`` inputs, the same in every CI run; at least ``malformed`` of them must be refused."""
    count = 0

    @settings(
        max_examples=examples * FACTOR,
        derandomize=FACTOR == 1,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(inputs)
    def example(value: T) -> None:
        nonlocal count
        count += refuses(value)

    example()
    assert count >= malformed * FACTOR, f"only {count} inputs were malformed"
    return count
