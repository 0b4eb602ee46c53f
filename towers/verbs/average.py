"""average: the gradients of towers that were trained with a loss each."""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from towers.verbs.rows import Rows, drop, total


def average_gradients(
    tower_gradients: Sequence[Sequence[Any]], rows: Any = None
) -> list[Any]:
    """The mean of the towers' gradients, variable by variable.

    >>> (mean,) = towers.average_gradients(
    ...     [[tf.constant(1.0)], [tf.constant(4.0)]], rows=[2, 1])
    >>> float(mean)
    2.0

    Args:
      tower_gradients: per tower, one gradient per variable: a float tensor,
        `tf.IndexedSlices` (which stay sparse) or None (counted as zero).
      rows: [n_towers] integers to weight by; None weights towers equally.
        A tower of 0 rows counts for nothing.

    Returns:
      One gradient per variable, None where no tower has one.

    Raises:
      TypeError: a gradient is no tensor, as in a dict or a nest.
      ValueError: no towers, or lists or rows of different lengths.
    """
    towers = [list(gradients) for gradients in tower_gradients]
    if not towers or len({len(gradients) for gradients in towers}) != 1:
        raise ValueError(
            "`tower_gradients` must be one list per tower, all of one length; "
            f"got lengths {[len(gradients) for gradients in towers]}."
        )
    flat = [g for gradients in towers for g in gradients if g is not None]
    if not all(hasattr(g, "dtype") for g in flat):
        raise TypeError(
            "`tower_gradients` must hold a list of tensors, tf.IndexedSlices or "
            f"None for each tower; got {type(tower_gradients[0]).__name__}s "
            "with others. Pass tf.nest.flatten of each."
        )
    weights = None if rows is None else tf.convert_to_tensor(rows)
    if weights is None:
        weights = tf.ones([len(towers)], tf.int32)
    if weights.shape.as_list() != [len(towers)]:
        raise ValueError(
            f"`rows` must be a list of {len(towers)} integers, one per tower; "
            f"got shape {weights.shape}."
        )
    shares, averages = Rows(weights, [True] * len(towers)).shares, []
    for column in zip(*towers):
        parts = [
            _scaled(drop(g, weights[i] > 0), shares(g.dtype)[i])
            for i, g in enumerate(column)
            if g is not None
        ]
        averages.append(total(parts) if parts else None)
    return averages


def _scaled(gradient: Any, share: tf.Tensor) -> Any:
    if isinstance(gradient, tf.IndexedSlices):
        return tf.IndexedSlices(
            gradient.values * share, gradient.indices, gradient.dense_shape
        )
    return gradient * share
