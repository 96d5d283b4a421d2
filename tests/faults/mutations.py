"""Hypothesis strategies that corrupt something valid: as a tree, as bytes, as a file."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

# Unusual text: control characters, line ends that only Unicode knows, half a surrogate pair, other scripts, markup.
ODD_TEXT = [
    "", " ", "\0", "\n", "\r\n", "\u2028", "\x1b[31m", "\ufeff", "\ud800", "é" * 300, "日本語", "🙂", "x" * 20_000,
    "../..", "~", "%s", "{}", "null", "nan", "1e999", "-1", "[1", "!!int ''", "&a [*a]", "=", "<script>", "a:b@c",
]  # fmt: skip
HUGE = [2**30, 2**31, 2**63, 2**64, -(2**63) - 1, 10**30, 10**400]


def nested(depth: int) -> list:
    tree: list = []
    for _ in range(depth):
        tree = [tree]
    return tree


odd_scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from(HUGE),
    st.sampled_from([-1.5, 0.5, 1e-300, 1e308, float("inf"), float("-inf"), float("nan"), -0.0]),
    st.sampled_from(ODD_TEXT),
    st.text(st.characters(exclude_characters="/"), max_size=12),
)
odd_values = st.one_of(
    odd_scalars,
    st.lists(odd_scalars, max_size=3),
    st.dictionaries(st.text(max_size=6), odd_scalars, max_size=3),
    st.builds(nested, st.just(60)),
)


def places(tree: Any, at: tuple = ()) -> list[tuple]:
    """Return the path of every node below the root."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [found for key, value in items for found in [(*at, key), *places(value, (*at, key))]]


@st.composite
def spoilt_trees(draw: st.DrawFn, tree: Any, at: tuple = ()) -> Any:
    """Draw a copy with one to three nodes (below the path ``at``) dropped, renamed, replaced, doubled or moved."""
    tree = copy.deepcopy(tree)
    if draw(st.integers(0, 19)) == 0:
        return draw(odd_values)
    for _ in range(draw(st.integers(1, 3))):
        if not (found := [path for path in places(tree) if path[: len(at)] == at]):
            break
        *parents, key = draw(st.sampled_from(found))
        node = tree
        for parent in parents:
            node = node[parent]
        change = draw(st.sampled_from(["drop", "rename", "replace", "replace", "replace", "double", "wrap"]))
        if change == "replace":
            node[key] = draw(odd_values)
        elif change == "drop":
            del node[key]
        elif change == "wrap":
            node[key] = draw(st.sampled_from([[node[key]], {"x": node[key]}, str(node[key])]))
        elif isinstance(node, list):
            node.append(copy.deepcopy(node[key]))
        elif change == "double":
            node[draw(st.text(max_size=6))] = copy.deepcopy(node[key])
        else:
            node[draw(st.sampled_from([f"{key}s", f"{key}".upper(), "", "\0"]))] = node.pop(key)
    return tree


_INSERTED = [
    b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\r\n", b"\n\n", b"\t", b"\xc3", b"\xed\xa0\x80", b"}", b"]]", b'"', b"{",
    b"[" * 5000,
        b"a" * 20_000,
        b" " * 70_000,
        b"9" * 5000,
        b"-",
        b"1e999",
        b"NaN",
        b"\x80\x04\x95",
        b"#",
        b"\\u0000",
]  # fmt: skip


@st.composite
def spoilt_bytes(draw: st.DrawFn, content: bytes, inserted: tuple[bytes, ...] = ()) -> bytes:
    """Draw a copy with one to three corrupt bytes, slices or encodings; ``inserted``: more that may be inserted."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(content)))
        end = draw(st.integers(start, min(len(content), start + 64)))
        change = draw(st.integers(0, 9))
        if change == 0:
            del content[start:]
        elif change == 1:
            del content[start:end]
        elif change == 2:
            content[start:start] = content[start:end]
        elif change == 3:
            content[start:end] = draw(st.binary(max_size=32))
        elif change == 4 and len(content) < 100_000:
            content = bytearray(content.decode("latin-1").encode("utf-16"))
        elif change == 5:
            content = content.replace(b"\n", b"\r\n")
        elif change < 8 and start < len(content):
            content[start] ^= draw(st.integers(1, 255))
        else:
            content[start:start] = draw(st.sampled_from([*_INSERTED, *inserted]))
    return bytes(content)


def flipped_bytes(content: bytes) -> st.SearchStrategy[bytes]:
    """Return copies of the same length with one byte changed."""
    return st.builds(
        lambda at, bits: content[:at] + bytes([content[at] ^ bits]) + content[at + 1 :],
        st.integers(0, len(content) - 1),
        st.integers(1, 255),
    )


def spoil_file(path: Path, how: str) -> None:
    """Replace a file by something else; ``how`` is one of ``FILE_FAULTS``."""
    path.unlink()
    if how == "folder":
        path.mkdir()
    elif how == "loop":
        path.symlink_to(path.name)
    elif how == "dangling":
        path.symlink_to("nowhere")
    elif how == "unreadable":
        path.symlink_to("/proc/self/mem")  # anyone, including root, can open it, but not read it
    elif how == "forbidden":
        path.touch(mode=0)
    elif how == "empty":
        path.touch()


FILE_FAULTS = ["absent", "folder", "loop", "dangling", "unreadable", "forbidden", "empty"]
