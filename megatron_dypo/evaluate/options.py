"""Multiple-choice problems: their options, found in the text or given as a list, and a shuffle of them.

A model that has seen a public test set may know that the answer is C; it cannot know where C went.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from megatron_dypo.runtime.seeding import stable_hash

_OPTION = re.compile(r"\s*\(?([A-Z]|[1-9])[).:]\s+(.+)")
FEWEST = 2


@dataclass(frozen=True)
class Choices:
    """``labels`` stand before ``texts``, in order; ``answer`` is the label of the right one.

    Raises ValueError where no option has that label.
    """

    question: str
    labels: tuple[str, ...]
    texts: tuple[str, ...]
    answer: str

    def __post_init__(self) -> None:
        if self.answer not in self.labels:
            raise ValueError(f"the answer {self.answer!r:.40} is none of the options' labels {', '.join(self.labels)}")

    def shuffled(self, *seed: object) -> Choices:
        """The texts in another order, the labels where they were; a pure function of ``seed``."""
        order = random.Random(stable_hash("options", *seed)).sample(range(len(self.texts)), len(self.texts))
        right = order.index(self.labels.index(self.answer))
        return Choices(self.question, self.labels, tuple(self.texts[i] for i in order), self.labels[right])

    def __str__(self) -> str:
        """The question, an empty line, and a line for each option."""
        options = (f"{label}) {text}" for label, text in zip(self.labels, self.texts, strict=True))
        return "\n".join([self.question.rstrip(), "", *options])


def find_choices(text: str, answer: str) -> Choices:
    """The options that end ``text``, one a line. Raises ValueError where there are none."""
    lines = text.rstrip().split("\n")
    labels, texts = [], []
    while lines and (option := _OPTION.fullmatch(lines[-1])):
        if labels and ord(option[1]) + 1 != ord(labels[0]):
            break  # a numbered statement of the question, above its options
        labels.insert(0, option[1])
        texts.insert(0, option[2].strip())
        lines.pop()
    if len(labels) < FEWEST:
        raise ValueError("no options: the question does not end in lines such as `A) ...`")
    return Choices("\n".join(lines), tuple(labels), tuple(texts), answer)
