"""replicate: one copy of a value per tower, and the sum of their gradients."""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from towers.own_gradient import own_gradient


def replicate(
    value: tf.Tensor, device: str, kept: Sequence[tf.Tensor | None]
) -> list[tf.Tensor]:
    """One copy per tower; the gradients are summed on `device`.

    Args:
      value: the variable's value, read on `device`.
      device: where the variable lives.
      kept: per tower None, or a bool scalar that is False when the tower had
        no rows, so that its gradient is dropped.

    Returns:
      A list of tensors like `value`, one per tower.
    """
    n = len(kept)
    if not value.dtype.is_floating:
        return [value] * n

    @own_gradient
    def copies(value: tf.Tensor) -> Any:
        def backward(*upstream: Any) -> Any:
            with tf.device(device):
                return total(
                    [
                        g if keep is None else drop(g, keep)
                        for g, keep in zip(upstream, kept)
                    ]
                )

        return [value] * n, backward

    with tf.device(device):
        return copies(value)


def total(gradients: Sequence[Any]) -> Any:
    """The sum of gradients; `tf.IndexedSlices` stay sparse."""
    if all(isinstance(g, tf.IndexedSlices) for g in gradients):
        return tf.IndexedSlices(
            tf.concat([g.values for g in gradients], 0),
            tf.concat([g.indices for g in gradients], 0),
            gradients[0].dense_shape,
        )
    return tf.add_n([tf.convert_to_tensor(g) for g in gradients])


def drop(gradient: Any, keep: tf.Tensor) -> Any:
    """Nothing of `gradient` unless `keep`, whatever it holds: 0 * NaN is NaN."""
    if isinstance(gradient, tf.IndexedSlices):
        count = tf.where(keep, tf.shape(gradient.indices)[0], 0)
        return tf.IndexedSlices(
            gradient.values[:count],
            gradient.indices[:count],
            gradient.dense_shape,
        )
    # The v1 op passes its input on without a copy when the condition is scalar.
    return tf.compat.v1.where(keep, gradient, tf.zeros_like(gradient))


def keep_flags(
    rows: tf.Tensor, may_be_empty: Sequence[bool], device: str
) -> list[Any]:
    """Per tower None, or a bool scalar on `device`: whether it had rows."""
    with tf.device(device):
        return [
            rows[t] > 0 if empty else None
            for t, empty in enumerate(may_be_empty)
        ]
