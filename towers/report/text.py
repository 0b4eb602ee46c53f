"""text: tables and lists for a terminal."""

import collections
from collections.abc import Sequence
from typing import Any


def printed(report: Any) -> str:
    """An `ExecutionReport`: devices, what crossed, the largest transfers."""
    ran = collections.Counter(device for device, _, _ in report.nodes)
    kinds = ("parameter", "slot", "state")
    held: collections.Counter = collections.Counter()
    for variable in report.variables:
        held[variable.device, variable.kind] += variable.bytes
    rows = [("device", "ops", *(f"{kind} bytes" for kind in kinds))]
    rows += [
        (d, f"{ran[d]:,}", *(f"{held[d, kind]:,}" for kind in kinds))
        for d in sorted({*ran, *(device for device, _ in held)})
    ]
    crossed = collections.Counter(
        (t.source, t.target) for t in report.transfers
    )
    between = report.bytes_between
    pairs = [
        ("from", "to", "transfers", "bytes"),
        *(
            (*pair, f"{count:,}", f"{between[pair]:,}")
            for pair, count in sorted(crossed.items())
        ),
    ]
    total, least = report.total_bytes, report.least_bytes
    more = f", and {len(report.unknown)} of unknown size" * bool(report.unknown)
    return (
        f"{table(rows)}\n\n{table(pairs)}\n\n{total:,} bytes in "
        f"{len(report.transfers)} transfers{more}: "
        f"{total / least if least else 1:.3f} times the "
        f"least possible, {least:,}\n{listed(report.transfers)}"
    )


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
