"""html_tables: tables that can be sorted, read aloud, and read on a phone."""

from collections.abc import Sequence
from html import escape

from towers.report.summary import size


class Bytes(int):
    """A number of bytes, which people read in kB, MB, GB."""


class Seconds(float):
    """A time, which people read in ms."""


Cell = str | int | Seconds | None


def count(number: int) -> str:
    """A whole number with separators."""
    return f"{number:,}"


def table(
    caption: str, head: Sequence[str], rows: Sequence[Sequence[Cell]]
) -> str:
    """Rows under a head of buttons that sort; "" if there are no rows.

    Numbers are to the right, and None, which is not known, is a "?".
    """
    if not rows:
        return ""
    numeric = [
        any(isinstance(row[i], (int, Seconds)) for row in rows)
        for i in range(len(head))
    ]
    heads = "".join(
        f'<th scope="col"{_right(n)}><button type="button">{escape(h)}'
        "</button></th>"
        for h, n in zip(head, numeric)
    )
    body = "".join(
        "<tr>" + "".join(map(_cell, row, numeric)) + "</tr>" for row in rows
    )
    return (
        f'<div class="wide" tabindex="0" role="group" '
        f'aria-label="{escape(caption)}"><table class="sortable">'
        f"<caption>{escape(caption)}</caption><thead><tr>{heads}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def _cell(value: Cell, numeric: bool) -> str:
    if value is None:
        return f"<td{_right(numeric)}>?</td>"
    if isinstance(value, Bytes):
        return (
            f'<td{_right(numeric)} data-n="{value:d}" '
            f'title="{count(value)} bytes">{size(value)}</td>'
        )
    if isinstance(value, Seconds):
        return (
            f'<td{_right(numeric)} data-n="{value:.9f}">{1e3 * value:.3f} ms'
            "</td>"
        )
    text = count(value) if isinstance(value, int) else escape(value)
    return f"<td{_right(numeric)}>{text}</td>"


def _right(numeric: bool) -> str:
    return ' class="n"' if numeric else ""
