"""text: tables and lists for a terminal."""

from collections.abc import Callable, Sequence
from typing import Any

from towers.report.answers import answers
from towers.report.summary import KINDS, size


def printed(report: Any) -> str:
    """An `ExecutionReport`: answers, devices, what crossed, the largest transfers."""
    summary = report.summary
    rows = [("device", "ops", *KINDS.values())]
    rows += [
        (
            device,
            f"{summary.ran[device]:,}",
            *(size(summary.held[device, kind]) for kind in KINDS),
        )
        for device in summary.devices
    ]
    pairs = [
        ("from", "to", "transfers", "bytes"),
        *(
            (*pair, f"{count:,}", size(summary.bytes_between[pair]))
            for pair, count in sorted(summary.crossed.items())
        ),
    ]
    parts = [answered(report), text_table(rows)]
    if report.transfers:
        parts += [text_table(pairs), listed(report.transfers, spelled=size)]
    return "\n\n".join(parts)


def answered(report: Any) -> str:
    """The answers, a line each."""
    return "\n".join(f"{asked}: {answer}" for asked, answer in answers(report))


def exactly(count: int) -> str:
    """Bytes to the last one, for who compares them."""
    return f"{count:,} bytes"


def listed(
    transfers: Any, most: int = 10, spelled: Callable[[int], str] = exactly
) -> str:
    """The largest transfers, a line each."""
    first = sorted(
        transfers, key=lambda t: (t.bytes is not None, -(t.bytes or 0))
    )
    lines = [
        f"  {t.source} -> {t.target}  "
        + ("? bytes" if t.bytes is None else spelled(t.bytes))
        + f"  {t.dtype.name}{list(t.shape) if t.shape is not None else '[?]'}"
        + ("  at each step of a loop" if t.times is None else "")
        + f"  {t.tensor}"
        + (f" ({t.holds})" if t.holds else "")
        for t in first[:most]
    ]
    if len(first) > most:
        lines.append(f"  and {len(first) - most} more")
    return "\n".join(lines)


def text_table(rows: Sequence[tuple[str, ...]]) -> str:
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
