"""The evaluation suites of the paper (4.1): where their problems come from, and what counts as an answer.

    file or hub --rows--> question, answer, options --> Prompt(messages, ground_truth)

A file is read whatever its field names are, as far as one of the usual ones is there; the hub's data sets have others
than the files that circulate.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dypo.config.schema import Evaluation
from megatron_dypo.errors import UserError
from megatron_dypo.evaluate.options import Choices, find_choices
from megatron_dypo.records import Prompt

SUFFIXES = (".json", ".jsonl", ".parquet")
QUESTIONS = ("problem", "question", "Question", "prompt")
ANSWERS = ("answer", "ground_truth", "expected_answer", "final_answer", "answerKey", "Correct Answer", "solution")


@dataclass(frozen=True)
class Suite:
    """``stems``: names of local files, letters and digits alone. ``hub``: (data set, configuration, split).

    ``reward`` and ``extract`` are how its answers are graded (the configuration's `reward` section has the meaning),
    ``samples`` how many responses a problem gets: the small suites need many for a steady mean.
    """

    stems: tuple[str, ...]
    hub: tuple[str, str | None, str]
    samples: int = 1
    reward: str = "math"
    extract: str = "boxed"


SUITES = {
    "aime24": Suite(("aime24", "aime2024"), ("HuggingFaceH4/aime_2024", None, "train"), samples=32),
    "aime25": Suite(("aime25", "aime2025"), ("math-ai/aime25", None, "test"), samples=32),
    "amc23": Suite(("amc23", "amc2023", "amc"), ("math-ai/amc23", None, "test"), samples=32),
    "math500": Suite(("math500",), ("HuggingFaceH4/MATH-500", None, "test")),
    "minerva": Suite(("minerva", "minervamath"), ("math-ai/minervamath", None, "test")),
    "arc_c": Suite(("arcc", "arcchallenge"), ("allenai/ai2_arc", "ARC-Challenge", "test"), reward="choice"),
    "gpqa_diamond": Suite(("gpqadiamond", "gpqad"), ("Idavidrein/gpqa", "gpqa_diamond", "train"), reward="choice"),
    "gsm8k": Suite(("gsm8k", "gsm8ktest"), ("openai/gsm8k", "main", "test"), extract="number"),
}


def check_suites(names: Iterable[str], where: str) -> None:
    """Raise UserError, beginning with ``where``, for a name that is no suite's."""
    for name in names:
        if name not in SUITES:
            raise UserError(f"{where}: {name!r} is none of the suites {', '.join(SUITES)}")


def load_suite(name: str, settings: Evaluation) -> list[Prompt]:
    """The suite's problems (the first ``settings.limit``), asked as ``settings`` says. Ids: ``name-0``, ``name-1``, ...

    Raises UserError: no file and no library to fetch one, several files, a row without question or answer.
    """
    if settings.data:
        file = _find(name, Path(settings.data))
        origin, rows = str(file), _read(file)
    else:
        origin, rows = _hub(name)
    prompts = []
    for index, row in enumerate(rows[: settings.limit]):
        try:
            prompts.append(_prompt(name, index, row, settings))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{origin}: problem {index + 1}: {error}") from None
    if not prompts:
        raise UserError(f"{origin}: holds no problem")
    return prompts


def _find(name: str, folder: Path) -> Path:
    """The suite's file: ``AIME24.json``, ``gsm8k/test.jsonl`` or ``gsm8k/main/test.jsonl``, in or below the folder."""
    if not folder.is_dir():
        raise UserError(f"evaluation.data: {folder}: no such folder")
    found = []
    for path in sorted([*folder.glob("*.*"), *folder.glob("*/*.*"), *folder.glob("*/*/*.*")]):
        stem, above = _plain(path.stem), map(_plain, path.parts[-3:-1])
        is_test = re.fullmatch(r"test(\d+of\d+)?", stem) and any(part in SUITES[name].stems for part in above)
        if path.suffix in SUFFIXES and (stem in SUITES[name].stems or is_test):
            found.append(path)
    if not found:
        example = f"{SUITES[name].stems[0]}.jsonl"
        raise UserError(f"evaluation.data: {folder}: no file of the suite {name} (such as {example})")
    if len(found) > 1:
        raise UserError(f"evaluation.data: {folder}: two files of the suite {name}: {found[0]}, {found[1]}")
    return found[0]


def _plain(name: str) -> str:
    return re.sub("[^a-z0-9]", "", name.lower())


def _read(file: Path) -> list[Any]:
    try:
        if file.suffix == ".parquet":
            import pyarrow.parquet as parquet

            return parquet.read_table(file).to_pylist()
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".json":
            rows = json.loads(text)
        else:
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    except (OSError, ValueError, RecursionError) as error:  # pyarrow's errors are of these kinds
        raise UserError(f"{file}: cannot be read: {error}") from None
    if not isinstance(rows, list):
        raise UserError(f"{file}: expected a list of problems")
    return rows


def _hub(name: str) -> tuple[str, list[Any]]:
    repository, configuration, split = SUITES[name].hub
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"evaluation.data: unset, and the library `datasets`, which would fetch {repository}, is not installed "
            "(pip install 'megatron_dypo[eval]')"
        ) from None
    try:
        return repository, datasets.load_dataset(repository, configuration, split=split).to_list()
    except Exception as error:  # whatever the hub's client raises without a network, or without leave
        raise UserError(f"{repository}: cannot be fetched: {type(error).__name__}: {error}") from None


