"""Find the final answer of a response: its last box, what follows its last ``####``, or its last number.

\\boxed{4}, no: \\boxed{\\frac{1}{2}}      \\frac{1}{2}     in general the last complete box alone counts
x=\\boxed{1}$ or $x=\\boxed{-2}           1, -2           neighbours with only a separator between them are one answer
x=\\boxed{1}, y=\\boxed{2}                x=1, y=2        names stay if they differ
"""

from __future__ import annotations

import re
from collections import deque
from typing import Literal, NamedTuple

from megatron_dypo.reward.normalize import unicode_math

# One pass from left to right, so linear; an escaped character (\{, \}, \\) is consumed whole and opens nothing. Without
# named groups the regex engine skips plain text by its first characters, several times as fast.
_TOKEN = re.compile(r"\\(?:(?:boxed|fbox)\s*\{|.)|[{}]", re.DOTALL)
_COMMAND = re.compile(r"(?:boxed|fbox)\s*\{")
_ESCAPE_LENGTH = 2
_NOT_A_BOX = (-1, -1)

_SEPARATOR = r",|;|\\text\s*\{[\s,]*(?:and|or)\s*\}|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])"
_SPACE = r"\s|\$|\\[()\[\],;: ]|\\q?quad(?![A-Za-z])|~"
_NAME = re.compile(r"((?:\\[a-z]{2,9}|(?<![A-Za-z\\])[A-Za-z])(?:_(?:[A-Za-z0-9]|\{[A-Za-z0-9]{1,9}\}))?)\s*=\s*$")
_BETWEEN = re.compile(rf"(?:{_SPACE})*(?:{_SEPARATOR})(?:{_SPACE}|{_SEPARATOR})*")
_LONGEST = 80  # characters between two neighbouring boxes


class _Box(NamedTuple):
    """Start positions of a box's command, its content and its closing brace."""

    command: int
    start: int
    end: int


def last_boxed(text: str) -> str | None:
    r"""Return the content of the ``\boxed{...}`` (or ``\fbox{...}``) that starts last among those whose braces balance.

    Neighbours before it belong to the answer if nothing but commas, semicolons, "and", "or", dollar signs and a name
    with its equals sign stands between two of them; equal boxes count once. A box cut off by the end of the response is
    ignored, so an earlier complete box counts instead. Of nested boxes the inner one counts. Returns None without a
    box. Time is linear in ``len(text)``.
    """
    boxes = _complete(text)
    if not boxes:
        return None
    at = max(range(len(boxes)), key=lambda index: boxes[index].start)
    row = [boxes[at]]
    for index in range(at - 1, -1, -1):  # in order of their ends, so the nearest one before comes first
        box = boxes[index]
        if box.end < row[-1].command:
            if not _are_neighbours(text, box, row[-1]):
                break
            row.append(box)
        elif box.start > row[-1].start:
            row[-1] = box._replace(command=row[-1].command)  # the inner box counts
    return _joined(text, row[::-1])


def _complete(text: str) -> list[_Box]:
    """Return the boxes whose braces balance, in order of their ends; text before the first is irrelevant."""
    opened: list[tuple[int, int]] = []  # for each open brace, where its box's command and content start
    boxes: list[_Box] = []
    first = _COMMAND.search(text)
    if not first:
        return boxes
    start = first.start()
    while start and text[start - 1] == "\\":  # all of them, or an escaped backslash would look like the command's
        start -= 1
    for token in _TOKEN.finditer(text, start):
        if token[0] == "{":
            opened.append(_NOT_A_BOX)
        elif token[0] == "}":
            where = opened.pop() if opened else _NOT_A_BOX
            if where != _NOT_A_BOX:
                boxes.append(_Box(*where, token.start()))
        elif len(token[0]) > _ESCAPE_LENGTH:
            opened.append(token.span())
    return boxes


def _are_neighbours(text: str, one: _Box, other: _Box) -> bool:
    if other.command - one.end > _LONGEST:
        return False
    between = text[one.end + 1 : other.command]
    name = _NAME.search(between)
    return _BETWEEN.fullmatch(between[: name.start()] if name else between) is not None


def _joined(text: str, row: list[_Box]) -> str:
    contents = [text[box.start : box.end] for box in row]
    found = [_NAME.search(text[max(0, box.command - _LONGEST) : box.command]) for box in row]
    names = [match[1] if match else "" for match in found]
    if len(set(names) - {""}) > 1:
        contents = [f"{name}={content}" if name else content for name, content in zip(names, contents, strict=True)]
    return contents[0] if len(set(contents)) == 1 else ", ".join(contents)


Extract = Literal["boxed", "marked", "number"]

_MARK = "####"
# A sign counts unless a digit, letter or bracket stands before it: the last number of "12-5" is 5.
_DIGITS = r"(?:(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
_NUMBER = re.compile(rf"(?:(?<![0-9A-Za-z)\]}}.,])-\s?)?(?:\\?\$\s?)?{_DIGITS}(?:/{_DIGITS})?(?:\s?\\?%)?")
_DASH = re.compile("[\u2012-\u2015](?=\\s)")  # punctuation of a sentence: a sign is never apart from its number
_CURRENCY = re.compile(r"\\?\$\s?")


def final_answer(text: str, extract: Extract) -> str | None:
    r"""Return the final answer of a response verbatim; None without one. Time is linear in ``len(text)``.

    boxed   the content of the last complete ``\boxed{}``
    marked  or, without a box, the rest of the line after the last ``####``
    number  or, without either, the last number: ``$1,234.50`` (without its currency sign), ``-3/4``, ``50%``
    """
    answer = last_boxed(text)
    if answer is None and extract != "boxed":
        answer = _marked(text)
    if answer is None and extract == "number":
        answer = _last_number(text)
    return answer


def _marked(text: str) -> str | None:
    _, mark, rest = text.rpartition(_MARK)
    lines = rest.lstrip().splitlines() if mark else []
    return lines[0].strip() if lines else None


def _last_number(text: str) -> str | None:
    last = deque(_NUMBER.finditer(unicode_math(_DASH.sub(" ", text))), maxlen=1)
    return _CURRENCY.sub("", last[0][0]) if last else None
