r"""Math-verify's opinion of two answers, for worker processes only: it imports sympy, and some inputs never end.

An answer is parsed as a whole or not at all: math-verify's own search for something that parses would find the 5 in
``not 5``. Units were taken off before (``units.py``); math-verify drops variables as units (``5m``, ``2t``).
"""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Any

from latex2sympy2_extended import NormalizationConfig
from latex2sympy2_extended.latex2sympy2 import latex2sympy, normalize_latex
from math_verify import verify
from math_verify.grader import should_treat_as_complex

_NORMALIZATION = NormalizationConfig(
    basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none", equations=False
)
_EXAMPLES = [
    *(
        (r"\sqrt{8}", r"2\sqrt{2}"),
        ("x^2+2x+1", "(x+1)^2"),
        (r"\cot x", r"\frac{\cos x}{\sin x}"),
        ("0.3333333", r"\frac{1}{3}"),
    ),
    *(
        (r"\{1,2\}", r"\{2,1\}"),
        ("[1,3)", "(1,3)"),
        ("y-2x=3", "y=2x+3"),
        ("x>2", r"(2,\infty)"),
        ("(1,2,x)", "(1,2,y)"),
    ),
    *(
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1\\3\end{pmatrix}"),
        ("6-5i", "-5i+6"),
        (r"0.3\pi", r"\frac{\pi}{3}"),
    ),
]


def load() -> None:
    """Fills what parser and sympy build at first use, on nobody's time: a second, which each new child would need."""
    logging.disable()  # math-verify warns of its time limits being off, and logs what it cannot compare
    for answer, truth in _EXAMPLES:
        equivalent(answer, truth)
    _parsed.cache_clear()


def equivalent(answer: str, truth: str) -> bool:
    """Whether both parse and math-verify takes them for equal; its own time limits (SIGALRM) are off."""
    parsed = [_parsed(text) for text in (truth, answer)]
    return all(part is not None for part in parsed) and bool(
        verify(*parsed, allow_set_relation_comp=True, timeout_seconds=None)
    )


@lru_cache(maxsize=1024)
def _parsed(text: str) -> Any:
    """The sympy object that ``text`` reads as; None where it is not mathematics."""
    latex = normalize_latex(text, _NORMALIZATION)
    try:
        return latex2sympy(
            latex, is_real=not should_treat_as_complex(latex), convert_degrees=False, normalization_config=None
        )
    except Exception:  # whatever the parser raises on text that it was not made for, RecursionError included
        return None
