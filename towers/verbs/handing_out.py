"""handing_out: all of a parameter, of which a tower has less, for who asks for it.

What has crossed in a half dtype, a tower takes so. Who asks for its copy of a
parameter gets that as wide as it is, exactly, which crosses if it is taken; and its
gradient, of what the tower computes, is as wide. Of these two the second is made of
the first. Likewise of a table of which a tower reads rows: all of that is read only
if somebody asks.
"""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from towers.foreign import tf_functions
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


def widened(narrow: tf.Tensor, dtype: tf.DType, device: str) -> tf.Tensor:
    """What has crossed in a half dtype, as wide as it was.

    Its gradient goes back as it is made.
    """

    def wide(narrow: tf.Tensor) -> Any:
        return tf.cast(narrow, dtype), lambda upstream: upstream

    with tf.device(device):
        return own_gradient(wide)(narrow)


class Promised:
    """All of a table, with the gradient of what a tower reads of it.

    Args:
      stand_in: what the tower has of it; to this gradients go back.
      read: gives all of it, where it lives.
      device: that.

    Attributes:
      taken: what the tower takes in the place of `stand_in`.
    """

    def __init__(
        self, stand_in: tf.Tensor, read: Callable[[], tf.Tensor], device: str
    ):
        self._read, self._device = read, device

        def passed(_: tf.Tensor) -> Any:
            return open_rows(stand_in), lambda upstream: upstream

        with tf.device(device):
            self._whole = own_gradient(passed)(stand_in)
            self.taken = own_gradient(passed)(self._whole)
        self._is_kept = False
        if not self._whole.graph.building_function:
            self.kept()  # a Session runs what is fetched

    def kept(self) -> tf.Tensor:
        """All of it; for this the table is read."""
        if not self._is_kept:
            self._is_kept = True
            op = self._whole.op
            with (
                op.graph.as_default(),
                tf.control_dependencies(None),
                tf.device(self._device),
            ):
                value = self._read()
            tf_functions.take_instead(op, 0, value)
            self._whole.set_shape(value.shape)
        return self._whole


def open_rows(like: tf.Tensor) -> tf.Tensor:
    """A tensor of no rows, whose gradient may have some."""
    width = like.shape[1]
    empty = tf.zeros([0, width], like.dtype)
    return tf.compat.v1.placeholder_with_default(empty, [None, width])


def _narrow(gradient: Any, dtype: tf.DType) -> Any:
    """The gradient before a cast to full width, if that came last."""
    dense = getattr(gradient, "values", gradient)
    op = dense.op
    if op.type != "Cast" or op.inputs[0].dtype != dtype:
        return gradient
    if gradient is dense:
        return op.inputs[0]
    return tf.IndexedSlices(
        op.inputs[0], gradient.indices, gradient.dense_shape
    )
