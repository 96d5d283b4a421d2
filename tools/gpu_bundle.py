#!/usr/bin/env python3
"""Pack the wheels that a GPU machine without network still needs into one small archive.

    python3 -m pip list --format=freeze > installed.txt      # on the GPU machine, with its python3
    python tools/gpu_bundle.py --installed installed.txt --capability 9.0 --python 3.12 --out bundle.tar.xz   # here
    tar xf bundle.tar.xz && python3 -m pip install --no-index --no-deps --target site bundle/*.whl    # GPU machine
    PYTHONPATH=site:. make gpu-report

Packages installed there are left alone; one whose version does not fit is an error that names both sides. CUDA
libraries keep the machine code of one compute capability only (tools/prune_fatbin.py), and what vLLM needs for anything
but sampling text is left out. REQUIREMENT (in pip's syntax) replaces the default: this project, and the vLLM that goes
with the torch installed there.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import lzma
import platform
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from email import message_from_bytes
from importlib.metadata import requires
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory

import uv
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename
from packaging.version import Version
from prune_fatbin import architecture, prune

from megatron_dypo.runtime import versions

MIB = 2**20
PINS = Path(__file__).resolve().parents[1] / "requirements" / "cuda.txt"
# Imported only by work that needs it: vLLM 0.26's engine, its GPU worker and the model families of this project were
# imported without any of these.
LEFT_OUT = {
    "pictures, sound and video": (
        "opencv-python-headless",
        "torchvision",
        "torchaudio",
        "torchcodec",
        "pynvvideocodec",
    ),
    "structured output": ("outlines-core", "lm-format-enforcer", "lark"),
    "HTTP servers for other protocols": (
        "anthropic",
        "mcp",
        "model-hosting-container-standards",
        "ijson",
        "watchfiles",
    ),
    "telemetry": (
        "opentelemetry-sdk",
        "opentelemetry-api",
        "opentelemetry-exporter-otlp",
        "opentelemetry-semantic-conventions-ai",
        "prometheus-fastapi-instrumentator",
        "nvtx",
    ),
    "kernels for quantised weights, other attentions and other GPUs": (
        "flashinfer-python",
        "flashinfer-cubin",
        "humming-kernels",
        "nvidia-cudnn-frontend",
        "nvidia-cutlass-dsl",
        "quack-kernels",
        "tilelang",
        "tokenspeed-mla",
        "fastsafetensors",
        "compressed-tensors",
    ),
    "speculative decoding by n-grams": ("numba",),
    "debugging torch.compile": ("depyf",),
    "tokenizer files of Mistral's own format": ("mistral-common",),
    "logging.wandb (metrics.jsonl and TensorBoard do without)": ("wandb",),
}
FILES_LEFT_OUT = ("vllm/vllm-rs",)  # vLLM's HTTP front end in Rust, 14 MiB: our servers run the Python one
REASONS = {name: work for work, names in LEFT_OUT.items() for name in names}


@dataclass
class Target:
    """The machine that the bundle is for."""

    python: str  # 3.12
    glibc: int  # 39 for glibc 2.39
    installed: dict[str, Version | None]  # by canonical name; None if the list gives no version

    def environment(self, extra: str) -> dict[str, str]:
        """Return the values that markers of requirements are compared with."""
        return {
            "python_version": self.python,
            "python_full_version": f"{self.python}.0",
            "implementation_name": "cpython",
            "platform_python_implementation": "CPython",
            "platform_machine": "x86_64",
            "platform_system": "Linux",
            "sys_platform": "linux",
            "os_name": "posix",
            "extra": extra,
        }

    def runs(self, wheel: Path) -> bool:
        """Return whether a wheel built on this machine is pure Python, or compiled for the target's Python."""
        interpreters = {tag.interpreter for tag in parse_wheel_filename(wheel.name)[3]}
        compiled_here = int(platform.libc_ver()[1].partition(".")[2]) <= self.glibc
        return wheel.name.endswith("-none-any.whl") or (
            compiled_here and f"cp{self.python.replace('.', '')}" in interpreters
        )

    def pip_options(self) -> list[str]:
        """Return options that make pip choose wheels for the target instead of this machine."""
        tags = [f"manylinux_2_{minor}_x86_64" for minor in range(5, self.glibc + 1)]
        tags += ["manylinux1_x86_64", "manylinux2010_x86_64", "manylinux2014_x86_64", "linux_x86_64"]
        options = ["--no-deps", "--only-binary=:all:", "--implementation=cp", f"--python-version={self.python}"]
        return options + [f"--platform={tag}" for tag in tags]


