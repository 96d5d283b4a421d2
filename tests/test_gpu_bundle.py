"""tools/gpu_bundle.py and prune_fatbin.py: only a GPU's own machine code is kept; pip accepts the slimmed wheels."""

from __future__ import annotations

import hashlib
import struct
import subprocess
import sys
import zipfile
from base64 import urlsafe_b64decode
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

TOOLS = Path(__file__).resolve().parents[1] / "tools"
sys.path.insert(0, str(TOOLS))
import gpu_bundle  # noqa: E402
import prune_fatbin  # noqa: E402

PTX, CODE = prune_fatbin.PTX, prune_fatbin.MACHINE_CODE
CONTAINERS = [
    [(CODE, 80), (CODE, 90), (PTX, 90)],
    [(CODE, 86), (CODE, 80), (CODE, 100)],
    [(CODE, 120), (PTX, 80)],
    [(CODE, 90), (CODE, 90)],  # sm_90 and sm_90a
]


def container(entries: list[tuple[int, int]]) -> bytes:
    """Return a fat binary; each entry's payload is its architecture's number, 48 times."""
    body = b""
    for kind, architecture in entries:
        payload = bytes([architecture]) * 48
        body += struct.pack("<HHIQIIHHI", kind, 0x101, 64, len(payload), 0, 0, 0, 1, architecture).ljust(64, b"\1")
        body += payload
    return struct.pack("<IHHQ", prune_fatbin.MAGIC, 1, 16, len(body)) + body


def library(containers: list[list[tuple[int, int]]]) -> bytes:
    """Return a shared library with the containers in .nv_fatbin, padded, with other bytes around it."""
    names = b"\0.text\0.nv_fatbin\0.shstrtab\0"
    fat = b"".join(container(entries) + bytes(8) for entries in containers)
    text = bytes([90, 80, 100]) * 16
    at = [64, 64 + len(text), 64 + len(text) + len(fat)]
    sections = zip((b".text", b".nv_fatbin", b".shstrtab"), at, (len(text), len(fat), len(names)), strict=True)
    table = bytes(64) + b"".join(
        struct.pack("<IIQQQQIIQQ", names.index(name), 1, 0, 0, offset, size, 0, 0, 8, 0)
        for name, offset, size in sections
    )
    header = b"\x7fELF\x02\x01\x01".ljust(16, b"\0") + struct.pack("<HHIQQQ", 3, 62, 1, 0, 0, at[2] + len(names))
    header = header.ljust(0x3A, b"\0") + struct.pack("<HHH", 64, 4, 3)
    return header + text + fat + names + table


def left(content: bytes) -> list[list[tuple[int, int]]]:
    """Return the payloads that a library still has, per container."""
    return [
        [(e.kind, e.architecture) for e in entries if content[e.start : e.end] == bytes([e.architecture]) * 48]
        for entries in prune_fatbin.containers(content)
    ]


def test_the_library_made_here_is_read_as_it_is():
    assert left(library(CONTAINERS)) == CONTAINERS


@pytest.mark.parametrize(
    ("architecture", "ptx", "expected", "without"),
    [
        (90, False, [[(CODE, 90)], [], [], [(CODE, 90), (CODE, 90)]], 2),
        (90, True, [[(CODE, 90)], [], [(PTX, 80)], [(CODE, 90), (CODE, 90)]], 1),
        (89, False, [[(CODE, 80)], [(CODE, 86)], [], []], 2),  # code for the generation's newest that is not newer
        (80, False, [[(CODE, 80)], [(CODE, 80)], [], []], 2),
        (100, True, [[(PTX, 90)], [(CODE, 100)], [(PTX, 80)], []], 1),  # sm_90's code does not run on sm_100
        (75, True, [[], [], [], []], 4),
    ],
)
def test_a_gpu_keeps_its_own_code_alone(architecture: int, ptx: bool, expected: list, without: int):
    original = library(CONTAINERS)
    pruned = prune_fatbin.prune(original, architecture, ptx)
    assert left(pruned.content) == expected
    assert (pruned.containers, pruned.without) == (len(CONTAINERS), without)
    # nothing moves, and nothing but payloads changes
    payloads = {at for c in prune_fatbin.containers(original) for e in c for at in range(e.start, e.end)}
    assert len(pruned.content) == len(original)
    assert all(new == old or at in payloads for at, (new, old) in enumerate(zip(pruned.content, original, strict=True)))


