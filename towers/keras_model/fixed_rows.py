"""fixed_rows: what layers have for a batch of so many rows, which towers share.

A mask that is a constant, and the shape of a dropout's noise, may name the batch's
rows by their number. A tower has some of them.
"""

import contextlib
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from towers.engine.draws import Place
from towers.engine.host import device_here, on_host
from towers.foreign import keras_layers, tf_random_graphs
from towers.foreign.patches import patched


class Masks:
    """Masks of a tower, of the batch's rows if those are constants.

    Args:
      place: the tower's.
    """

    def __init__(self, place: Place):
        self._place = place
        self._constants: list[np.ndarray] = []

    def of(self, layer: keras.Layer, masks: Any) -> Any:
        """A nest of masks that a layer says of its outputs, of the tower's rows.

        Raises:
          ValueError: one has other rows than the batch.
        """
        return tf.nest.map_structure(
            lambda mask: self._cut(layer, mask, _outside(mask)), masks
        )

    def in_arguments(
        self, layer: keras.Layer, kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """A call's arguments, with masks of the tower's rows.

        A model of symbols keeps constants that layers said when it was made.
        """
        return {
            name: tf.nest.map_structure(
                lambda mask: self._cut(layer, mask, None), value
            )
            if name == "mask" or keras_layers.is_mask_of_argument(layer, name)
            else value
            for name, value in kwargs.items()
        }

    def _cut(self, layer: keras.Layer, mask: Any, value: Any) -> Any:
        """A mask of the tower's rows.

        Args:
          layer: whose it is.
          mask: that.
          value: that of a constant; None if it is one only if one is known.
        """
        place = self._place
        if value is not None:
            self._constants.append(value)
        elif isinstance(mask, (tf.Tensor, np.ndarray)) and self._constants:
            value = tf.get_static_value(mask)
            if not any(np.array_equal(value, x) for x in self._constants):
                return mask
        if value is None or not value.ndim:
            return mask
        n, total = len(value), place.total
        if n == 1 or total is None:  # one for all rows, or for any
            return tf.repeat(tf.constant(value[:1]), place.fed, axis=0)
        if isinstance(total, int):
            if n != total or place.fed == total:
                return mask
            part = tf.constant(value[place.start : place.start + place.fed])
        else:
            problem = f"The mask of {layer.name!r} is a constant"
            start = _checked(place.start, n, total, problem)
            part = tf.constant(value)[start : start + place.fed]
        part = tf.identity(part)
        tf_random_graphs.mark(part)  # no copy of this tower has the same
        return part


def noise_of_rows(
    layer: keras.Layer, args: Sequence[Any], training: Any, place: Place
) -> contextlib.AbstractContextManager[None]:
    """While open, the noise of a dropout is of as many rows as it is given.

    Args:
      layer: any.
      args: what it is called with.
      training: whether it is to train.
      place: the tower's.

    Raises:
      ValueError: its noise is of other rows than the batch.
    """
    shape = getattr(layer, "noise_shape", None)
    shape = tuple(shape) if isinstance(shape, (tuple, list)) else ()
    rows = shape[0] if shape else None
    if (
        not training
        or not isinstance(rows, int)
        or rows == 1
        or not isinstance(args[0], tf.Tensor)
        or args[0].shape[0] == rows
    ):
        return contextlib.nullcontext()
    others = ", ".join(str(n) for n in shape[1:])
    problem = f"In a tower, `noise_shape` of {layer.name!r} is {shape}"
    advice = f" Write noise_shape=(None, {others}), which is any number."
    _checked(place.start, rows, place.total, problem, advice)
    return patched((layer, "noise_shape", (None, *shape[1:])))


def _outside(mask: Any) -> np.ndarray | None:
    """The value of a mask that was made outside of the tower."""
    if isinstance(mask, tf.Tensor) and hasattr(mask, "numpy"):
        return mask.numpy()
    return mask if isinstance(mask, np.ndarray) else None


def _checked(
    start: Any, rows: int, total: Any, problem: str, advice: str = ""
) -> Any:
    """A tower's first row, if the batch has so many."""
    if total is None:  # nobody knows it
        return start
    problem += f", for a batch of {rows} rows, but this one has "
    if isinstance(total, int):
        if rows != total:
            raise ValueError(f"{problem}{total}.{advice}")
        return start
    with on_host(device_here()):
        problem += f"another number.{advice}"
        check = tf.debugging.assert_equal(
            tf.reduce_sum(total), rows, message=problem
        )
        with tf.control_dependencies([] if check is None else [check]):
            return tf.identity(start)
