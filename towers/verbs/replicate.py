"""replicate: one copy of a value per tower, and back the sum of their gradients."""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from towers.foreign.tf_gradients import own_gradient
from towers.verbs.rows import drop

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


def total(
    gradients: Sequence[Any], kept: Sequence[tf.Tensor | None] = ()
) -> Any:
    """The sum of gradients; `tf.IndexedSlices` stay sparse.

    Of three terms or more TensorFlow's optimizer makes one `AddN`, and for its
    sake simulates the memory of the whole graph and takes it apart again: of
    eight towers of a ResNet-50, a third of the first step. So each sum is kept
    apart from the next, by the `keep` or by an `ensure_shape`, which cost
    nothing: both pass on the tensor that they are given.

    Args:
      gradients: at least one.
      kept: for each None, or a bool scalar that is False where it counts for
        nothing, whatever it holds: 0 * NaN is NaN.
    """
    kept = kept or [None] * len(gradients)
    if all(isinstance(g, tf.IndexedSlices) for g in gradients):
        parts = [
            g if keep is None else drop(g, keep)
            for g, keep in zip(gradients, kept)
        ]
        return tf.IndexedSlices(
            tf.concat([g.values for g in parts], 0),
            tf.concat([g.indices for g in parts], 0),
            gradients[0].dense_shape,
        )
    # Those that count come first, so that there is something to add to.
    terms = sorted(zip(gradients, kept), key=lambda pair: pair[1] is not None)
    (gradient, keep), *rest = terms
    result = tf.convert_to_tensor(gradient)
    if keep is not None:
        result = drop(result, keep)
    for gradient, keep in rest:
        more = result + tf.convert_to_tensor(gradient)
        if keep is None:
            result = tf.ensure_shape(more, more.shape)
        else:
            # The v1 op passes on what it chooses when the condition is scalar.
            result = tf.compat.v1.where(keep, more, result)
    return result
