r"""Compare two answers with math-verify, in worker processes only: it imports sympy, and hangs on some inputs.

An answer is parsed as a whole or not at all: math-verify's own search for a part that parses would find the 5 in
``not 5``. Units are removed before (``units.py``); math-verify drops variables as units (``5m``, ``2t``). Lists are
compared element by element here, with the rules of ``math.py`` for each. Two of math-verify's comparisons round or
guess; stricter ones replace them wherever it recurses to them:

_same_value      it treats a difference below 1e-15 as none, whatever the size of the numbers (2^{-99}, 2^{-98})
_same_solutions  it treats two equations without solutions as equal (x^2+1=0, x^2+2=0)
"""

from __future__ import annotations

import logging
import re
from functools import lru_cache
from typing import Any

import sympy
from latex2sympy2_extended import NormalizationConfig
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy, normalize_latex
from math_verify import grader, verify
from math_verify.grader import should_treat_as_complex

from megatron_dypo.reward.lists import agree
from megatron_dypo.reward.math import compare
from megatron_dypo.reward.units import of_an_angle

_NORMALIZATION = NormalizationConfig(
    basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none", equations=False
)
_CONVERSION = ConversionConfig(lowercase_symbols=False)  # N is not n
_EXAMPLES = [
    (r"\sqrt{8}", r"2\sqrt{2}"),
    ("x^2+2x+1", "(x+1)^2"),
    (r"\cot x", r"\frac{\cos x}{\sin x}"),
    ("0.3333333", r"\frac{1}{3}"),
    (r"\{x,2\}", r"\{2,x\}"),
    ("[1,3)", "(1,3)"),
    ("y-2x=3", "y=2x+3"),
    ("x>2", r"(2,\infty)"),
    ("(1,2,x)", "(1,2,y)"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1\\3\end{pmatrix}"),
    ("6-5i", "-5i+6"),
    (r"0.3\pi", r"\frac{\pi}{3}"),
]
_DEGREES = re.compile(
    r"([0-9.]+|(?<![A-Za-z\\])[A-Za-z]|\\[a-z]+)\s*(?:\^\s*(?:\\circ(?![a-z])|\{\s*\\circ\s*\})|\\degree(?![a-z]))"
)
_IMAGINARY = re.compile(r"(?<![A-Za-z\\])i(?![A-Za-z])")
_DIGITS = 250
_CLOSE, _CLOSE_FLOATS = sympy.Float("1e-200"), sympy.Float("1e-12")  # relative to the larger of two values
_UNLIKE = sympy.Float("1e-4")  # decimals may be rounded, but not by more than this fraction of their size
_POINTS = ((7, 11), (13, 5), (17, 19))  # where expressions with variables are evaluated: 7/11, then 8/11, ...


def load() -> None:
    """Warm the parser and sympy caches before forking (about 1 s), so that no child pays for it inside a timed job."""
    logging.disable()  # math-verify warns that its time limits are off, and logs what it cannot compare
    for answer, truth in _EXAMPLES:
        equivalent(answer, truth)
    _parsed.cache_clear()


def equivalent(answer: str, truth: str, ordered: bool | None = None) -> bool:
    """Return whether two texts that the rules could not decide are equivalent; ``ordered`` as in ``compare``."""
    verdict = agree(answer, truth, ordered, _decided)
    return _verified(answer, truth) if verdict is None else verdict


def _decided(answer: str, truth: str) -> bool:
    verdict = compare(answer, truth)
    return verdict if isinstance(verdict, bool) else equivalent(*verdict)


def _verified(answer: str, truth: str) -> bool:
    """Return whether both texts parse and math-verify finds them equal; its own time limits (SIGALRM) are off."""
    real = not (_with_i(truth) or _with_i(answer))
    parsed = [_parsed(text, real) for text in (truth, answer)]
    return all(part is not None for part in parsed) and bool(
        verify(*parsed, allow_set_relation_comp=True, timeout_seconds=None)
    )


def _with_i(text: str) -> bool:
    """Return whether ``text`` is about complex numbers."""
    return _IMAGINARY.search(text) is not None or should_treat_as_complex(text)


@lru_cache(maxsize=1024)
def _parsed(text: str, real: bool) -> Any:
    """Return ``text`` parsed by sympy, with ``real`` variables or not; None if it is not mathematics."""
    if of_an_angle(text):
        text = _DEGREES.sub(r"(\\frac{\1 \\pi}{180})", text)
    latex = normalize_latex(text, _NORMALIZATION)
    try:
        parsed = latex2sympy(
            latex,
            is_real=real or None,
            convert_degrees=False,
            normalization_config=None,
            conversion_config=_CONVERSION,
        )
    except Exception:  # the parser may raise anything on foreign text, including RecursionError
        return None
    if not isinstance(parsed, (sympy.Expr, sympy.MatrixBase)):
        return parsed
    if parsed.has(sympy.I):
        parsed = parsed.xreplace({sympy.I: sympy.Symbol("I", real=real or None)})  # how the parser reads a capital
    return parsed if real else parsed.xreplace({name: sympy.I for name in parsed.free_symbols if name.name == "i"})


# --- replacements of math-verify's own comparisons


def _same_value(a: Any, b: Any, float_rounding: int, numeric_precision: int) -> bool:
    """Compare numbers as math-verify does, but accept its yes only if the values agree relative to their size."""
    if not _THEIRS_OF_VALUES(a, b, float_rounding, numeric_precision):
        return False
    if not isinstance(a, sympy.Expr) or not isinstance(b, sympy.Expr) or a == b:
        return True  # matrices arrive here element by element
    return _agree_in_value(a, b)


def _agree_in_value(a: sympy.Expr, b: sympy.Expr) -> bool:
    """Compare two expressions, at three points if they have variables; False if they have no value there."""
    a, b = (grader.safe_sympy_doit(grader.unwrap_fcs(part)) for part in (a, b))
    if a == b:
        return True
    decimals = [part for part in (a, b) if part.is_Float]
    limit = _UNLIKE if decimals else _CLOSE_FLOATS if a.has(sympy.Float) or b.has(sympy.Float) else _CLOSE
    names = sorted(a.free_symbols | b.free_symbols, key=str)
    for top, bottom in _POINTS if names else _POINTS[:1]:
        at = {name: sympy.Rational(top + index, bottom) for index, name in enumerate(names)}
        x, y = (sympy.N(part.subs(at), _DIGITS) for part in (a, b))
        size = max(abs(x), abs(y))
        if not size.is_Number or (size != 0 and abs(x - y) > limit * size):
            return False
    return True


def _same_solutions(gold: Any, pred: Any, float_rounding: int, numeric_precision: int) -> bool:
    """Compare equations by solving, as math-verify does; without solutions, check for a constant ratio."""
    if isinstance(gold, sympy.Eq) and isinstance(pred, sympy.Eq):
        one, other = gold.lhs - gold.rhs, pred.lhs - pred.rhs
        if not all(sympy.solve(side, side.free_symbols) for side in (one, other)):
            ratio = sympy.simplify(one / other)
            return bool(ratio.is_number and ratio.is_finite and ratio.is_nonzero)
    return _THEIRS_OF_SOLUTIONS(gold, pred, float_rounding, numeric_precision)


_THEIRS_OF_VALUES, _THEIRS_OF_SOLUTIONS = grader.sympy_numeric_eq, grader.sympy_solve_and_compare
grader.sympy_numeric_eq, grader.sympy_solve_and_compare = _same_value, _same_solutions
