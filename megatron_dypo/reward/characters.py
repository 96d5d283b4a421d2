r"""Unicode characters of mathematics -> ASCII and LaTeX: full-width digits, minus signs, ``π``, ``√2``, ``x²``."""

from __future__ import annotations

import re

_COMMANDS = {
    "×": "times", "·": "cdot", "⋅": "cdot", "∙": "cdot", "÷": "div", "±": "pm", "∓": "mp", "∞": "infty",
    "≤": "le", "⩽": "le", "≥": "ge", "⩾": "ge", "≠": "ne", "≈": "approx", "∈": "in", "∪": "cup", "∩": "cap",
    "∅": "emptyset", "α": "alpha", "β": "beta", "γ": "gamma", "δ": "delta", "ε": "epsilon", "θ": "theta",
    "λ": "lambda", "μ": "mu", "π": "pi", "𝜋": "pi", "ρ": "rho", "σ": "sigma", "τ": "tau", "φ": "phi", "ω": "omega",
    "\u00b5": "mu", "Ω": "Omega", "\u2126": "Omega", "∨": "lor", "∖": "setminus", "ℝ": "mathbb{R}", "∣": "mid",
}  # fmt: skip
_FRACTIONS = {
    "½": "12",
    "⅓": "13",
    "⅔": "23",
    "¼": "14",
    "¾": "34",
    "⅕": "15",
    "⅖": "25",
    "⅗": "35",
    "⅘": "45",
    "⅙": "16",
}
_FRACTIONS |= {"⅚": "56", "⅐": "17", "⅛": "18", "⅜": "38", "⅝": "58", "⅞": "78", "⅑": "19"}
_TABLE = str.maketrans(
    {chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}  # full-width forms
    | dict.fromkeys("−﹣\u2010\u2011\u2012\u2013\u2014\u2015", "-")  # hyphens and dashes, which people type for minus
    | dict.fromkeys("∕⁄", "/")
    | dict.fromkeys("\u00ad\u200b\u200c\u200d\u2060\ufeff", "")  # of no width
    | {character: f"\\{command} " for character, command in _COMMANDS.items()}
    | {character: f"\\frac{{{top}}}{{{bottom}}}" for character, (top, bottom) in _FRACTIONS.items()}
    | dict.fromkeys("\u2009\u202f", "\\,")  # thin spaces
    | {
        "°": r"^\circ ",
        "º": r"^\circ ",
        "℃": r"^\circ C",
        "℉": r"^\circ F",
        "Å": r"\AA ",
        "…": "...",
        "′": "'",
        "″": "''",
        "’": "'",
        "‘": "'",
        "“": '"',
        "”": '"',
        "，": ",",
        "、": ",",
    }
)
_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ", "0123456789-+n")
_LOWERED = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_RAISED_RUN = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ]+")
_LOWERED_RUN = re.compile("[₀₁₂₃₄₅₆₇₈₉]+")
_ROOT = re.compile(r"√\s*(?:\(([^()]*)\)|([0-9]+(?:\.[0-9]+)?|[A-Za-z]))")


def plain(text: str) -> str:
    """``text`` with each of these characters spelt out; ASCII comes back as it is. Linear time."""
    if text.isascii():
        return text
    text = _RAISED_RUN.sub(lambda run: f"^{{{run[0].translate(_RAISED)}}}", text)
    text = _LOWERED_RUN.sub(lambda run: f"_{{{run[0].translate(_LOWERED)}}}", text)
    text = _ROOT.sub(lambda root: f"\\sqrt{{{root[1] or root[2]}}}", text.translate(_TABLE))
    return text.replace("√", r"\sqrt ")
