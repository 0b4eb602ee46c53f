"""parameters: where variables live, and moving them there."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from towers import compiled, layer_graph, template
from towers.placement import (
    Placement,
    Policy,
    check_placement,
    resolve_devices,
)


@dataclasses.dataclass(frozen=True)
class Home:
    """Where a model's variable lives for a graph.

    Attributes:
      variable: what the graph reads.
      device: what works on it.
      owner: what is assigned to; the Keras variable if the graph shares it.
    """

    variable: tf.Variable
    device: str
    owner: Any


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


def place_variables(model: Any, placement: Placement) -> None:
    """Moves a model's variables, and its optimizers', where placement says.

    Values are kept. Functions that Keras made of the model before are
    dropped, since they would go on with the old variables; a `tf.function` of
    your own that was traced before must be made again.

    >>> model = keras.Sequential([keras.Input([3]), keras.layers.Dense(2)])
    >>> towers.place_variables(model, towers.Placement(
    ...     ["/CPU:0", "/CPU:1"], parameter_device="/CPU:1"))
    >>> model.weights[0].value.device[-5:]
    'CPU:1'

    Args:
      model: a built `keras.Model`.
      placement: its `parameter_device` is a device or a policy.

    Raises:
      TypeError: `model` is no Keras model, `placement` no `Placement`.
      ValueError: the policy returns the wrong number of devices, or a bad one.
      RuntimeError: called inside a graph.
    """
    template.check_model(model)
    check_placement(placement)
    if not tf.executing_eagerly():
        raise RuntimeError(
            "place_variables moves variables and must be called eagerly; got "
            "a call inside a graph. Call it before the tf.function."
        )
    if move_variables(model, placement):
        model.train_function = None
        model.test_function = None
        model.predict_function = None


def move_variables(model: Any, placement: Placement) -> bool:
    """As `place_variables`, without dropping anything; whether any moved."""
    graph = layer_graph.LayerGraph(
        getattr(model, "template", model), (), placement.layer_devices
    )
    variables, devices = graph.variables, parameter_devices(graph, placement)
    where = {id(v): device for v, device in zip(variables, devices)}
    pairs = list(zip(variables, devices))
    shared = (
        placement.output_device
        if callable(placement.parameter_device)
        else placement.parameter_device
    )
    for optimizer in compiled.optimizers(model):
        compiled.pin_optimizer(optimizer)
        pairs += [
            (v, where.get(id(owner), shared))
            for v, owner in compiled.optimizer_variables(optimizer)
        ]
    return any([layer_graph.move_variable(v, device) for v, device in pairs])


def parameter_devices(
    graph: layer_graph.LayerGraph, placement: Placement
) -> list[str]:
    """The device of each variable: its layer's, or as the policy says."""
    pinned = graph.pinned
    rest = [i for i in range(len(graph.variables)) if i not in pinned]
    policy = placement.parameter_device
    if not callable(policy):
        names = [policy] * len(rest)
    else:
        names = list(policy([graph.variables[i] for i in rest]))
        if len(names) != len(rest):
            raise ValueError(
                f"The policy in `parameter_device` must return {len(rest)} "
                f"devices, one per variable; got {len(names)}."
            )
        names = resolve_devices("parameter_device(...)", names, placement)
    where = {**pinned, **dict(zip(rest, names))}
    return [where[i] for i in range(len(where))]
