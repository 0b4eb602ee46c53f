"""timeline_page: a timeline as one page that opens without a network."""

import collections
from html import escape
from typing import Any

from towers.planning.slices import Slice, layer_name, slices
from towers.report.colours import line, tint
from towers.report.html_page import framed
from towers.report.html_tables import Bytes, Cell, Seconds, table
from towers.report.summary import size

_WIDTH, _NAMES, _LANE, _GAP = 960, 140, 16, 14
_LANES = 6  # of a device: what ran at once beyond that is drawn in the last
_OPS = 1000  # in the table


def timeline_html(timeline: Any) -> str:
    """The whole page of a `Timeline`: HTML, with its style and its script."""
    sections = [
        ("Devices", _devices(timeline)),
        ("Towers", _towers(timeline)),
        ("Layers, the longest first", _layers(timeline)),
        ("Waits, the longest first", _waits(timeline)),
        ("Transfers in the order of time", _crossings(timeline)),
        ("Ops, the longest first", _ops(timeline)),
    ]
    return framed(
        "What ran when",
        f'<p class="subject">{escape(timeline.subject)}</p>'
        + timeline_short_form(timeline),
        [(title, body) for title, body in sections if body],
    )


def timeline_short_form(timeline: Any) -> str:
    """Answers and drawing, for notebooks."""
    entries = "".join(
        f"<dt>{escape(question)}</dt><dd>{escape(answer)}</dd>"
        for question, answer in timeline_answers(timeline)
    )
    return (
        f'<div class="towers-timeline"><dl class="answers">{entries}</dl>'
        '<div class="wide" tabindex="0" role="group" '
        'aria-label="Drawing of the time">'
        f"{timeline_drawing(timeline)}</div></div>"
    )


def timeline_answers(timeline: Any) -> list[tuple[str, str]]:
    """What is asked, and the answer; what does not arise is left out."""
    pairs = [("Took", f"{_ms(timeline.seconds)}, {len(timeline.ops):,} ops")]
    if timeline.busy:
        device = max(timeline.busy, key=timeline.busy.__getitem__)
        pairs.append(
            (
                "Busiest device",
                f"{device}, {_part(timeline, timeline.busy[device])}",
            )
        )
    if len(timeline.towers) > 1:
        part = _part(timeline, timeline.overlap)
        pairs.append(("Two towers or more at once", part))
    if timeline.longest_waits:
        wait = timeline.longest_waits[0]
        pairs.append(
            (
                "Longest wait",
                f"{wait.device}, {_ms(wait.seconds)} for "
                f"{wait.what} of {wait.source}",
            )
        )
    longest = _by_layer(timeline).most_common(1)
    if longest:
        (name, seconds) = longest[0]
        pairs.append(
            ("Longest layer", f"{name}, {_ms(seconds)} in all its ops")
        )
    sizes = [c.bytes for c in timeline.crossings if c.bytes is not None]
    if timeline.crossings:
        unknown = len(timeline.crossings) - len(sizes)
        more = f", {unknown:,} of unknown size" * bool(unknown)
        pairs.append(
            (
                "Crossed",
                f"{size(sum(sizes))} in {len(timeline.crossings):,} "
                f"transfers{more}",
            )
        )
    if timeline.unseen:
        pairs.append(("Not seen", ", ".join(timeline.unseen)))
    return pairs


def timeline_drawing(timeline: Any) -> str:
    """An SVG: a band per device, layers as bars, those of a backward pass full."""
    devices, drawn, top = timeline.devices, [], 0
    for device in devices:
        lanes = _lanes([s for s in _slices(timeline) if s.device == device])
        height = _LANE * max(len(lanes), 1)
        drawn.append(
            f'<text x="0" y="{top + 12}" fill="currentColor">{escape(device)}'
            f'</text><rect x="{_NAMES}" y="{top}" width="{_WIDTH}" '
            f'height="{height}" fill="{tint(devices, device)}" '
            'fill-opacity=".4"/>'
        )
        drawn += [
            _bar(timeline, part, top + _LANE * k)
            for k, lane in enumerate(lanes)
            for part in lane
        ]
        drawn += [
            f'<rect x="{_x(timeline, wait.start):.2f}" y="{top + height}" '
            f'width="{_long(timeline, wait.seconds):.2f}" height="4" '
            'fill="currentColor" fill-opacity=".45"><title>waited '
            f"{_ms(wait.seconds)} for {escape(wait.what)} of "
            f"{escape(wait.source)}</title></rect>"
            for wait in timeline.longest_waits
            if wait.device == device
        ]
        top += height + _GAP
    axis = "".join(
        f'<text x="{_NAMES + _WIDTH * k / 4:.0f}" y="{top + 12}" '
        f'text-anchor="{anchor}" fill="currentColor">'
        f"{_ms(timeline.seconds * k / 4)}</text>"
        for k, anchor in enumerate(
            ("start", "middle", "middle", "middle", "end")
        )
    )
    width = _NAMES + _WIDTH
    return (
        f'<svg role="img" viewBox="0 0 {width} {top + 20}" width="{width}" '
        f'height="{top + 20}" aria-label="What each device did, over '
        f'{_ms(timeline.seconds)}" font-family="system-ui,sans-serif" '
        f'font-size="12">{"".join(drawn)}{axis}</svg>'
        "<p>A bar is a layer, or what is outside of towers: outlined in the "
        "forward pass, full in the backward pass. The line below a device is "
        "what it waited for. Point at one to read what it is.</p>"
    )


