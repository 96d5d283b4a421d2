"""Problems as texts: what makes two of them the same, and the words that overlaps are made of."""

from __future__ import annotations

import hashlib
import re
import unicodedata

# What LaTeX and Markdown add to a formula without changing it: delimiters, spacing, sizes.
_TYPESETTING = re.compile(r"\\(?:[()\[\]!,;: ]|left(?![a-z])|right(?![a-z])|quad|qquad|displaystyle)|\\?\$|~")
_FRACTIONS = re.compile(r"\\[dt]frac(?![a-z])")
_WORD = re.compile(r"[^\W_]+")


def normalised(text: str) -> str:
    """``text`` without what typesetting varies: Unicode forms, case, white space, LaTeX delimiters, the last full stop.

    Operators and digits stay: "2 + 3" and "2 - 3" are two problems.
    """
    text = _TYPESETTING.sub(" ", unicodedata.normalize("NFC", text))  # not NFKC, to which 2² is 22
    return "".join(_FRACTIONS.sub(r"\\frac", text).casefold().split()).rstrip(".:")


def problem_key(text: str) -> str:
    """Equal for problems with the same normalised text: 32 hexadecimal digits."""
    return digest(normalised(text))


def is_text(*texts: str) -> bool:
    """Whether files and tokenizers take them: JSON can escape halves of surrogate pairs one by one."""
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        return False
    return True


def digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def words(text: str) -> list[str]:
    """Runs of letters and digits, in lower case: what is left of a problem, however it is typeset."""
    return _WORD.findall(_TYPESETTING.sub(" ", unicodedata.normalize("NFKC", text)).casefold())


def without_instruction(text: str, instruction: str) -> str:
    """The problem alone, where ``instruction`` stands at its end."""
    text = text.strip()
    return text.removesuffix(instruction.strip()).rstrip() if instruction.strip() else text