def _prompt(name: str, index: int, row: Any, settings: Evaluation) -> Prompt:
    if not isinstance(row, dict):
        raise ValueError(f"expected an object, got {type(row).__name__}")
    suite, identity = SUITES[name], f"{name}-{index}"
    question, system = _question(row)
    answer = _answer(row)
    if suite.reward == "choice":
        choices = _as_choices(row, question, answer)
        if settings.shuffle_options:
            choices = choices.shuffled(settings.seed, identity)
        question, answer = str(choices), choices.answer
    if settings.instruction:
        question = f"{question.rstrip()}\n\n{settings.instruction}"
    system = settings.system or system
    messages = [{"role": "system", "content": system}] if system else []
    return Prompt(identity, answer, (), name, (*messages, {"role": "user", "content": question}))


def _question(row: dict) -> tuple[str, str | None]:
    """(what is asked, the file's own system message)."""
    value = next((row[field] for field in QUESTIONS if row.get(field)), None)
    if isinstance(value, str):
        return value, None
    if isinstance(value, list) and all(isinstance(message, dict) for message in value):
        said = {message.get("role"): message.get("content") for message in value}
        if isinstance(said.get("user"), str):
            return said["user"], said.get("system")
    raise ValueError(f"no question: none of {', '.join(QUESTIONS)} holds text or a chat")


def _answer(row: dict) -> str:
    nested = row.get("reward_model")
    values = [row.get(field) for field in ANSWERS] + [nested.get("ground_truth") if isinstance(nested, dict) else None]
    value = next((value for value in values if value not in (None, "")), None)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise ValueError(f"no answer: none of {', '.join(ANSWERS)} holds one")
    marked = value.rpartition("####")  # GSM8K's, at the end of a worked solution
    return marked[2].strip() if marked[1] else value


def _as_choices(row: dict, question: str, answer: str) -> Choices:
    """The options as ARC has them (lists of texts and labels), as GPQA has them, or as lines of the question."""
    options = row.get("choices")
    if isinstance(options, dict):
        return Choices(question, tuple(options["label"]), tuple(options["text"]), answer)
    wrong = [row[f"Incorrect Answer {number}"] for number in (1, 2, 3) if f"Incorrect Answer {number}" in row]
    if wrong:
        texts = sorted(text.strip() for text in (answer, *wrong))  # the right one stands first in the file
        labels = tuple("ABCD"[: len(texts)])
        return Choices(question, labels, tuple(texts), labels[texts.index(answer.strip())])
    return find_choices(question, answer)
