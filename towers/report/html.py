"""html: a report as one page that opens without a network, and its short form."""

import collections
from collections.abc import Sequence
from html import escape
from typing import Any

from towers.placement.scopes import is_backward, layer_of, tower_of
from towers.report.answers import answers
from towers.report.colours import tint
from towers.report.html_devices import drawing
from towers.report.html_page import framed
from towers.report.html_tables import Bytes, Cell, table
from towers.report.partitions import Transfer
from towers.report.summary import KINDS, Summary
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
    picture = (
        '<div class="wide" tabindex="0" role="group" '
        f'aria-label="Drawing of the devices">{drawing(summary)}</div>'
    )
    sections = [
        *first,
        ("Drawing of the devices", picture),
        ("Devices", _devices(report)),
        ("What crossed, by kind and layer", _kinds(report)),
        ("What crossed, by pair of devices", _pairs(summary)),
        ("What crossed between machines", _links(summary)),
        ("Elsewhere than asked", _moved(report)),
        ("Layers by tower", _layers(summary.devices, report.nodes)),
        ("Every transfer, the largest first", _transfers(report.transfers)),
        ("Where variables live", _variables(report.variables)),
        ("Ops by device and type", _ops("Ops", report.ops)),
        ("Ops outside of functions", _ops("Eager ops", report.eager)),
    ]
    return framed(
        heading,
        f'<p class="subject">{escape(report.subject)}</p>{_answers(report)}',
        [(title, body) for title, body in sections if body],
    )


def short_form(report: Any) -> str:
    """Answers, drawing and the tables of devices and pairs, for notebooks."""
    return (
        f'<div class="towers-report">{_answers(report)}'
        f"{drawing(report.summary)}{_devices(report)}"
        f"{_pairs(report.summary)}{_links(report.summary)}</div>"
    )


def _answers(report: Any) -> str:
    entries = "".join(
        f"<dt>{escape(question)}</dt><dd>{escape(answer)}</dd>"
        for question, answer in answers(report)
    )
    return f'<dl class="answers">{entries}</dl>'


def _devices(report: Any) -> str:
    summary = report.summary
    head = ["device", "ops", *KINDS.values()]
    rows: list[list[Cell]] = [
        [d, summary.ran[d], *(Bytes(summary.held[d, kind]) for kind in KINDS)]
        for d in summary.devices
    ]
    if report.peak_bytes:
        head.append("peak bytes")
        for device, row in zip(summary.devices, rows):
            row.append(_bytes(report.peak_bytes.get(device)))
    return table("Devices", head, rows)


def _pairs(summary: Summary) -> str:
    pairs = sorted(summary.bytes_between.items(), key=lambda p: -p[1])
    return table(
        "What crossed",
        ["from", "to", "transfers", "bytes"],
        [[*pair, summary.crossed[pair], Bytes(total)] for pair, total in pairs],
    )


def _kinds(report: Any) -> str:
    return table(
        "By kind and layer",
        ["kind", "layer", "bytes"],
        [
            [kind, layer, Bytes(count)]
            for (layer, kind), count in report.summary.by_layer.items()
        ],
    )


def _moved(report: Any) -> str:
    return table(
        "Moved",
        ["op", "type", "asked for", "is on"],
        [[m.op, m.kind, m.asked, m.got] for m in report.moved],
    )


def _bytes(count: int | None) -> Bytes | None:
    return None if count is None else Bytes(count)


def _links(summary: Summary) -> str:
    links = sorted(summary.between_machines.items(), key=lambda p: -p[1])
    return table(
        "Between machines",
        ["from", "to", "bytes"],
        [[*link, Bytes(total)] for link, total in links],
    )


def _layers(
    devices: Sequence[str], nodes: Sequence[tuple[str, str, str]]
) -> str:
    """A row per layer, a column per tower: where its ops ran, and how many."""
    ran: dict[Any, collections.Counter] = {}
    for device, name, _ in nodes:
        place = tower_of(name)
        if place:
            tower, inside = f"tower_{place[0]}", place[1]
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
        counts = ran.get((layer, tower), collections.Counter())
        lines = []
        for device in sorted({d for d, _ in counts}):
            ways = [counts[device, w] for w in ("forward", "backward")]
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
        ["from", "to", "bytes", "times", "holds", "dtype", "shape", "tensor"],
        [
            [
                t.source,
                t.target,
                _bytes(t.bytes),
                t.times,
                t.holds,
                t.dtype.name,
            ]
            + ["?" if t.shape is None else str(list(t.shape)), t.tensor]
            for t in largest
        ],
    )


def _variables(variables: Sequence[VariableUse]) -> str:
    return table(
        "Variables",
        ["device", "kind", "bytes", "variable"],
        [
            [v.device, v.kind, Bytes(v.bytes), v.name]
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
