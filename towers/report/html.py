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

Told = dict[str, Any]  # what ExecutionReport.to_dict() gives
Nodes = Sequence[tuple[str, str, str]]
_DEEP = 2


def page(told: Told, nodes: Nodes) -> str:
    """The whole page.

    Args:
      told: the report as plain data.
      nodes: (device, name, op type) of each op that ran.

    Returns:
      HTML, with its style and its script inside.
    """
    sections = [
        ("Devices", _devices(told)),
        ("What crossed, by pair of devices", _pairs(told)),
        ("Layers by tower", _layers(devices(told), nodes)),
        ("Every transfer, the largest first", _transfers(told)),
        ("Where variables live", _variables(told)),
        ("Ops by device and type", _ops("Ops", told["ops"])),
        ("Ops outside of functions", _ops("Eager ops", told["eager"])),
    ]
    return framed(
        "What ran where",
        f"<p>{_sum(told)}</p>"
        f'<div class="wide" tabindex="0" role="group" '
        f'aria-label="Drawing of the devices">{drawing(told, devices(told))}'
        "</div>",
        [(title, body) for title, body in sections if body],
    )


def short_form(told: Told) -> str:
    """Drawing, sum and the tables of devices and pairs, for notebooks."""
    return (
        f'<div class="towers-report"><p>{_sum(told)}</p>'
        f"{drawing(told, devices(told))}{_devices(told)}{_pairs(told)}</div>"
    )


def devices(told: Told) -> list[str]:
    """All devices that a report speaks of, sorted."""
    return sorted(
        {row["device"] for part in ("ops", "variables") for row in told[part]}
        | {t[end] for t in told["transfers"] for end in ("source", "target")}
    )


def _sum(told: Told) -> str:
    total, least = told["total_bytes"], told["least_bytes"]
    times = total / least if least else 1.0
    unknown = sum(t["bytes"] is None for t in told["transfers"])
    more = f", and {count(unknown)} of unknown size" * bool(unknown)
    return (
        f"<strong>{count(total)} bytes</strong> crossed between devices in "
        f"{count(len(told['transfers']))} transfers{more}: {times:.3f} times "
        f"the least possible, {count(least)}."
    )


def _devices(told: Told) -> str:
    ran: collections.Counter = collections.Counter()
    for row in told["ops"]:
        ran[row["device"]] += row["count"]
    held: dict[str, collections.Counter] = collections.defaultdict(
        collections.Counter
    )
    for variable in told["variables"]:
        held[variable["kind"]][variable["device"]] += variable["bytes"]
    kinds = ("parameter", "slot", "state")
    peaks = told["peak_bytes"]
    head = ["device", "ops", *(f"{kind} bytes" for kind in kinds)]
    rows: list[list[Cell]] = [
        [d, ran[d], *(held[kind][d] for kind in kinds)] for d in devices(told)
    ]
    if peaks:
        head.append("peak bytes")
        for row in rows:
            row.append(peaks.get(row[0]))
    return table("Devices", head, rows)


def _pairs(told: Told) -> str:
    crossed = collections.Counter(
        (t["source"], t["target"]) for t in told["transfers"]
    )
    return table(
        "What crossed",
        ["from", "to", "transfers", "bytes"],
        [
            [p["source"], p["target"], crossed[p["source"], p["target"]]]
            + [p["bytes"]]
            for p in sorted(told["bytes_between"], key=lambda p: -p["bytes"])
        ],
    )


def _layers(devices: list[str], nodes: Nodes) -> str:
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


def _transfers(told: Told) -> str:
    largest = sorted(
        told["transfers"],
        key=lambda t: (t["bytes"] is not None, -(t["bytes"] or 0)),
    )
    return table(
        "Transfers",
        ["from", "to", "bytes", "times", "dtype", "shape", "tensor"],
        [
            [t["source"], t["target"], t["bytes"], t["times"], t["dtype"]]
            + ["?" if t["shape"] is None else str(t["shape"]), t["tensor"]]
            for t in largest
        ],
    )


def _variables(told: Told) -> str:
    return table(
        "Variables",
        ["device", "kind", "bytes", "variable"],
        [
            [v["device"], v["kind"], v["bytes"], v["name"]]
            for v in sorted(told["variables"], key=lambda v: -v["bytes"])
        ],
    )


def _ops(caption: str, ran: list[dict[str, Any]]) -> str:
    return table(
        caption,
        ["device", "count", "op"],
        [
            [o["device"], o["count"], o["op"]]
            for o in sorted(ran, key=lambda o: -o["count"])
        ],
    )
