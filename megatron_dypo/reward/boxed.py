r"""Finds the final answer of a response: the content of its last complete ``\boxed{...}``."""

from __future__ import annotations

import re

# One pass from left to right, so linear; an escaped character (\{, \}, \\) is consumed whole and opens nothing.
# Without named groups the regex engine skips plain text by its first characters, several times as fast.
_TOKEN = re.compile(r"\\(?:boxed\s*\{|.)|[{}]", re.DOTALL)
_ESCAPE_LENGTH = 2
_NOT_A_BOX = -1


def last_boxed(text: str) -> str | None:
    r"""The content of the ``\boxed{...}`` that starts last among those whose braces balance; None without one.

    A box cut off by the end of the response is not one, so an earlier complete box counts instead. Of nested boxes the
    inner one counts. Time is linear in ``len(text)``.
    """
    opened: list[int] = []  # for each open brace, where the content of its box starts
    start, end = _NOT_A_BOX, _NOT_A_BOX
    for token in _TOKEN.finditer(text):
        if token[0] == "{":
            opened.append(_NOT_A_BOX)
        elif token[0] == "}":
            content = opened.pop() if opened else _NOT_A_BOX
            if content > start:
                start, end = content, token.start()
        elif len(token[0]) > _ESCAPE_LENGTH:
            opened.append(token.end())
    return None if start == _NOT_A_BOX else text[start:end]
