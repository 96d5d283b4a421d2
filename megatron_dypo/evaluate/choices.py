"""Find the options of multiple-choice problems, in the text or as a list, and shuffle them.

A model that has seen a public test set may know that the answer is C; it cannot know where C went.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

from megatron_dypo.reward.choice import true_label
from megatron_dypo.runtime.determinism import stable_hash

_OPTION = re.compile(r"\s*\(?([A-Z]|[1-9])[).:]\s+(.+)")
FEWEST = 2
_LETTERS = tuple(ascii_uppercase)


@dataclass(frozen=True)
class Choices:
    """A question with its options: ``labels[i]`` precedes ``texts[i]``; ``answer`` is the label of the right one.

    Raises ValueError if no option has that label.
    """

    question: str
    labels: tuple[str, ...]
    texts: tuple[str, ...]
    answer: str

    def __post_init__(self) -> None:
        if self.answer not in self.labels:
            raise ValueError(f"the answer {self.answer!r:.40} is not one of the option labels {', '.join(self.labels)}")

    def shuffled(self, *seed: object) -> Choices:
        """Shuffle the texts and keep the labels in place; a pure function of ``seed``."""
        order = random.Random(stable_hash("options", *seed)).sample(range(len(self.texts)), len(self.texts))
        right = order.index(self.labels.index(self.answer))
        return Choices(self.question, self.labels, tuple(self.texts[i] for i in order), self.labels[right])

    def __str__(self) -> str:
        """Return the question, an empty line, and one line per option."""
        options = (f"{label}) {text}" for label, text in zip(self.labels, self.texts, strict=True))
        return "\n".join([self.question.rstrip(), "", *options])


def choices_of(row: dict[str, Any], question: str, answer: str) -> Choices:
    """Return the options of a row (column names in lower case): from columns, or from the last lines of the question.

    Columns may be ARC's lists of texts and labels, GPQA's right and wrong answers, or a list or object of options; the
    answer is a label, an index from 0, or a text. Raises ValueError if there are no options.
    """
    given = row.get("choices") or row.get("options")
    if not given and isinstance(row.get("question"), dict):
        given = row["question"].get("choices")
    wrong = [row[name] for name in (f"incorrect answer {number}" for number in (1, 2, 3)) if row.get(name)]
    labels: tuple[str, ...]
    texts: tuple[str, ...]
    if wrong:
        texts = tuple(sorted(text.strip() for text in (answer, *wrong)))  # the right one is first in the file
        labels = _LETTERS[: len(texts)]
        return Choices(question, labels, texts, labels[texts.index(answer.strip())])
    if isinstance(given, dict) and {"label", "text"} <= given.keys():
        labels, texts = tuple(map(str, given["label"])), tuple(given["text"])
    elif isinstance(given, dict):
        labels, texts = tuple(given), tuple(given.values())
    elif isinstance(given, list) and given and all(isinstance(each, dict) for each in given):
        labels, texts = tuple(str(each["label"]) for each in given), tuple(each["text"] for each in given)
    elif isinstance(given, list) and given:
        labels, texts = _LETTERS[: len(given)], tuple(given)
    else:
        return find_choices(question, answer)
    if len(labels) != len(texts) or not all(isinstance(text, str) for text in texts):
        raise ValueError("its options differ in their numbers of texts and labels")
    return Choices(question, labels, texts, _named(answer, labels, texts))


def _named(answer: str, labels: tuple[str, ...], texts: tuple[str, ...]) -> str:
    """Return the label of the option that ``answer`` means; ``answer`` itself if it means none."""
    label = true_label(answer)
    if answer in labels:
        return answer
    if label is not None and label in labels:
        return label
    if answer in texts:
        return labels[texts.index(answer)]
    place = int(answer) if answer.isdecimal() else len(labels)
    return labels[place] if place < len(labels) and labels == _LETTERS[: len(labels)] else answer


def find_choices(text: str, answer: str) -> Choices:
    """Return the options at the end of ``text``, one per line. Raises ValueError if there are none."""
    lines = text.rstrip().split("\n")
    labels: list[str] = []
    texts: list[str] = []
    while lines and (option := _OPTION.fullmatch(lines[-1])):
        if labels and ord(option[1]) + 1 != ord(labels[0]):
            break  # a numbered statement in the question, above its options
        labels.insert(0, option[1])
        texts.insert(0, option[2].strip())
        lines.pop()
    if len(labels) < FEWEST:
        raise ValueError("no options: the question does not end in lines such as `A) ...`")
    found = tuple(labels), tuple(texts)
    return Choices("\n".join(lines), *found, _named(answer, *found))
