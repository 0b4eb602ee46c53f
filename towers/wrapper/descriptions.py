"""descriptions: what a `TowerModel` says of itself, in a line."""

import inspect
from typing import Any

import keras
from absl import logging

from towers.placement.device_names import few
from towers.placement.placement import Placement

_FIT = list(inspect.signature(keras.Model.fit).parameters)[1:]
_SUMMARY = list(inspect.signature(keras.Model.summary).parameters)[1:]


def named(name: str, placement: Placement | None) -> str:
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


def say_first(name: str, placement: Placement, args: Any, kwargs: Any) -> None:
    """Says so unless the arguments of `fit` ask for silence."""
    given = {**dict(zip(_FIT, args)), **kwargs}
    if given.get("verbose", "auto") != 0:
        say(first_line(name, placement))


def printer(args: Any, kwargs: Any) -> Any:
    """What prints the lines of a `summary` that has these arguments."""
    return {**dict(zip(_SUMMARY, args)), **kwargs}.get("print_fn") or say


def say(line: str) -> None:
    """Prints where Keras prints its progress bar: in a log if it is told so."""
    if keras.config.is_interactive_logging_enabled():
        print(line, flush=True)
    else:
        logging.info(line)
