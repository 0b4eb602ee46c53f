"""dropout: a piece's part of what is dropped, which is drawn for the whole.

All pieces draw by one seed as many numbers as the whole has, each on its device, and
take those of their part: so no mask crosses, and each is the plain model's.
"""

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from towers.foreign.keras_cut import changed

_KINDS = (
    *(keras.layers.Dropout, keras.layers.SpatialDropout1D),
    *(keras.layers.SpatialDropout2D, keras.layers.SpatialDropout3D),
)


class _GivenSeed(keras.random.SeedGenerator):
    """Gives out a seed that has been drawn."""

    def __init__(self, seed: tf.Tensor):
        self._drawn = seed

    def next(self, ordered: bool = True) -> tf.Tensor:
        return self._drawn


def drops(layer: Any, training: Any) -> bool:
    """Whether a layer drops some of what it is given, in a call of this phase."""
    return type(layer) in _KINDS and bool(training) and layer.rate > 0


def of_pieces(layer: Any, sizes: tuple[int, ...]) -> Callable[..., tf.Tensor]:
    """`f(part, axis, j)`: what is left of a part; of one call of the layer.

    Args:
      layer: a `Dropout` that drops, see `drops`.
      sizes: of all parts.
    """
    drawing = changed(
        layer, {"seed_generator": _GivenSeed(layer.seed_generator.next())}
    )

    def left(part: tf.Tensor, axis: int, j: int) -> tf.Tensor:
        """On the device that is open."""
        axis %= part.shape.rank
        shape = tf.unstack(tf.shape(part))
        shape[axis] = sum(sizes)
        whole = tf.ones(tf.stack(shape), part.dtype)
        whole.set_shape(
            [*part.shape[:axis], sum(sizes), *part.shape[axis + 1 :]]
        )
        kept = type(layer).call(drawing, whole, training=True)
        return part * tf.split(kept, sizes, axis)[j]

    return left
