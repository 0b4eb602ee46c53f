"""colours: one for each device, the same in all pictures."""

import colorsys
from collections.abc import Sequence

# Hues that people with colour blindness tell apart best, in this order.
_HUES = (210, 30, 150, 330, 55, 270, 0, 180)


def tint(devices: Sequence[str], device: str) -> str:
    """A background, in CSS, on which text of any colour is legible."""
    return f"hsla({_hue(devices, device)},75%,50%,.22)"


def line(devices: Sequence[str], device: str) -> str:
    """A colour of lines, in CSS, that shows on light and dark ground."""
    return f"hsl({_hue(devices, device)},65%,48%)"


def rgb(devices: Sequence[str], device: str, lightness: float = 0.85) -> str:
    """As "#rrggbb"."""
    hue = _hue(devices, device) / 360
    parts = colorsys.hls_to_rgb(hue, lightness, 0.65)
    return "#" + "".join(f"{round(255 * part):02x}" for part in parts)


def _hue(devices: Sequence[str], device: str) -> int:
    return _HUES[devices.index(device) % len(_HUES)]
