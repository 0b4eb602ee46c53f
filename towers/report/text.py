"""text: tables and lists for a terminal."""

from collections.abc import Sequence
from typing import Any


def listed(transfers: Any, most: int = 10) -> str:
    """The largest transfers, a line each."""
    first = sorted(
        transfers, key=lambda t: (t.bytes is not None, -(t.bytes or 0))
    )
    lines = [
        f"  {t.source} -> {t.target}  "
        + ("? bytes" if t.bytes is None else f"{t.bytes:,} bytes")
        + f"  {t.dtype.name}{list(t.shape) if t.shape is not None else '[?]'}"
        + ("  at each step of a loop" if t.times is None else "")
        + f"  {t.tensor}"
        for t in first[:most]
    ]
    if len(first) > most:
        lines.append(f"  and {len(first) - most} more")
    return "\n".join(lines)


def table(rows: Sequence[tuple[str, ...]]) -> str:
    """Columns side by side: names to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(
        "  ".join(
            cell.ljust(width)
            if cell.startswith(("/", *"dft"))
            else cell.rjust(width)
            for cell, width in zip(row, widths)
        ).rstrip()
        for row in rows
    )
