"""handing_out: what has crossed in a half dtype, for those who want all of it.

A tower takes what has crossed. Who asks for its copy of a parameter gets that as
wide as it is, exactly, which crosses if it is taken; and its gradient, of what the
tower computes, is as wide. Of these two the second is made of the first.
"""

from typing import Any

import tensorflow as tf

from towers.foreign.tf_gradients import own_gradient


def handed_out(
    value: tf.Tensor, half: tf.Tensor, device: str
) -> tuple[tf.Tensor, tf.Tensor]:
    """The value on a device, and what a tower there takes of it.

    Args:
      value: where it lives.
      half: its copy for a tower, in a half dtype; to this gradients go back.
      device: where the tower takes it.
    """

    @own_gradient
    def shown(half: tf.Tensor, value: tf.Tensor) -> Any:
        return value, lambda upstream: [_narrow(upstream, half.dtype), None]

    @own_gradient
    def taken(whole: tf.Tensor, half: tf.Tensor) -> Any:
        return half, lambda upstream: [tf.cast(upstream, whole.dtype), None]

    with tf.device(device):
        whole = shown(half, value)
        return whole, taken(whole, half)


def sent_narrow(value: tf.Tensor, half: tf.DType, device: str) -> tf.Tensor:
    """The value on a device, where it comes in a half dtype, as wide as it was.

    Its gradient goes back as it is made.

    Args:
      value: floats, elsewhere.
      half: in which it crosses.
      device: where it is wanted.
    """

    home = value.device

    def sent(value: tf.Tensor) -> Any:
        with tf.device(home):
            narrow = tf.cast(value, half)
        return tf.cast(narrow, value.dtype), lambda upstream: upstream

    with tf.device(device):
        return own_gradient(sent, {0: home})(value)


def _narrow(gradient: Any, dtype: tf.DType) -> Any:
    """As the tower has said it, if nobody has added to that."""
    dense = getattr(gradient, "values", gradient)
    op = dense.op
    if op.type != "Cast" or op.inputs[0].dtype != dtype:
        return gradient
    if gradient is dense:
        return op.inputs[0]
    return tf.IndexedSlices(
        op.inputs[0], gradient.indices, gradient.dense_shape
    )
