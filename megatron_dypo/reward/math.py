r"""How an answer compares with a ground truth, as far as text alone can tell; the rest is math-verify's.

Most answers of a training run are integers or copies of the ground truth, so these rules spare nearly all of the
trips to a worker process (microseconds instead of milliseconds).
"""

from __future__ import annotations

import re

from megatron_dypo.reward.boxed import last_boxed

MAX_CHARACTERS = 4_000
"""A longer answer (or ground truth) never reaches math-verify: only the same text earns its reward."""

_DOLLARS = re.compile(r"\${1,2}([^$]*)\${1,2}")
_INTEGER = re.compile(r"[-+]?[0-9]+")
_WORDS = re.compile(r"(?:\\(?:text|textbf|textit|mathrm)\{\s*)?([A-Za-z]{3,}(?: [A-Za-z]+)*)(?:\s*\})?")


def canonical(text: str) -> str:
    """``text`` with its whitespace collapsed and, where dollars enclose all of it, without them."""
    text = " ".join(text.split())
    enclosed = _DOLLARS.fullmatch(text)
    return enclosed[1].strip() if enclosed else text


def bare_truth(ground_truth: str) -> str:
    r"""The ground truth out of its ``\boxed{...}`` or ``$...$``, if it came in one."""
    boxed = last_boxed(ground_truth)
    return canonical(ground_truth if boxed is None else boxed)


def compare(answer: str, truth: str) -> bool | None:
    """Whether two canonical texts agree; None where only math-verify can tell.

    In order: the same text agrees; an empty or overlong one agrees with nothing else; two integers compare by value;
    two plain words (or phrases) agree up to case. Math-verify reads a word as a product of its letters, which commute:
    it takes any anagram of the ground truth for right.
    """
    if answer == truth:
        return answer != ""
    if not answer or max(len(answer), len(truth)) > MAX_CHARACTERS:
        return False
    if _INTEGER.fullmatch(answer) and _INTEGER.fullmatch(truth):
        return int(answer) == int(truth)
    answer_words, truth_words = _WORDS.fullmatch(answer), _WORDS.fullmatch(truth)
    if answer_words and truth_words:
        return answer_words[1].casefold() == truth_words[1].casefold()
    return None
