"""HTML tables of the report."""

from __future__ import annotations

from html import escape


def table(header: list[str], rows: list[list[str]]) -> str:
    """``header`` and ``rows`` are markup, a row's first cell its heading. It scrolls sideways where it has no room."""
    head = "".join(f'<th scope="col">{cell}</th>' for cell in header)
    body = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>' for first, *rest in rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def cell(value: str, small: str = "") -> str:
    """A value (text) with its small print (text) below."""
    return escape(value) + (f"<small>{escape(small)}</small>" if small else "")


def share(value: float, low: float | None = None, high: float | None = None, small: str = "") -> str:
    """A share with its interval (all in [0, 1]) in percent and as a mark on a bar from 0 to 100%."""
    between = low is not None and high is not None
    text = f"{value:.1%}" + (f" [{low:.1%}, {high:.1%}]" if between else "")
    bar = f'<i style="left:{100 * low:.1f}%;width:{100 * (high - low):.1f}%"></i>' if between else ""
    return f'{escape(text)}<span class="range">{bar}<b style="left:{100 * value:.1f}%"></b></span>' + (
        f"<small>{escape(small)}</small>" if small else ""
    )