@pytest.mark.parametrize("content", [b"", b"#!/bin/sh\n", b"\x7fELF\x01\x01" + bytes(64), library([])])
def test_what_holds_no_cuda_code_comes_back_as_it_was(content: bytes):
    assert prune_fatbin.prune(content, 90) == prune_fatbin.Pruned(content, 0, 0)


@pytest.mark.parametrize("capability", ["90", "sm_90", "9.", "9.0a", ""])
def test_a_capability_is_written_as_nvidia_writes_it(capability: str):
    command = [sys.executable, TOOLS / "prune_fatbin.py", "a.so", "b.so", "--capability", capability]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "is not a compute capability such as 9.0" in done.stderr.splitlines()[-1]


def wheel(folder: Path, name: str, files: dict[str, bytes], requires: tuple[str, ...] = ()) -> Path:
    path, info = folder / f"{name}-1.0-py3-none-any.whl", f"{name}-1.0.dist-info"
    metadata = [f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0", *(f"Requires-Dist: {r}" for r in requires)]
    tags = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, content in (files | {f"{info}/METADATA": "\n".join(metadata), f"{info}/WHEEL": tags}).items():
            archive.writestr(member, content)
        archive.writestr(f"{info}/RECORD", "")
    return path


def test_a_slimmed_wheel_is_a_wheel_whose_record_is_true(tmp_path):
    files = {
        "thing/__init__.py": b"x = 1\n",
        "thing/_C.abi3.so": library(CONTAINERS),
        "thing/_D.so": library([[(CODE, 80)]]),
    }
    slimmed = tmp_path / "out" / "thing-1.0-py3-none-any.whl"
    slimmed.parent.mkdir()
    empty = gpu_bundle.slim(wheel(tmp_path, "thing", files), slimmed, 90)
    assert empty == ["thing/_D.so has no machine code for this GPU"]
    with zipfile.ZipFile(slimmed) as archive:
        assert archive.read("thing/_C.abi3.so") == prune_fatbin.prune(files["thing/_C.abi3.so"], 90).content
        record = archive.read("thing-1.0.dist-info/RECORD").decode().split()
        assert {line.split(",")[0] for line in record} == set(archive.namelist())
        for line in record:
            member, digest, size = line.split(",")
            if digest:
                content = archive.read(member)
                expected = urlsafe_b64decode(digest.removeprefix("sha256=") + "=")
                assert (hashlib.sha256(content).digest(), len(content)) == (expected, int(size))
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", site, slimmed]
    subprocess.run(pip, check=True)
    assert (site / "thing" / "__init__.py").read_bytes() == files["thing/__init__.py"]


def target(**installed: str) -> gpu_bundle.Target:
    return gpu_bundle.Target("3.12", 39, {name: Version(version) for name, version in installed.items()})


def test_a_version_that_is_there_but_does_not_fit_is_named(tmp_path):
    asking = wheel(tmp_path, "asking", {}, ("torch==2.11.0", "numpy<2", 'six>9; python_version < "3"', "absent>3"))
    there = target(torch="2.11.0+cu130", numpy="2.5.2", six="1.17.0")
    assert gpu_bundle.misfits([asking], there) == ["asking needs numpy<2, the machine has 2.5.2"]


def test_installed_packages_are_read_as_pip_lists_them(tmp_path):
    listed = tmp_path / "installed.txt"
    listed.write_text("Torch==2.11.0+cu130\ntyping_extensions==4.16.0\neinops\n")
    read = gpu_bundle.read_installed(listed, ["Einops"])
    assert read == {"torch": Version("2.11.0+cu130"), "typing-extensions": Version("4.16.0")}


def test_what_was_built_here_runs_there_or_is_refused():
    there = target()
    assert there.runs(Path("a-1.0-py3-none-any.whl"))
    assert there.runs(Path("a-1.0-cp312-cp312-linux_x86_64.whl"))
    assert not there.runs(Path("a-1.0-cp311-cp311-linux_x86_64.whl"))
    assert not gpu_bundle.Target("3.12", 5, {}).runs(Path("a-1.0-cp312-cp312-linux_x86_64.whl"))


@pytest.mark.slow
def test_only_what_is_missing_is_chosen_and_what_is_there_is_given(tmp_path):
    try:
        chosen = gpu_bundle.resolve([Requirement("torchmetrics==1.9.0")], target(torch="2.11.0+cu130"), {"numpy"})
    except SystemExit as failed:
        if "Failed to fetch" in str(failed) or "error sending request" in str(failed):
            pytest.skip("no package registry answers")
        raise
    assert chosen["torch"] == Version("2.11.0")
    assert "lightning-utilities" in chosen
    assert "numpy" not in chosen