def resolve(requirements: list[Requirement], target: Target, left_out: set[str]) -> dict[str, Version]:
    """Choose a version of everything that ``requirements`` lead to, without ``left_out``; installed versions are fixed.

    uv's resolver does it. Raises SystemExit with its explanation if no versions fit together.
    """
    given = [f"{name}=={version.public}" for name, version in target.installed.items() if version is not None]
    never = [f"{name}; sys_platform == 'never'" for name in sorted(left_out)]
    with TemporaryDirectory() as folder:
        names = ("wanted.in", "pinned.txt", "forced.txt", "chosen.txt")
        wanted, pinned, forced, chosen = (Path(folder, name) for name in names)
        wanted.write_text("\n".join(map(str, requirements)))
        pinned.write_text("\n".join(pins(requirements)))
        forced.write_text("\n".join(given + never))
        options = {
            "--constraint": pinned,
            "--override": forced,
            "--python-version": target.python,
            "--python-platform": f"x86_64-manylinux_2_{target.glibc}",
            "--output-file": chosen,
        }
        command = [uv.find_uv_bin(), "pip", "compile", wanted, *chain(*options.items())]
        command += ["--no-annotate", "--no-header", "--quiet"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"gpu_bundle: these do not go together:\n{done.stderr}")
        lines = [line.partition("==") for line in chosen.read_text().split()]
    return {canonicalize_name(name): Version(version) for name, _, version in lines}


def pins(requirements: list[Requirement]) -> list[str]:
    """Return the project's pins for CUDA machines, except packages pinned by ``requirements`` or tied to a torch."""
    exact = [each for each in requirements if any(part.operator == "==" for part in each.specifier)]
    free = {canonicalize_name(each.name) for each in exact} | versions.pins(versions.ROWS[0]).keys()
    lines = [line for line in PINS.read_text().splitlines() if not line.startswith("#")]
    return [line for line in lines if canonicalize_name(line.partition("==")[0]) not in free]


def download(name: str, version: Version, target: Target, builder: str, folder: Path) -> Path:
    """Fetch a wheel for the target; the interpreter ``builder`` builds packages that ship as source.

    Raises SystemExit if the result would not run there.
    """
    into, options = Path(folder, name), ["--quiet", "--no-deps", "--disable-pip-version-check", f"{name}=={version}"]
    fetch = [sys.executable, "-m", "pip", "download", *target.pip_options(), "--dest", into, *options]
    if not subprocess.run(fetch, capture_output=True).returncode:
        return next(into.glob("*.whl"))
    build = [builder, "-m", "pip", "wheel", "--wheel-dir", into, *options]
    built = subprocess.run(build, capture_output=True, text=True)
    if built.returncode:
        raise SystemExit(f"gpu_bundle: {name}=={version} has no wheel for the machine:\n{built.stderr}")
    wheel = next(into.glob("*.whl"))
    if not target.runs(wheel):
        raise SystemExit(
            f"gpu_bundle: {name} ships as source and was built as {wheel.name}, which does not run there: --build-with "
            f"takes a Python {target.python} on a machine with glibc 2.{target.glibc} or older"
        )
    return wheel


def misfits(wheels: list[Path], target: Target) -> list[str]:
    """Return a line for each installed version that a packed wheel refuses."""
    found = []
    for wheel in wheels:
        for requirement in requirements_of(wheel):
            version = target.installed.get(canonicalize_name(requirement.name))
            if version is None or not applies(requirement, target.environment("")):
                continue
            if not requirement.specifier.contains(version.public, prereleases=True):
                found.append(f"{wheel.name.split('-')[0]} needs {requirement}, the machine has {version}")
    return found


def applies(requirement: Requirement, environment: dict[str, str]) -> bool:
    return requirement.marker is None or requirement.marker.evaluate(environment)


def requirements_of(wheel: Path) -> list[Requirement]:
    with zipfile.ZipFile(wheel) as archive:
        metadata = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return [Requirement(line) for line in message_from_bytes(archive.read(metadata)).get_all("Requires-Dist", [])]


def slim(wheel: Path, out: Path, capability: int) -> list[str]:
    """Write ``wheel`` to ``out`` uncompressed (the archive compresses all of them together), CUDA libraries pruned.

    Return a line for each library that has no code for this GPU.
    """
    empty, record = [], []
    with zipfile.ZipFile(wheel) as archive, zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as slimmed:
        record_name = next(name for name in archive.namelist() if name.endswith(".dist-info/RECORD"))
        for member in archive.infolist():
            if member.is_dir() or member.filename in (record_name, *FILES_LEFT_OUT):
                continue
            content = archive.read(member)
            if Path(member.filename).name.partition(".so")[1]:
                pruned = prune(content, capability)
                content = pruned.content
                if pruned.containers and pruned.without == pruned.containers:
                    empty.append(f"{member.filename} has no machine code for this GPU")
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            record.append(f"{member.filename},sha256={digest},{len(content)}")
            member.compress_type = zipfile.ZIP_STORED
            slimmed.writestr(member, content)
        slimmed.writestr(record_name, "\n".join([*record, f"{record_name},,", ""]))
    return empty


