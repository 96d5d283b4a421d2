"""Load the evaluation suites of the paper (4.1) and your own files: their problems, and what counts as an answer.

file or hub --rows--> question, answer, options --> Prompt(messages, ground_truth)

Files may use any of the usual field names; the hub's data sets differ from the files that circulate. A suite is
requested by name or by file:

aime24                                            a suite of this module
data/olympiad.jsonl                               a file; its suite is called olympiad
hard=data/olympiad.jsonl?samples=8&extract=number
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dypo.config.checks import is_custom
from megatron_dypo.config.schema import Evaluation, Reward
from megatron_dypo.errors import UserError
from megatron_dypo.escapes import swallowed_in, with_escapes
from megatron_dypo.evaluate.choices import choices_of
from megatron_dypo.evaluate.suite_files import SUFFIXES, SuiteLocation, find, read
from megatron_dypo.records import Prompt
from megatron_dypo.reward import build_reward, last_boxed

log = logging.getLogger(__name__)

QUESTIONS = ("problem", "question", "prompt")  # columns, in any case; the first one present counts
ANSWERS = ("answer", "ground_truth", "expected_answer", "final_answer", "answerkey", "correct answer", "solution")
ONE_SPLIT = ("test", "train")  # small suites have a single split, under either name


@dataclass(frozen=True)
class Suite:
    """A suite. ``place``: local files. ``hub``: (data set, configuration, split). ``problems``: their number. Your own
    suite has a ``file`` instead of the three.

    ``reward`` and ``extract`` say how answers are graded (as in the configuration's `reward` section), ``samples`` is
    the number of responses per problem: small suites need many for a steady mean. ``given``: which of the three the
    request sets; the section `evaluation` does not override those.
    """

    name: str
    place: SuiteLocation | None = None
    hub: tuple[str, str | None, str] | None = None
    problems: int | None = None
    samples: int = 1
    reward: str = "math"
    extract: str = "boxed"
    file: Path | None = None
    given: frozenset[str] = frozenset()

    def samples_in(self, settings: Evaluation) -> int:
        """Return the responses per problem; greedy decoding takes one."""
        if settings.temperature == 0:
            return 1
        return self.samples if "samples" in self.given else settings.samples or self.samples

    def extract_in(self, settings: Evaluation) -> str:
        return self.extract if "extract" in self.given else settings.extract or self.extract


_PAPER = (
    Suite(
        "aime24",
        SuiteLocation(("aime24", "aime2024"), ONE_SPLIT),
        ("HuggingFaceH4/aime_2024", None, "train"),
        30,
        samples=32,
    ),
    Suite("aime25", SuiteLocation(("aime25", "aime2025"), ONE_SPLIT), ("math-ai/aime25", None, "test"), 30, samples=32),
    Suite(
        "amc23", SuiteLocation(("amc23", "amc2023", "amc"), ONE_SPLIT), ("math-ai/amc23", None, "test"), 40, samples=32
    ),
    Suite("math500", SuiteLocation(("math500",)), ("HuggingFaceH4/MATH-500", None, "test"), 500),
    Suite("minerva", SuiteLocation(("minerva", "minervamath")), ("math-ai/minervamath", None, "test"), 272),
    Suite(
        "arc_c",
        SuiteLocation(("arcc", "arcchallenge", "ai2arc"), configuration="ARC-Challenge"),
        ("allenai/ai2_arc", "ARC-Challenge", "test"),
        1172,
        reward="choice",
    ),
    Suite(
        "gpqa_diamond",
        SuiteLocation(("gpqadiamond", "gpqad", "gpqadiamondmc"), ONE_SPLIT),
        ("Idavidrein/gpqa", "gpqa_diamond", "train"),
        198,
        reward="choice",
    ),
    Suite(
        "gsm8k",
        SuiteLocation(("gsm8k",), configuration="main"),
        ("openai/gsm8k", "main", "test"),
        1319,
        extract="number",
    ),
)
SUITES = {suite.name: suite for suite in _PAPER}


def load_suites(asked: Iterable[str], settings: Evaluation, where: str) -> dict[Suite, list[Prompt]]:
    """Load the problems of the suites ``asked`` for, in order. Raises UserError as ``named_suites`` and ``load_suite``,
    and for a user's function that cannot be imported or called.
    """
    suites = named_suites(asked, where)
    for suite in suites:
        if is_custom(suite.reward):
            try:
                build_reward(Reward(function=suite.reward)).close()
            except UserError as error:
                raise UserError(f"{where}: suite {suite.name}: {error}") from None
    return {suite: load_suite(suite, settings) for suite in suites}


def load_suite(suite: Suite | str, settings: Evaluation) -> list[Prompt]:
    """Load a suite's problems (the first ``settings.limit``), asked as ``settings`` says. Ids: ``name-0``, ...

    A suite of the paper may be given by its name. Raises UserError: no file and no library to fetch one, several files,
    a row without question or answer.
    """
    suite = SUITES[suite] if isinstance(suite, str) else suite
    if suite.file or settings.data:
        files = [suite.file] if suite.file else find(suite.name, suite.place, Path(settings.data))
        origin, rows = ", ".join(map(str, files)), [row for file in files for row in read(file)]
    else:
        origin, rows = _hub(suite)
    prompts, repairs = [], 0
    for index, row in enumerate(rows[: settings.limit]):
        if isinstance(row, dict) and swallowed_in(row):
            row, repairs = with_escapes(row), repairs + 1
        try:
            prompts.append(_prompt(suite, index, row, settings))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{origin}: problem {index + 1}: {error}") from None
    if not prompts:
        raise UserError(f"{origin}: holds no problem")
    if suite.problems not in (None, len(rows)):
        log.warning("%s: %d problems, and the suite %s has %d", origin, len(rows), suite.name, suite.problems)
    if repairs:
        log.warning("%s: swallowed backslashes of LaTeX commands restored in %d problems", origin, repairs)
    return prompts


def _hub(suite: Suite) -> tuple[str, list[Any]]:
    repository, configuration, split = suite.hub
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"evaluation.data: unset, and the library `datasets`, which would fetch {repository}, is not installed "
            "(pip install 'megatron_dypo[eval]')"
        ) from None
    try:
        return repository, datasets.load_dataset(repository, configuration, split=split).to_list()
    except Exception as error:  # whatever the hub's client raises without network or permission
        raise UserError(f"{repository}: cannot be fetched: {type(error).__name__}: {error}") from None


def _prompt(suite: Suite, index: int, row: Any, settings: Evaluation) -> Prompt:
    if not isinstance(row, dict):
        raise ValueError(f"expected an object, got {type(row).__name__}")
    row = {str(column).strip().casefold(): value for column, value in row.items()}
    identity, source, extra = f"{suite.name}-{index}", suite.name, ""
    question, system = _question(row)
    answer: str | list | dict
    if is_custom(suite.reward):  # called with what training passes to it
        value = _answer_value(row)
        answer = value if isinstance(value, (list, dict)) else _answer(row)
        source = str(row.get("data_source") or suite.name)
        extra = json.dumps(row["extra_info"]) if isinstance(row.get("extra_info"), dict) else ""
    elif suite.reward == "choice":
        choices = choices_of(row, question, _answer(row))
        if settings.shuffle_options:
            choices = choices.shuffled(settings.seed, identity)
        question, answer = str(choices), choices.answer
    else:
        answer = _answer(row)
    if settings.instruction:
        question = f"{question.rstrip()}\n\n{settings.instruction}"
    system = settings.system or system
    messages = [{"role": "system", "content": system}] if system else []
    return Prompt(identity, answer, (), source, (*messages, {"role": "user", "content": question}), extra=extra)


def _question(row: dict) -> tuple[str, str | None]:
    """Return (question, the file's own system message)."""
    value = next((row[field] for field in QUESTIONS if row.get(field)), None)
    if isinstance(value, dict):
        value = value.get("stem")  # ARC's original release
    if isinstance(value, str):
        return value, None
    if isinstance(value, list) and all(isinstance(message, dict) for message in value):
        said = {message.get("role"): message.get("content") for message in value}
        if isinstance(said.get("user"), str):
            return said["user"], said.get("system")
    raise ValueError(f"no question: none of {', '.join(QUESTIONS)} holds text or a chat")


def _answer_value(row: dict) -> Any:
    """Return the value of the first of the usual columns that holds one, or None."""
    nested = row.get("reward_model")
    values = [row.get(field) for field in ANSWERS] + [nested.get("ground_truth") if isinstance(nested, dict) else None]
    return next((value for value in values if value not in (None, "", [])), None)


def _answer(row: dict) -> str:
    """Return the final answer; of a worked solution, its last box, or what follows ``####``."""
    value = _answer_value(row)
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        value = str(value)
    if not isinstance(value, str):
        raise ValueError(f"no answer: none of {', '.join(ANSWERS)} holds one")
    marked = value.rpartition("####")  # GSM8K's, at the end of a worked solution
    if marked[1]:
        return marked[2].strip()
    boxed = last_boxed(value)
    return value if boxed is None else boxed


_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_TAKEN = {*SUITES, "valid"}  # eval/valid/* are the metrics of data.valid
_OPTIONS: dict[str, tuple[Callable[[str], Any], str]] = {  # (whether a value is valid, what it must be)
    "samples": (re.compile("[1-9][0-9]{0,5}").fullmatch, "a number from 1 on"),
    "extract": (re.compile("boxed|marked|number").fullmatch, "boxed, marked or number"),
    "reward": (lambda value: value in ("math", "choice") or is_custom(value), "math, choice or path/file.py:function"),
}
FORM = "[NAME=]FILE[?samples=N&extract=boxed|marked|number&reward=math|choice|path/file.py:function]"


def named_suites(asked: Iterable[str], where: str) -> list[Suite]:
    """Parse the suites asked for, in order. Raises UserError, starting with ``where``: unknown suite or file, bad form,
    or a name twice.
    """
    suites = [SUITES[each] if each in SUITES else _own(each, where) for each in asked]
    seen: set[str] = set()
    for suite in suites:
        if suite.name in seen:
            raise UserError(f"{where}: two suites are called {suite.name!r}; give one another name: NAME=FILE")
        seen.add(suite.name)
    return suites


def _own(asked: str, where: str) -> Suite:
    place, mark, text = asked.partition("?")
    name, equals, path = place.rpartition("=")
    file = Path(os.path.expandvars(path)).expanduser()
    if file.suffix.lower() not in SUFFIXES:
        raise UserError(
            f"{where}: {asked!r} is not one of the suites {', '.join(SUITES)}, nor a file of your own ({FORM}; "
            f"{', '.join(SUFFIXES)})"
        )
    name = name if equals else file.stem
    if not _NAME.fullmatch(name) or name in _TAKEN:
        why = "is taken" if name in _TAKEN else "has more than letters, digits, dots, dashes and underscores"
        raise UserError(f"{where}: {asked!r}: the name {name!r} {why}; give another: NAME={path}")
    if not file.is_file():
        raise UserError(f"{where}: {asked!r}: there is no file {file}")
    return Suite(name, file=file, **_options(asked, text if mark else None, where))


def _options(asked: str, text: str | None, where: str) -> dict:
    """Return the fields of the suite that ``text`` sets: ``samples=8&extract=number``."""
    found: dict[str, str] = {}
    for part in [] if text is None else text.split("&"):
        key, equals, value = part.partition("=")
        if not equals or key not in _OPTIONS or key in found:
            raise UserError(f"{where}: {asked!r}: {part!r} is not one of {FORM}, each at most once")
        is_one, shape = _OPTIONS[key]
        if not is_one(value):
            raise UserError(f"{where}: {asked!r}: {key} is {value!r}, not {shape}")
        found[key] = value
    fields = found | ({"samples": int(found["samples"])} if "samples" in found else {})
    return fields | {"given": frozenset(found)}
