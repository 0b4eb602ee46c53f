"""policies: which device each variable lives on."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

Policy = Callable[[Sequence[Any]], Sequence[str]]


def balanced(devices: Sequence[str]) -> Policy:
    """A policy that gives each device about as many bytes of variables.

    The largest variable goes first, each to the device that holds least so
    far; trainable ones go before others, since they bring the optimizer's
    slots with them. The same variables always go to the same devices.

    >>> model = keras.Sequential([keras.Input([3]), keras.layers.Dense(2)])
    >>> placement = towers.Placement(["/CPU:0", "/CPU:1"],
    ...     parameter_device=towers.balanced(["/CPU:0", "/CPU:1"]))
    >>> model = towers.TowerModel(model, placement)
    >>> [weight.value.device[-5:] for weight in model.weights]
    ['CPU:0', 'CPU:1']

    Args:
      devices: names, in any spelling; the first gets the largest variable.

    Returns:
      A function from a list of variables to the list of their devices, for
      `Placement(parameter_device=...)`.

    Raises:
      TypeError: `devices` is no list of names.
      ValueError: `devices` is empty.
    """
    _check_devices("balanced", devices)

    def policy(variables: Sequence[Any]) -> list[str]:
        sizes = [
            math.prod(v.shape) * tf.as_dtype(v.dtype).size for v in variables
        ]
        held = [0] * len(devices)
        where = [""] * len(variables)
        for i in sorted(
            range(len(variables)),
            key=lambda i: (not variables[i].trainable, -sizes[i], i),
        ):
            least = held.index(min(held))
            held[least] += sizes[i]
            where[i] = devices[least]
        return where

    return policy


def round_robin(devices: Sequence[str]) -> Policy:
    """A policy that gives variables to devices in turn, in their order.

    >>> policy = towers.round_robin(["/CPU:0", "/CPU:1"])
    >>> policy([tf.Variable(1.0), tf.Variable(2.0), tf.Variable(3.0)])
    ['/CPU:0', '/CPU:1', '/CPU:0']

    Args:
      devices: names, in any spelling.

    Returns:
      A function from a list of variables to the list of their devices, for
      `Placement(parameter_device=...)`.

    Raises:
      TypeError: `devices` is no list of names.
      ValueError: `devices` is empty.
    """
    _check_devices("round_robin", devices)

    def policy(variables: Sequence[Any]) -> list[str]:
        return [devices[i % len(devices)] for i in range(len(variables))]

    return policy


def _check_devices(function: str, devices: Any) -> None:
    if isinstance(devices, str) or not isinstance(devices, Sequence):
        raise TypeError(
            f"`devices` of {function} must be a list of device names; got "
            f'{devices!r}. Write {function}(["/GPU:0", "/GPU:1"]).'
        )
    if not devices:
        raise ValueError(
            f"`devices` of {function} is empty, so variables can live nowhere. "
            "Expected at least one device name."
        )


# Those that are called by their names, over the towers' devices.
POLICIES: dict[str, Callable[[Sequence[str]], Policy]] = {
    "balanced": balanced,
    "round_robin": round_robin,
}
