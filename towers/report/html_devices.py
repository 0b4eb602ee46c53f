"""html_devices: devices as boxes, and what crossed as arrows between them.

Boxes stand in a column. What goes down the list is drawn to their right, what
goes up to their left, further out the further it goes.
"""

import collections
import math
from html import escape
from typing import Any

from towers.report.colours import line, tint

_WIDTH, _HEIGHT, _GAP = 190, 92, 38
_FIRST, _FURTHER = 62, 76  # how far out an arrow goes, and one box further


def size(count: int) -> str:
    """Bytes in three digits: "1.23 MB"."""
    for unit, power in (("GB", 9), ("MB", 6), ("kB", 3)):
        if count >= 10**power:
            value = count / 10**power
            return f"{value:.{max(0, 2 - int(math.log10(value)))}f} {unit}"
    return f"{count} B"


def drawing(told: dict[str, Any], devices: list[str]) -> str:
    """An SVG of `ExecutionReport.to_dict()`; "" if nothing ran."""
    if not devices:
        return ""
    pairs = {
        (p["source"], p["target"]): p["bytes"] for p in told["bytes_between"]
    }
    at = {device: i for i, device in enumerate(devices)}
    reach = {
        down: max(
            (abs(at[s] - at[t]) for s, t in pairs if (at[s] < at[t]) == down),
            default=0,
        )
        for down in (True, False)
    }
    left, right = (_room(reach[down]) for down in (False, True))
    width = left + _WIDTH + right
    height = len(devices) * (_HEIGHT + _GAP)
    most = max(pairs.values(), default=0)
    arrows = "".join(
        _arrow(at[s], at[t], count, most, left, line(devices, s), (s, t))
        for (s, t), count in sorted(pairs.items(), key=lambda p: p[1])
    )
    boxes = "".join(
        _box(told, device, i, left, tint(devices, device))
        for device, i in at.items()
    )
    label = "; ".join(
        f"{s} to {t}: {count:,} bytes" for (s, t), count in pairs.items()
    )
    return (
        f'<svg role="img" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" aria-label="{escape(label or "no transfers")}" '
        'font-family="system-ui,sans-serif" font-size="13" '
        f'style="max-width:100%;height:auto;min-width:{width * 3 // 4}px">'
        f"{arrows}{boxes}</svg>"
    )


def _room(reach: int) -> int:
    return _FIRST + _FURTHER * reach + 24 if reach else 8


def _box(
    told: dict[str, Any], device: str, i: int, left: int, colour: str
) -> str:
    held: collections.Counter = collections.Counter()
    for v in told["variables"]:
        if v["device"] == device:
            held[v["kind"]] += v["bytes"]
    ops = sum(o["count"] for o in told["ops"] if o["device"] == device)
    lines = [f"{ops:,} ops"] + [
        f"{name} {size(held[kind])}"
        for kind, name in (
            ("parameter", "parameters"),
            ("slot", "slots"),
            ("state", "state"),
        )
        if held[kind]
    ]
    top = i * (_HEIGHT + _GAP) + _GAP // 2
    text = "".join(
        f'<text x="{left + 12}" y="{top + 38 + 16 * k}" fill="currentColor">'
        f"{escape(text)}</text>"
        for k, text in enumerate(lines)
    )
    return (
        f'<rect x="{left}" y="{top}" width="{_WIDTH}" height="{_HEIGHT}" '
        f'rx="8" fill="{colour}" stroke="currentColor" '
        'stroke-opacity=".5"/>'
        f'<text x="{left + 12}" y="{top + 20}" font-weight="600" '
        f'fill="currentColor">{escape(_fitting(device))}</text>{text}'
    )


def _fitting(device: str) -> str:
    """The end of a long name, which tells more than its beginning."""
    return device if len(device) <= 24 else "…" + device[-23:]


def _arrow(
    source: int,
    target: int,
    count: int,
    most: int,
    left: int,
    colour: str,
    names: tuple[str, str],
) -> str:
    down = source < target
    way = 1 if down else -1
    edge = left + _WIDTH if down else left

    def level(box: int, end: int) -> float:
        # Ends of arrows keep apart: what leaves low, what arrives high, if
        # it goes down.
        middle = box * (_HEIGHT + _GAP) + _GAP // 2 + _HEIGHT / 2
        far = min(abs(source - target), 4)
        return middle + way * end * (34 - 6 * far)

    y0, y1 = level(source, 1), level(target, -1)
    far = abs(source - target)
    out = edge + way * (_FIRST + _FURTHER * far) * 0.8
    thick = 1.5 + 5.5 * (count / most if most else 0)
    tip = edge + way * (4 + thick)
    label_x = edge + way * (_FIRST + _FURTHER * far) * 0.6 + way * 4
    middle = (y0 + y1) / 2
    return (
        f"<g><title>{escape(names[0])} to {escape(names[1])}: {count:,} bytes"
        f'</title><path d="M{edge} {y0:.0f}C{out:.0f} {y0:.0f} {out:.0f} '
        f'{y1:.0f} {tip:.0f} {y1:.0f}" fill="none" stroke="{colour}" '
        f'stroke-width="{thick:.1f}"/>'
        f'<path d="M{edge} {y1:.0f}l{way * (7 + thick):.0f} '
        f'{-3 - thick:.0f}v{6 + 2 * thick:.0f}z" '
        f'fill="{colour}"/>'
        f'<text x="{label_x:.0f}" y="{middle + 4:.0f}" text-anchor="middle" '
        'fill="currentColor" paint-order="stroke" class="bytes">'
        f"{size(count)}</text></g>"
    )