def pack(wheels: list[Path], out: Path, capability: int) -> None:
    """Write ``bundle/NAME.whl`` for each wheel into one xz archive, and print what each adds to it."""
    with (
        TemporaryDirectory() as folder,
        lzma.open(out, "wb", preset=6) as packed,
        tarfile.open(fileobj=packed, mode="w|") as archive,
    ):
        for wheel in sorted(wheels, key=lambda wheel: wheel.name):
            slimmed, before = Path(folder, wheel.name), out.stat().st_size
            empty = slim(wheel, slimmed, capability)
            archive.add(slimmed, f"bundle/{wheel.name}")
            slimmed.unlink()
            print(f"{(out.stat().st_size - before) / MIB:7.1f} MiB  {wheel.name}")
            print(*(f"             {line}\n" for line in empty), sep="", end="")


def read_installed(file: Path, upgraded: list[str]) -> dict[str, Version | None]:
    """Read ``pip list --format=freeze``, or bare names, without what will be ``upgraded``."""
    installed = {}
    for line in file.read_text().split():
        name, _, version = line.partition("==")
        installed[canonicalize_name(name)] = Version(version) if version else None
    return {name: version for name, version in installed.items() if name not in map(canonicalize_name, upgraded)}


def project_requirements(torch: Version | None) -> list[Requirement]:
    """List what this project needs besides torch, with the vLLM that matches the target's ``torch``."""
    if torch is None:
        raise SystemExit("gpu_bundle: --installed: no version of torch in it (pip list --format=freeze gives it)")
    needed = [Requirement(line) for line in requires("megatron_dypo") or []]
    return [Requirement(f"vllm=={versions.row_for(torch.public).last}"), *(line for line in needed if not line.marker)]


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("requirements", nargs="*", type=Requirement, metavar="REQUIREMENT", help="package to pack, as pip writes it")
    add("--installed", type=Path, required=True, metavar="FILE", help="pip list --format=freeze of the GPU machine")
    add("--capability", type=architecture, required=True, help="its compute capability, such as 9.0 for H100 and H200")
    add("--python", default="3.12", help="its Python version (default: %(default)s)")
    add("--glibc", type=int, default=39, help="its glibc minor version, 39 for 2.39 (default: %(default)s)")
    add(
        "--build-with",
        default=sys.executable,
        metavar="PYTHON",
        help="interpreter that builds source packages (default: this one)",
    )
    add("--out", type=Path, required=True, metavar="FILE.tar.xz", help="archive to write")
    add("--upgrade", nargs="*", default=[], metavar="NAME", help="packages to pack although the machine has them")
    add("--accept-misfits", action="store_true", help="pack even if an installed version is refused by a package")
    add(
        "--with", nargs="*", default=[], metavar="NAME", dest="wanted", help="packages to pack despite the default cuts"
    )
    add("--without", nargs="*", default=[], metavar="NAME", help="packages to leave out")
    add(
        "--limit",
        type=float,
        default=60,
        metavar="MIB",
        help="largest archive, else exit code 1 (default: %(default)s)",
    )
    return parser


def main() -> None:
    options = parser().parse_args()
    target = Target(options.python, options.glibc, read_installed(options.installed, options.upgrade))
    left_out = (REASONS.keys() | set(map(canonicalize_name, options.without))) - set(
        map(canonicalize_name, options.wanted)
    )
    requirements = options.requirements or project_requirements(target.installed.get("torch"))
    chosen = resolve(requirements, target, left_out)
    with TemporaryDirectory() as folder:
        missing = [item for item in chosen.items() if item[0] not in target.installed]
        wheels = [download(*item, target, options.build_with, Path(folder)) for item in missing]
        if (wrong := misfits(wheels, target)) and not options.accept_misfits:
            advice = "gpu_bundle: --upgrade NAME packs another version, --accept-misfits takes it as it is:"
            raise SystemExit("\n  ".join([advice, *wrong]))
        pack(wheels, options.out, options.capability)
    size = options.out.stat().st_size / MIB
    print(f"{size:7.1f} MiB  {options.out}")
    if size > options.limit:
        raise SystemExit(f"gpu_bundle: more than --limit {options.limit:g} MiB: --without leaves a package out")


if __name__ == "__main__":
    main()
