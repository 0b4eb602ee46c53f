"""from_layers: where the layers of a model have been made."""

import collections
import math
from typing import Any

import keras
import tensorflow as tf

from towers.foreign import keras_layers
from towers.placement.device_names import short


def made_where(model: Any) -> tuple[dict[str, str], collections.Counter]:
    """The device of each layer that has variables, and bytes by device.

    Models that only hold layers (functional, sequential) are looked into, and so
    is a layer whose variables are on several devices.

    Args:
      model: a built model.

    Returns:
      Devices by the layer's path, and the bytes of variables that each holds.

    Raises:
      TypeError: `model` is no Keras model.
      ValueError: it is not built; or variables of one layer, or of two layers
        with one path, are on several devices.
    """
    model = getattr(model, "template", model)
    if not isinstance(model, keras.Model):
        raise TypeError(
            f"`model` must be a keras.Model; got {type(model).__name__}. For a "
            "single layer, write keras.Sequential([layer])."
        )
    if not keras_layers.is_built(model):
        raise ValueError(
            f"`model` {model.name!r} is not built, so it has no variables to go "
            "by. Call it once on real data first."
        )
    where: dict[str, str] = {}

    def note(layer: Any, path: str) -> None:
        children = keras_layers.children(layer)
        below = {id(v) for child in children for v in child.variables}
        devices = {_device(v) for v in layer.variables}
        holds = isinstance(layer, (keras.Sequential, keras.Function))
        whole = len(devices) == 1 and not holds and path != ""
        if not whole:  # what it holds is asked; here it is about its own
            devices = {
                _device(v) for v in layer.variables if id(v) not in below
            }
        homes = {*devices, *filter(None, [where.get(path)])}
        if len(homes) > 1:
            raise ValueError(
                f"The variables of {path or layer.name!r} are on "
                f"{', '.join(sorted(homes))}, so it cannot be said where it "
                "runs. Make them under one device, or write "
                "Placement(layer_devices=...) yourself."
            )
        if devices and path:
            where[path] = devices.pop()
        for child in () if whole else children:
            note(child, f"{path}/{child.name}".lstrip("/"))

    note(model, "")
    held: collections.Counter = collections.Counter()
    for v in model.variables:
        held[_device(v)] += math.prod(v.shape) * tf.as_dtype(v.dtype).size
    return where, held


def _device(variable: Any) -> str:
    return short(keras_layers.raw(variable).device)
