"""variables: what the variables that were touched are, and where they live."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from towers.placement.device_names import short
from towers.report.recording import alive


@dataclasses.dataclass(frozen=True)
class VariableUse:
    """A variable that was read or written.

    Attributes:
      name: its name.
      device: where it lives.
      bytes: its size, in bytes.
      kind: "parameter" if it is trainable, "slot" if it is an optimizer's,
        else "state".
      path: where it is in its model, by Keras; else its name.
    """

    name: str
    device: str
    bytes: int
    kind: str
    path: str = ""


def uses(
    variables: Sequence[tf.Variable],
    device_of: Callable[[Any], str] = lambda variable: variable.device,
) -> tuple[VariableUse, ...]:
    """What each is, and where: on the device that is told."""
    kinds = keras.optimizers.Optimizer, keras.Variable
    objects = alive(kinds)
    slots = {
        id(variable.value)
        for optimizer in objects
        if isinstance(optimizer, kinds[0])
        for variable in optimizer.variables
    }
    paths = {id(v.value): v.path for v in objects if isinstance(v, kinds[1])}

    def kind(variable: tf.Variable) -> str:
        if id(variable) in slots:
            return "slot"
        return "parameter" if variable.trainable else "state"

    return tuple(
        VariableUse(
            v.name,
            short(device_of(v)),
            math.prod(v.shape) * v.dtype.size,
            kind(v),
            paths.get(id(v)) or v.name.split(":")[0],
        )
        for v in variables
    )
