#!/usr/bin/env python3
"""Remove the machine code of other GPUs from a CUDA shared library.

python tools/prune_fatbin.py IN.so OUT.so --capability 9.0 [--keep-ptx]

A CUDA library holds each kernel once per architecture, in containers (fat binaries) that the driver searches for code
its GPU can run. Entries of other architectures are overwritten with zeros, which compress to nothing; all addresses
stay, so the library loads as before. A kernel without machine code for this GPU fails at launch ("no kernel image is
available"), unless its PTX is kept, which the driver compiles at the first launch.
"""

from __future__ import annotations

import argparse
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MAGIC = 0xBA55ED50  # begins a container: magic, version (2 bytes), header's size (2), size of all entries (8)
PTX, MACHINE_CODE = 1, 2  # an entry's kind


@dataclass(frozen=True)
class Entry:
    """One architecture's code in a container: bytes [start, end) of the file without the entry's own header."""

    kind: int
    architecture: int  # 90 for sm_90
    start: int
    end: int


def sections(library: bytes) -> Iterator[tuple[str, int, int]]:
    """Yield (name, offset, bytes) of each section of a 64-bit little-endian ELF file."""
    table = struct.unpack_from("<Q", library, 0x28)[0]
    size, count, names = struct.unpack_from("<HHH", library, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", library, table + number * size) for number in range(count)]
    for name, _, _, _, offset, length in headers:
        at = headers[names][4] + name
        yield library[at : library.index(b"\0", at)].decode(), offset, length


def containers(library: bytes) -> Iterator[list[Entry]]:
    """Yield the entries of each fat binary of a shared library; none of a file that is not one."""
    if not library.startswith(b"\x7fELF\x02\x01"):
        return
    for name, offset, length in sections(library):
        if name not in (".nv_fatbin", "__nv_relfatbin"):
            continue
        at, end = offset, offset + length
        while at + 16 <= end:
            magic, _, header, size = struct.unpack_from("<IHHQ", library, at)
            if magic != MAGIC:
                at += 8  # padding between containers
                continue
            yield list(_entries(library, at + header, at + header + size))
            at += header + size


def _entries(library: bytes, at: int, end: int) -> Iterator[Entry]:
    """Read entry headers: kind (2 bytes), version (2), header's size (4), size (8), ..., architecture (4, at 28)."""
    while at < end:
        kind, _, header, size = struct.unpack_from("<HHIQ", library, at)
        architecture = struct.unpack_from("<I", library, at + 28)[0]
        yield Entry(kind, architecture, at + header, at + header + size)
        at += header + size


def kept(entries: list[Entry], architecture: int, ptx: bool) -> list[Entry]:
    """Choose what this GPU runs: its own machine code, else the newest of its generation before it, else any PTX.

    Machine code runs on later GPUs of the same generation (sm_86's on sm_89), PTX on all later ones.
    """
    runs = {
        entry.architecture
        for entry in entries
        if entry.kind == MACHINE_CODE and architecture // 10 * 10 <= entry.architecture <= architecture
    }
    code = [e for e in entries if e.kind == MACHINE_CODE and runs and e.architecture == max(runs)]
    older = [e for e in entries if e.kind == PTX and e.architecture <= architecture]
    return code or (older if ptx else [])


@dataclass(frozen=True)
class Pruned:
    """A library without the code of other GPUs; ``without`` of its ``containers`` have none for this one."""

    content: bytes
    containers: int
    without: int


def prune(library: bytes, architecture: int, ptx: bool = False) -> Pruned:
    """Overwrite what ``kept`` leaves out by zeros; a file that is not a CUDA library comes back as it was."""
    content, count, without = bytearray(library), 0, 0
    for entries in containers(library):
        keep = kept(entries, architecture, ptx)
        count, without = count + 1, without + (not keep)
        for entry in entries:
            if entry not in keep:
                content[entry.start : entry.end] = bytes(entry.end - entry.start)
    return Pruned(bytes(content), count, without)


def architecture(capability: str) -> int:
    """Turn a compute capability as NVIDIA and torch write it (9.0) into an architecture's number (90).

    Raises argparse.ArgumentTypeError for anything else.
    """
    major, dot, minor = capability.partition(".")
    if not (dot and major.isdecimal() and minor.isdecimal() and len(minor) == 1):
        raise argparse.ArgumentTypeError(
            f"{capability!r} is not a compute capability such as 9.0 (nvidia-smi --query-gpu=compute_cap --format=csv)"
        )
    return int(major) * 10 + int(minor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", type=Path, metavar="IN.so")
    parser.add_argument("out", type=Path, metavar="OUT.so")
    parser.add_argument("--capability", type=architecture, required=True, help="compute capability, such as 9.0")
    parser.add_argument("--keep-ptx", action="store_true", help="keep the PTX of kernels without code for this GPU")
    options = parser.parse_args()
    pruned = prune(options.library.read_bytes(), options.capability, options.keep_ptx)
    options.out.write_bytes(pruned.content)
    print(f"{options.out}: {pruned.containers - pruned.without} of {pruned.containers} kernels' containers have code")


if __name__ == "__main__":
    main()
