"""html_devices: devices as boxes, and what crossed as arrows between them.

Boxes stand in a column. What goes down the list is drawn to their right, what
goes up to their left, further out the further it goes.
"""

from html import escape

from towers.report.colours import line, tint
from towers.report.summary import KINDS, Summary, size

_WIDTH, _HEIGHT, _GAP = 190, 92, 38
_FIRST, _FURTHER = 62, 76  # how far out an arrow goes, and one box further


def drawing(summary: Summary) -> str:
    """An SVG of a report's sums; "" if nothing ran."""
    devices = summary.devices
    if not devices:
        return ""
    pairs, at = summary.bytes_between, {d: i for i, d in enumerate(devices)}
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
        _box(summary, device, i, left, tint(devices, device))
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
        f"{_frames(summary.machines, left)}{arrows}{boxes}</svg>"
    )


def _frames(machines: dict[str, list[str]], left: int) -> str:
    """A frame around the devices of each machine, if there are several."""
    frames, first = [], 0
    for machine, devices in machines.items():
        top = first * (_HEIGHT + _GAP) + 2
        height = len(devices) * (_HEIGHT + _GAP) - 4
        first += len(devices)
        frames.append(
            f'<rect class="machine" x="{left - 6}" y="{top}" '
            f'width="{_WIDTH + 12}" height="{height}" rx="10" fill="none" '
            'stroke="currentColor" stroke-opacity=".35" '
            f'stroke-dasharray="5 4"/><text x="{left}" y="{top + 12}" '
            f'font-size="10" fill="currentColor">{escape(machine)}</text>'
        )
    return "".join(frames) if len(frames) > 1 else ""


def _room(reach: int) -> int:
    return _FIRST + _FURTHER * reach + 24 if reach else 8


def _box(summary: Summary, device: str, i: int, left: int, colour: str) -> str:
    lines = [f"{summary.ran[device]:,} ops"] + [
        f"{name} {size(summary.held[device, kind])}"
        for kind, name in KINDS.items()
        if summary.held[device, kind]
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
