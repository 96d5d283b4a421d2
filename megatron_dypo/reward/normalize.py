"""Reduce the many Unicode and LaTeX spellings to one: ``π``, ``x²``; ``\\dfrac12``, ``{\\bf 42}``.

Only invisible things are removed (layout, fonts, colours, sizes), so different answers stay different. Upright
words stay in their ``\\text{...}`` or ``\\mathrm{...}``: ``units.py`` reads them.
"""

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
    | dict.fromkeys("−﹣\u2010\u2011\u2012\u2013\u2014\u2015", "-")  # hyphens and dashes, typed for a minus sign
    | dict.fromkeys("∕⁄", "/")
    | dict.fromkeys("\u00ad\u200b\u200c\u200d\u2060\ufeff", "")  # zero width
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


def unicode_math(text: str) -> str:
    """Return ``text`` with each of these characters spelt out; ASCII is unchanged. Linear time."""
    if text.isascii():
        return text
    text = _RAISED_RUN.sub(lambda run: f"^{{{run[0].translate(_RAISED)}}}", text)
    text = _LOWERED_RUN.sub(lambda run: f"_{{{run[0].translate(_LOWERED)}}}", text)
    text = _ROOT.sub(lambda root: f"\\sqrt{{{root[1] or root[2]}}}", text.translate(_TABLE))
    return text.replace("√", r"\sqrt ")


_ENCLOSED = re.compile(
    r"\$\$([^$]*)\$\$|\$([^$]*)\$|\\\(((?:(?!\\[()]).)*)\\\)|\\\[((?:(?!\\[\[\]]).)*)\\\]|\*\*([^*]*)\*\*"
)
_WRAPPED = re.compile(
    r"\\(?:text|textrm|textbf|textit|textnormal|mbox|mathrm|displaystyle)\s*\{([^{}]*)\}|\{((?:[^{}]|\{[^{}]*\})*)\}"
)
_THOUSANDS = re.compile(r"(?<=[0-9])(?:\\,|\{,\}|~)\s*(?=[0-9]{3}(?![0-9]))")
_SPACE = re.compile(r"(?<!\\)\\[,;:> ]|\\q?quad(?![a-zA-Z])|~")
_FRACTION = re.compile(r"\\[dtc]frac(?![a-zA-Z])")
_ONE = r"([0-9]|\\pi(?![A-Za-z])|(?<=[\s}0-9])[A-Za-z](?![A-Za-z]))"
_BARE_TOP = re.compile(rf"(\\frac)\s*{_ONE}")
_BARE_BOTTOM = re.compile(rf"(\\frac\s*\{{(?:[^{{}}]|\{{[^{{}}]*\}})*\}})\s*{_ONE}")
_END = re.compile(r"(?:[\s.,;]|\\\\|\\newline(?![a-zA-Z]))+$")
_LONGEST_END = 200  # characters; the search is quadratic at worst

