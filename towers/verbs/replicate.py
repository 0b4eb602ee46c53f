"""replicate: one copy of a value per tower, and back the sum of their gradients."""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from towers.foreign.tf_gradients import own_gradient
from towers.verbs.rows import total

# In which gradients are summed that come in a half dtype.
FULL = tf.float32


def replicate(
    value: tf.Tensor,
    device: str,
    kept: Sequence[tf.Tensor | None],
    half: tf.DType | None = None,
) -> list[tf.Tensor]:
    """One copy per tower; the gradients are summed on `device`.

    Args:
      value: the variable's value, read on `device`.
      device: where the variable lives.
      kept: per tower None, or a bool scalar that is False when the tower had
        no rows, so that its gradient is dropped.
      half: the dtype of the copies, if that is half of float32, in which their
        gradients are summed; `value` is of either.

    Returns:
      A list of tensors like `value`, one per tower.
    """
    n = len(kept)
    if not value.dtype.is_floating:
        return [value] * n

    def full(gradient: Any) -> Any:
        return gradient if half is None else tf.cast(gradient, FULL)

    @own_gradient
    def copies(value: tf.Tensor) -> Any:
        def backward(*upstream: Any) -> Any:
            with tf.device(device):
                return total([full(g) for g in upstream], kept)

        return [value if half is None else tf.cast(value, half)] * n, backward

    with tf.device(device):
        return copies(value)
