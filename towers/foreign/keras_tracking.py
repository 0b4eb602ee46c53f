"""keras_tracking: variables of a layer, and of an optimizer, in others' place.

Keras has no public word for the lists that its layers keep of their variables
(`_trainable_variables`, `_non_trainable_variables`), for their watch over these
(`_tracker`, `_track_variable`, `_untrack_variable`), nor for whether a variable is
cast in mixed precision (`_autocast`) and how its path is made (`_path`); TensorFlow
has none for what its checkpoints find below an object
(`_track_trackable`). `keras_tracking_test.py` fails when one of them changes.
"""

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf


def own_variables(layer: Any) -> list[Any]:
    """A layer's own variables, in the order of its files."""
    return [*layer._trainable_variables, *layer._non_trainable_variables]


def like(variable: Any, value: Any, device: str, path: str) -> keras.Variable:
    """A variable of the same kind with another value, on a device.

    Args:
      variable: a Keras variable, or what stands for one.
      value: an array.
      device: where it is made.
      path: its path in Keras.
    """
    with tf.device(device):
        new = keras.Variable(
            value,
            dtype=variable.dtype,
            trainable=variable.trainable,
            autocast=getattr(variable, "_autocast", True),
            name=variable.name,
        )
    set_path(new, path)
    new.regularizer = variable.regularizer
    new.constraint = variable.constraint
    return new


def set_path(variable: Any, path: str) -> None:
    """Gives a variable another path."""
    variable._path = path


def replace_variables(
    layer: Any,
    attribute: str,
    old: Sequence[Any],
    new: Sequence[Any],
    what: Any,
) -> None:
    """Puts variables of a layer in the place of others.

    Args:
      layer: it.
      attribute: what holds the old ones, or what stands for them.
      old, new: Keras variables.
      what: what the attribute holds from now on.
    """
    store = next(
        store
        for store in (
            layer._trainable_variables,
            layer._non_trainable_variables,
        )
        if any(v is old[0] for v in store)
    )
    place = [v is old[0] for v in store].index(True)
    was_locked = layer._tracker.locked
    layer._tracker.unlock()
    for variable in old:
        layer._untrack_variable(variable)
    for variable in new:
        layer._track_variable(variable)
    if was_locked:
        layer._tracker.lock()
    ids = {id(v) for v in new}
    rest = [v for v in store if id(v) not in ids]
    store[:] = [*rest[:place], *new, *rest[place:]]
    # Else TensorFlow keeps the old one, and its checkpoints save that.
    layer._track_trackable(what, attribute, overwrite=True)
    vars(layer)[attribute] = what
