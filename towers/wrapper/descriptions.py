"""descriptions: what a `TowerModel` says of itself, in a line."""

import collections
import inspect
import math
from collections.abc import Sequence
from html import escape
from typing import Any

import keras
from absl import logging

from towers.foreign import keras_layers
from towers.placement.device_names import few, short
from towers.placement.placement import Placement

_FIT = list(inspect.signature(keras.Model.fit).parameters)[1:]
_SUMMARY = list(inspect.signature(keras.Model.summary).parameters)[1:]


def short_repr(name: str, placement: Placement | None) -> str:
    """What `repr` says: "<TowerModel of net: 2 towers on /CPU:0, /CPU:1>"."""
    where = "not placed yet" if placement is None else towers_on(placement)
    return f"<TowerModel of {name}: {where}>"


def towers_on(placement: Placement) -> str:
    """How many towers, and where: "2 towers on /CPU:0, /CPU:1"."""
    n = len(placement.devices)
    towers = "1 tower" if n == 1 else f"{n} towers"
    return f"{towers} on {few(placement.devices)}"


def first_line(name: str, placement: Placement) -> str:
    """What the first `fit` says: where towers, parameters and outputs are."""
    parameters = placement.parameter_device
    spread = (
        "spread by a policy" if callable(parameters) else f"on {parameters}"
    )
    pins = len(placement.layer_devices)
    return (
        f"{name} runs in {towers_on(placement)}; parameters {spread}, outputs "
        f"and loss on {placement.output_device}"
        + f"; {pins} more in `layer_devices`"
        * bool(pins)
    )


def shown(name: str, placement: Placement, variables: Sequence[Any]) -> str:
    """What notebooks show: a row for each device, in HTML.

    Args:
      name: the model's.
      placement: its placement.
      variables: the model's Keras variables, where they are.
    """
    total = sum(placement.shares)
    parts: dict[str, list[str]] = {}
    for i, (device, share) in enumerate(
        zip(placement.devices, placement.shares)
    ):
        rows = f"tower_{i} ({share / total:.0%} of the rows)"
        parts.setdefault(device, []).append(rows)
    held: collections.Counter = collections.Counter()
    for variable in variables:
        value = keras_layers.raw(variable)
        held[short(value.device)] += math.prod(value.shape) * value.dtype.size
    for device, count in held.items():
        parts.setdefault(device, []).append(f"{count:,} bytes of variables")
    for device, what in (
        (str(placement.input_device), "batches are split"),
        (str(placement.output_device), "outputs are gathered"),
    ):
        parts.setdefault(device, []).append(what)
    table = "".join(
        f'<tr><td>{escape(device)}</td><td style="text-align:left">'
        f"{escape(', '.join(texts))}</td></tr>"
        for device, texts in parts.items()
    )
    pins = "".join(
        f"<br>{escape(layer)} on {escape(str(pin))}"
        for layer, pin in placement.layer_devices.items()
    )
    return (
        f"<b>{escape(short_repr(name, placement)[1:-1])}</b>"
        f"<table>{table}</table>{pins.removeprefix('<br>')}"
    )


def say_first(name: str, placement: Placement, args: Any, kwargs: Any) -> None:
    """Prints the first line, unless `fit` is called with verbose=0."""
    arguments = {**dict(zip(_FIT, args)), **kwargs}
    if arguments.get("verbose", "auto") != 0:
        print_line(first_line(name, placement))


def printer(args: Any, kwargs: Any) -> Any:
    """What prints the lines of a `summary` that has these arguments."""
    return {**dict(zip(_SUMMARY, args)), **kwargs}.get("print_fn") or print_line


def print_line(line: str) -> None:
    """Prints where Keras prints its progress bar: in a log if it is told so."""
    if keras.config.is_interactive_logging_enabled():
        print(line, flush=True)
    else:
        logging.info(line)