_DOTS = re.compile(r"\\(?:[lc]dots|dots[bcimo]?)(?![a-zA-Z])\s*|(?<=[,+*-])\s*\.{3,}\s*|(?<=[,+*-] )\.{3,}\s*")
_DOTS_END = re.compile(r"(?<=[0-9])\s*\\ldots\s*$")
_PRIME = re.compile(r"\s*\^\s*(?:\\prime(?![a-zA-Z])|\{\s*((?:\\prime\s*)+)\})")
_NO_WORD = r"(?![a-zA-Z])"
_SWITCH = (
    r"\\(?:tiny|scriptsize|footnotesize|small|normalsize|large|Large|LARGE|huge|Huge|boldmath|unboldmath"
    rf"|bf|it|sl|sf|tt|bfseries|itshape|sffamily|rmfamily|mdseries|upshape|normalfont|em){_NO_WORD}\s*"
)
_COLOUR = r"\\(?:textcolor|colorbox|mathcolor|color)\s*(?:\[[^\[\]{}]*\])?\{[^{}]*\}\s*"
_UNSEEN = re.compile(
    r"(?<!\\)\\!\s*"
    rf"|\\(?:left|right)(?:\.|{_NO_WORD})|\\(?:[bB]igg?[lrm]?|middle){_NO_WORD}"
    rf"|\\(?:(?:display|text|(?:script)+)style|(?:no)?limits|nonumber|notag|(?:math)?strut|hfill){_NO_WORD}\s*"
    rf"|{_SWITCH}|{_COLOUR}|\\(?:hspace|vspace|hskip|label|tag)\*?\s*\{{[^{{}}]*\}}"
)
_OLD_UPRIGHT = re.compile(r"\{\s*\\(?:rm|mathrm)(?![a-zA-Z])\s*([^{}\\]*)\}")
_FONT = re.compile(  # including the opening brace of its argument
    r"\\(?:mathbf|mathit|mathsf|mathtt|mathnormal|boldsymbol|bm|pmb|bold|ensuremath|underline|emph|textsf|texttt)\s*\{"
    r"|\\(?:mathrm|text|textrm|rm)\s*\{(?=[^{}]*(?:\\(?:d|t|c)?frac|\\sqrt|\\pi|\\begin|\\cdot\s*[0-9]))"
    r"|\\(?:mathrm|text|textrm|textbf|textit)\s*\{(?=[-+0-9., ]+\})"
    rf"|{_COLOUR}\{{|\{{\s*(?:{_SWITCH}|{_COLOUR}(?!\{{))"
)
_UPRIGHT_LETTER = re.compile(r"\\(?:mathrm|rm|operatorname|text|textrm)\s*\{\s*([ei])\s*\}|\\[ij]math(?![a-zA-Z])")
_NAMES_OF_FUNCTIONS = "(?:arc)?(?:sin|cos|tan|cot|sec|csc)|(?:sin|cos|tan|cot)h|log|ln|lg|exp|min|max|gcd|det"
_FUNCTION = re.compile(  # min without an argument means minutes
    rf"\\(?:operatorname\*?|mathrm|text|textrm|mathop)\s*\{{\s*(?!min\s*\}}(?!\s*[({{\\_]))({_NAMES_OF_FUNCTIONS})\s*\}}"
)
_LOG_E = re.compile(r"\\log\s*_\s*(?:e|\{\s*e\s*\})(?![a-zA-Z])")
_RELATIONS = {"leq": "le", "geq": "ge", "leqslant": "le", "geqslant": "ge", "neq": "ne", "lbrace": "{", "rbrace": "}"}
_RELATIONS |= {"varnothing": "emptyset"}  # a variant of the same symbol
_RELATION = re.compile(rf"\\({'|'.join(_RELATIONS)}){_NO_WORD}|\\([lg]t){_NO_WORD}")


def canonical(text: str) -> str:
    r"""Return ``text`` in one spelling: ASCII, single spaces, no layout, style, ``$...$`` or ``\text{...}``."""
    text = unicode_math(text)
    if "dots" in text or "..." in text:
        text = _DOTS_END.sub("", _DOTS.sub(r"\\ldots ", text))
    if "\\" in text or "~" in text or "{" in text:
        text = _SPACE.sub(" ", _styleless(_THOUSANDS.sub(",", text)))
        if "frac" in text:
            text = _BARE_BOTTOM.sub(r"\1{\2}", _BARE_TOP.sub(r"\1{\2}", _FRACTION.sub(r"\\frac", text)))
    text = " ".join(text.split())
    for _ in range(4):  # $\text{...}.$ has three layers
        text = _without_end(text)
        enclosed = _ENCLOSED.fullmatch(text) or _wrapped(text)
        if not enclosed:
            break
        text = next((part for part in enclosed.groups() if part is not None), "").strip()
    return text


def _styleless(text: str) -> str:
    if "\\" not in text:
        return text
    text = _without_commands(_OLD_UPRIGHT.sub(r"\\mathrm{\1}", text), _FONT)
    text = _UNSEEN.sub("", text)
    text = _FUNCTION.sub(r"\\\1 ", text)
    text = _UPRIGHT_LETTER.sub(lambda match: match[1] or ("i" if "i" in match[0][:2] else "j"), text)
    text = _PRIME.sub(lambda match: "'" * (match[1] or "\\prime").count("prime"), text)
    text = _LOG_E.sub(r"\\ln ", text)
    return _RELATION.sub(lambda match: "<>"[match[2] == "gt"] if match[2] else "\\" + _RELATIONS[match[1]], text)


def _without_commands(text: str, command: re.Pattern) -> str:
    """Remove the commands that ``command`` matches, each with its opening and closing brace."""
    if not command.search(text):
        return text
    kept, depths, at = [], [], 0  # depths: for each open brace, whether it is kept
    for token in re.finditer(rf"({command.pattern})|\\.|[{{}}]", text, re.DOTALL):
        kept.append(text[at : token.start()])
        at = token.end()
        if token[1] is not None:
            depths.append(False)
            continue
        if token[0] == "{":
            depths.append(True)
        elif token[0] == "}" and depths and not depths.pop():
            continue
        kept.append(token[0])
    return "".join(kept) + text[at:]


def _without_end(text: str) -> str:
    end = _END.search(text, max(0, len(text) - _LONGEST_END))
    return text[: end.start()] if end else text


def _wrapped(text: str) -> re.Match | None:
    """Match text in one pair of invisible braces, except around a list, where many writers mean a set."""
    match = _WRAPPED.fullmatch(text) if text.endswith("}") else None
    return None if match and match[2] is not None and "," in match[2] else match
