"""parts: what a tensor was put together from, for whom takes the parts.

As Keras's masks are, that is noted on the tensor itself. Who does not ask for it takes
the tensor, and TensorFlow drops what nobody takes.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import tensorflow as tf


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a tensor was put together from.

    Attributes:
      tensors: each on the device of its piece.
      axis: from the front.
      sizes: along it.
    """

    tensors: Sequence[tf.Tensor]
    axis: int
    sizes: tuple[int, ...]


def side_by_side(
    tensors: Sequence[tf.Tensor], axis: int, sizes: tuple[int, ...]
) -> tf.Tensor:
    """One tensor, on the device that is open, which is known to be of parts."""
    joined = tf.concat(tensors, axis)
    parts = Parts(tensors, axis % joined.shape.rank, sizes)
    joined._towers_parts = parts
    return joined


def parts_of(tensor: Any) -> Parts | None:
    """What a tensor was put together from, if that is known."""
    return getattr(tensor, "_towers_parts", None)


def cut(
    tensor: tf.Tensor, axis: int, sizes: tuple[int, ...]
) -> Sequence[tf.Tensor]:
    """A tensor in pieces: its parts, if it was made of such."""
    known = parts_of(tensor)
    axis %= tensor.shape.rank
    if known is not None and (known.axis, known.sizes) == (axis, sizes):
        return known.tensors
    return tf.split(tensor, sizes, axis)
