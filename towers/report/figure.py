"""figure: bytes per device, and what crossed between which, by matplotlib."""

import importlib
import io
import math
import os
from typing import Any

from towers.report.colours import rgb
from towers.report.summary import KINDS, Summary, size


def figure(summary: Summary) -> Any:
    """A `matplotlib.figure.Figure` of a report's sums.

    Raises:
      ImportError: there is no matplotlib.
    """
    devices = summary.devices
    # Not pyplot, which keeps every figure and may want a screen.
    picture = _kind()(
        figsize=(10, 1.6 + 0.55 * len(devices)), layout="constrained"
    )
    held, crossed = picture.subplots(1, 2)
    _held(held, summary)
    _crossed(crossed, summary)
    return picture


def _kind() -> Any:
    """A figure that notebooks show, as they do by themselves with pyplot's."""

    class Figure(_matplotlib("figure").Figure):
        def _repr_png_(self) -> bytes:
            drawn = io.BytesIO()
            self.savefig(drawn, format="png")
            return drawn.getvalue()

    return Figure


def check_figure_ending(path: str, argument: str) -> None:
    """Raises unless a figure can be written to a file of such an ending.

    Raises:
      ValueError: matplotlib writes no such files.
      ImportError: there is no matplotlib.
    """
    canvas = _matplotlib("backend_bases").FigureCanvasBase
    endings = sorted(f".{kind}" for kind in canvas.get_supported_filetypes())
    if os.path.splitext(path)[1].lower() not in endings:
        raise ValueError(
            f"`{argument}` is {path!r}, but matplotlib writes files that end in "
            f"{', '.join(endings)}."
        )


def _matplotlib(module: str) -> Any:
    try:
        return importlib.import_module(f"matplotlib.{module}")
    except ImportError as error:
        raise ImportError(
            "report.plot() draws with matplotlib, which is missing. Write: "
            "pip install 'towers[pictures]'"
        ) from error


def _held(axes: Any, summary: Summary) -> None:
    """A bar per device: parameters, slots and state in a row."""
    devices = summary.devices
    left = [0] * len(devices)
    for k, (kind, name) in enumerate(KINDS.items()):
        widths = [summary.held[device, kind] for device in devices]
        axes.barh(
            devices,
            widths,
            left=left,
            label=name,
            color=[rgb(devices, d, 0.45 + 0.18 * k) for d in devices],
            edgecolor="black",
            linewidth=0.5,
            hatch=("", "//", "..")[k],
        )
        left = [a + b for a, b in zip(left, widths)]
    for y, total in enumerate(left):
        axes.text(total, y, f" {size(total)}", va="center")
    axes.invert_yaxis()
    axes.set_xlim(0, 1.25 * max([1, *left]))  # room for the sums
    axes.locator_params(axis="x", nbins=4)
    axes.xaxis.set_major_formatter(lambda count, _: size(round(count)))
    axes.set(title="bytes of variables", xlabel="bytes")
    axes.legend(fontsize="small")


def _crossed(axes: Any, summary: Summary) -> None:
    """A square per pair, dark where many bytes crossed."""
    devices = summary.devices
    at = {device: i for i, device in enumerate(devices)}
    pairs = summary.bytes_between.items()
    # By the logarithm, since a few bytes are as telling as many.
    values = [[math.nan] * len(devices) for _ in devices]
    for (source, target), count in pairs:
        values[at[source]][at[target]] = math.log10(count + 1)
    logarithms = [v for row in values for v in row if not math.isnan(v)]
    # So that the darkest has text that is read on it.
    axes.imshow(
        values, cmap="Blues", vmin=0, vmax=2 * max(logarithms, default=1) + 1
    )
    for (source, target), count in pairs:
        axes.text(
            at[target],
            at[source],
            size(count),
            ha="center",
            va="center",
            fontsize="small",
        )
    axes.set_xticks(range(len(devices)), devices)
    axes.set_yticks(range(len(devices)), devices)
    first = 0
    for own in list(summary.machines.values())[:-1]:  # a line between machines
        first += len(own)
        for line in (axes.axhline, axes.axvline):
            line(first - 0.5, color="black", linewidth=0.8)
    axes.set(title="bytes that crossed", xlabel="to", ylabel="from")
