"""assembled: what a tensor was put together from, for whom takes the parts.

As Keras's masks are, that is noted on the tensor itself. Who does not ask for it takes
the tensor, and TensorFlow drops what nobody takes.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from towers.foreign.keras_layers import get_notes, set_notes


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
    """One tensor, on the device that is open, which is known to be of parts.

    Where these are of logits, as of a sigmoid, losses take those, as Keras does.
    """
    joined = tf.concat(tensors, axis)
    logits = [note["logits"] for note in get_notes(list(tensors))]
    if all(x is not None for x in logits):
        set_notes(joined, [{"logits": tf.concat(logits, axis)}])
    parts = Parts(tensors, axis % joined.shape.rank, sizes)
    joined._towers_parts = parts
    return joined


def known_parts(tensor: Any) -> Parts | None:
    """What a tensor was put together from, if that is known."""
    return getattr(tensor, "_towers_parts", None)


def pieces_of(
    tensor: tf.Tensor, axis: int, sizes: tuple[int, ...]
) -> Sequence[tf.Tensor]:
    """A tensor in pieces: its parts, if it was made of such."""
    parts = known_parts(tensor)
    axis %= tensor.shape.rank
    if parts is not None and (parts.axis, parts.sizes) == (axis, sizes):
        return parts.tensors
    return tf.split(tensor, sizes, axis)
