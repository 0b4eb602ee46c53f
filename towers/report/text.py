"""text: tables and lists for a terminal."""

from collections.abc import Sequence
from typing import Any

from towers.report.summary import KINDS, size


def printed(report: Any) -> str:
    """An `ExecutionReport`: devices, what crossed, the largest transfers."""
    summary = report.summary
    rows = [("device", "ops", *(f"{kind} bytes" for kind in KINDS))]
    rows += [
        (
            device,
            f"{summary.ran[device]:,}",
            *(f"{summary.held[device, kind]:,}" for kind in KINDS),
        )
        for device in summary.devices
    ]
    pairs = [
        ("from", "to", "transfers", "bytes"),
        *(
            (*pair, f"{count:,}", f"{summary.bytes_between[pair]:,}")
            for pair, count in sorted(summary.crossed.items())
        ),
    ]
    more = f", and {len(report.unknown)} of unknown size" * bool(report.unknown)
    told = _times(report.total_bytes, report.least_bytes)
    return (
        f"{table(rows)}\n\n{table(pairs)}\n\n{report.total_bytes:,} bytes in "
        f"{len(report.transfers)} transfers{more}: {told}\n"
        f"{_network(report)}{listed(report.transfers)}"
    )


def _network(report: Any) -> str:
    """What crossed from machine to machine; "" if nothing did."""
    between, busiest = report.between_machines, report.busiest_link
    if busiest is None:
        return ""
    total = sum(between.values())
    machine, sent, received = busiest
    return (
        f"{total:,} of the bytes went between machines: "
        f"{_times(total, report.least_between_machines)}. The busiest link is "
        f"that of {machine}: {size(sent)} out, {size(received)} in\n"
    )


def _times(count: int, least: int) -> str:
    return f"{count / least if least else 1:.3f} times the least possible, {least:,}"


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
