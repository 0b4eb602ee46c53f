"""html: a report as one page that opens without a network, and its short form."""

import collections
from collections.abc import Sequence
from html import escape
from typing import Any

from towers.placement.scopes import is_backward, layer_of, tower_of
from towers.report.colours import tint
from towers.report.html_devices import drawing
from towers.report.html_page import framed
from towers.report.html_tables import Cell, count, table
from towers.report.partitions import Transfer
from towers.report.summary import KINDS, Summary, size
from towers.report.variables import VariableUse

_DEEP = 2


def page(
    report: Any,
    heading: str = "What ran where",
    first: Sequence[tuple[str, str]] = (),
) -> str:
    """The whole page of an `ExecutionReport`.

    Args:
      report: what it shows.
      heading: above all.
      first: titles and HTML of what comes before the rest; "" is left out.

    Returns:
      HTML, with its style and its script inside.
    """
    summary = report.summary
    sections = [
        *first,
        ("Devices", _devices(report)),
        ("What crossed, by pair of devices", _pairs(summary)),
        ("What crossed between machines", _links(summary)),
        ("Layers by tower", _layers(summary.devices, report.nodes)),
        ("Every transfer, the largest first", _transfers(report.transfers)),
        ("Where variables live", _variables(report.variables)),
        ("Ops by device and type", _ops("Ops", report.ops)),
        ("Ops outside of functions", _ops("Eager ops", report.eager)),
    ]
    return framed(
        heading,
        f"<p>{_sum(report)}</p>"
        f'<div class="wide" tabindex="0" role="group" '
        f'aria-label="Drawing of the devices">{drawing(summary)}</div>',
        [(title, body) for title, body in sections if body],
    )


def short_form(report: Any) -> str:
    """Drawing, sum and the tables of devices and pairs, for notebooks."""
    return (
        f'<div class="towers-report"><p>{_sum(report)}</p>'
        f"{drawing(report.summary)}{_devices(report)}"
        f"{_pairs(report.summary)}{_links(report.summary)}</div>"
    )


def _sum(report: Any) -> str:
    unknown = len(report.unknown)
    more = f", and {count(unknown)} of unknown size" * bool(unknown)
    told = (
        f"<strong>{count(report.total_bytes)} bytes</strong> crossed between "
        f"devices in {count(len(report.transfers))} transfers{more}: "
        f"{_times(report.total_bytes, report.least_bytes)}."
    )
    busiest = report.busiest_link
    if busiest is not None:
        machine, sent, received = busiest
        total = sum(report.between_machines.values())
        told += (
            f" <strong>{count(total)}</strong> of them went between machines: "
            f"{_times(total, report.least_between_machines)}. The busiest link "
            f"is that of {escape(machine)}: {size(sent)} out, "
            f"{size(received)} in."
        )
    return told


def _times(total: int, least: int) -> str:
    times = total / least if least else 1.0
    return f"{times:.3f} times the least possible, {count(least)}"


def _devices(report: Any) -> str:
    summary = report.summary
    head = ["device", "ops", *(f"{kind} bytes" for kind in KINDS)]
    rows: list[list[Cell]] = [
        [d, summary.ran[d], *(summary.held[d, kind] for kind in KINDS)]
        for d in summary.devices
    ]
    if report.peak_bytes:
        head.append("peak bytes")
        for device, row in zip(summary.devices, rows):
            row.append(report.peak_bytes.get(device))
    return table("Devices", head, rows)


def _pairs(summary: Summary) -> str:
    pairs = sorted(summary.bytes_between.items(), key=lambda p: -p[1])
    return table(
        "What crossed",
        ["from", "to", "transfers", "bytes"],
        [[*pair, summary.crossed[pair], total] for pair, total in pairs],
    )


def _links(summary: Summary) -> str:
    links = sorted(summary.between_machines.items(), key=lambda p: -p[1])
    return table(
        "Between machines",
        ["from", "to", "bytes"],
        [[*link, total] for link, total in links],
    )


def _layers(
    devices: Sequence[str], nodes: Sequence[tuple[str, str, str]]
) -> str:
    """A row per layer, a column per tower: where its ops ran, and how many."""
    ran: dict[Any, collections.Counter] = {}
    for device, name, _ in nodes:
        found = tower_of(name)
        if found:
            tower, inside = f"tower_{found[0]}", found[1]
            # Those of a model within the model, too, and no deeper.
            parts = (layer_of(inside) or inside).split("/")[:_DEEP]
            layer = "/".join(parts)
            way = "backward" if is_backward(name) else "forward"
            counts = ran.setdefault((layer, tower), collections.Counter())
            counts[device, way] += 1
    towers = sorted({t for _, t in ran}, key=lambda t: int(t.split("_")[1]))
    if not towers:
        return ""

    def cell(layer: str, tower: str) -> str:
        found = ran.get((layer, tower), collections.Counter())
        lines = []
        for device in sorted({d for d, _ in found}):
            ways = [found[device, w] for w in ("forward", "backward")]
            lines.append(
                f'<span class="ran" style="background:{tint(devices, device)}">'
                f"{escape(device)} <b>{ways[0]}</b>+<b>{ways[1]}</b></span>"
            )
        return f"<td>{''.join(lines)}</td>"

    layers = list(dict.fromkeys(layer for layer, _ in ran))
    body = "".join(
        f'<tr><th scope="row">{escape(layer)}</th>'
        + "".join(cell(layer, tower) for tower in towers)
        + "</tr>"
        for layer in layers
    )
    head = "".join(f'<th scope="col">{t}</th>' for t in ("layer", *towers))
    return (
        "<p>Ops of the forward pass + of the backward pass, in the colour of "
        "the device that they ran on.</p>"
        '<div class="wide" tabindex="0" role="group" aria-label="Layers by '
        f'tower"><table class="layers"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _transfers(transfers: Sequence[Transfer]) -> str:
    largest = sorted(
        transfers, key=lambda t: (t.bytes is not None, -(t.bytes or 0))
    )
    return table(
        "Transfers",
        ["from", "to", "bytes", "times", "dtype", "shape", "tensor"],
        [
            [t.source, t.target, t.bytes, t.times, t.dtype.name]
            + ["?" if t.shape is None else str(list(t.shape)), t.tensor]
            for t in largest
        ],
    )


def _variables(variables: Sequence[VariableUse]) -> str:
    return table(
        "Variables",
        ["device", "kind", "bytes", "variable"],
        [
            [v.device, v.kind, v.bytes, v.name]
            for v in sorted(variables, key=lambda v: -v.bytes)
        ],
    )


def _ops(caption: str, ran: collections.Counter) -> str:
    return table(
        caption,
        ["device", "count", "op"],
        [
            [device, times, kind]
            for (device, kind), times in sorted(
                sorted(ran.items()), key=lambda pair: -pair[1]
            )
        ],
    )