def _bar(timeline: Any, part: Slice, top: int) -> str:
    colour = line(timeline.devices, part.device)
    filled = 0.85 if part.name.endswith(" backward") else 0.25
    seconds = part.end - part.start
    return (
        f'<rect x="{_x(timeline, part.start - timeline.start):.2f}" '
        f'y="{top + 1}" width="{_long(timeline, seconds):.2f}" '
        f'height="{_LANE - 2}" fill="{colour}" fill-opacity="{filled}" '
        f'stroke="{colour}" stroke-width=".5"><title>{escape(part.name)}: '
        f"{_ms(seconds)}, {part.count:,} "
        f"op{'s' * (part.count != 1)}</title></rect>"
    )


def _lanes(parts: list[Slice]) -> list[list[Slice]]:
    """Rows in which nothing overlaps, but in the last, if there were too many."""
    lanes: list[list[Slice]] = []
    for part in parts:
        free = (lane for lane in lanes if lane[-1].end <= part.start)
        lane = next(free, None)
        if lane is None and len(lanes) == _LANES:
            lane = lanes[-1]
        if lane is None:
            lane = []
            lanes.append(lane)
        lane.append(part)
    return lanes


def _slices(timeline: Any) -> list[Slice]:
    return slices(timeline.ops, layer_name)


def _x(timeline: Any, seconds: float) -> float:
    return _NAMES + _long(timeline, seconds, 0.0)


def _long(timeline: Any, seconds: float, least: float = 0.4) -> float:
    if not timeline.seconds:
        return least
    return max(least, _WIDTH * seconds / timeline.seconds)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.3f} ms"


def _part(timeline: Any, seconds: float) -> str:
    if not timeline.seconds:
        return _ms(seconds)
    return f"{_ms(seconds)} ({seconds / timeline.seconds:.0%} of the time)"


def _devices(timeline: Any) -> str:
    count = collections.Counter(op.device for op in timeline.ops)
    rows: list[list[Cell]] = [
        [
            device,
            count[device],
            Seconds(timeline.busy[device]),
            Seconds(timeline.waits[device]),
        ]
        for device in timeline.busy
    ]
    rows += [[device, None, None, None] for device in timeline.unseen]
    return table("Devices", ["device", "ops", "busy", "waiting"], rows)


def _towers(timeline: Any) -> str:
    return table(
        "Towers",
        ["tower", "busy"],
        [[tower, Seconds(busy)] for tower, busy in timeline.towers.items()],
    )


def _by_layer(timeline: Any) -> collections.Counter:
    """By layer and pass of a tower the seconds of its ops, together."""
    seconds: collections.Counter = collections.Counter()
    for op in timeline.ops:
        name = layer_name(op)
        if name.startswith("tower_"):
            seconds[name] += op.seconds
    return seconds


def _layers(timeline: Any) -> str:
    return table(
        "Layers",
        ["layer", "all its ops"],
        [[name, Seconds(s)] for name, s in _by_layer(timeline).most_common()],
    )


def _waits(timeline: Any) -> str:
    return table(
        "Waits",
        ["device", "since", "waited", "from", "for"],
        [
            [w.device, Seconds(w.start), Seconds(w.seconds), w.source, w.what]
            for w in timeline.longest_waits
        ],
    )


def _crossings(timeline: Any) -> str:
    def since(seconds: float | None) -> Seconds | None:
        return None if seconds is None else Seconds(seconds - timeline.start)

    return table(
        "Transfers",
        ["from", "to", "bytes", "holds", "sent", "arrived", "tensor"],
        [
            [c.source, c.target]
            + [None if c.bytes is None else Bytes(c.bytes), c.holds]
            + [since(c.sent), since(c.arrived), c.tensor]
            for c in timeline.crossings
        ],
    )


def _ops(timeline: Any) -> str:
    longest = sorted(timeline.ops, key=lambda op: -op.seconds)[:_OPS]
    return table(
        "Ops",
        ["device", "since", "took", "type", "op"],
        [
            [op.device, Seconds(op.start - timeline.start), Seconds(op.seconds)]
            + [op.kind, op.name]
            for op in longest
        ],
    )
