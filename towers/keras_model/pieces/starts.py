"""starts: how variables that are made in pieces begin."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

# Initializers of one number, or one distribution, whatever the shape.
_ANY_SHAPE = (
    *(keras.initializers.Zeros, keras.initializers.Ones),
    *(keras.initializers.RandomNormal, keras.initializers.RandomUniform),
    keras.initializers.TruncatedNormal,
)
# Seeds of pieces are this far apart: 2**32 over the golden ratio, see `draws`.
_APART = 1_640_531_527


def starts(
    initializer: Any, shape: Sequence[int], sizes: Sequence[int], axis: int
) -> list[Callable[..., Any]]:
    """For each piece an initializer, as if it were a part of the whole.

    Each draws its own numbers, from the distribution that the whole's shape asks for.
    What depends on all of the numbers, as an orthogonal start does, is made whole, on
    the host, and cut.

    Args:
      initializer: Keras's, by name or as an object, or a function of shape and dtype.
      shape: of the whole.
      sizes: of the pieces, along the axis.
      axis: that.
    """
    initializer = keras.initializers.get(initializer)
    kind = type(initializer)
    if isinstance(initializer, keras.initializers.VarianceScaling):
        if kind.__call__ is keras.initializers.VarianceScaling.__call__:
            return [
                _scaled(initializer, shape, size, axis, j)
                for j, size in enumerate(sizes)
            ]
    if kind in _ANY_SHAPE:
        return [_reseeded(initializer, j) for j in range(len(sizes))]
    if kind is keras.initializers.Constant and np.ndim(initializer.value) == 0:
        return [initializer] * len(sizes)
    return _cut(initializer, shape, sizes, axis)


def _reseeded(initializer: Any, j: int) -> Any:
    config = initializer.get_config()
    if "seed" in config:
        config["seed"] = _seed(initializer, j)
    return type(initializer).from_config(config)


def _seed(initializer: Any, j: int) -> int | None:
    """The seed of a piece; the first has the whole's."""
    seed = initializer.seed
    return (seed + j * _APART) % 2**31 if isinstance(seed, int) and j else seed


def _scaled(
    initializer: Any, shape: Sequence[int], size: int, axis: int, j: int
) -> Any:
    """An initializer of a piece, which has fewer ins or outs than the whole."""
    own = [size if i == axis else n for i, n in enumerate(shape)]
    of_whole, of_piece = (_fan(initializer.mode, s) for s in (shape, own))
    return keras.initializers.VarianceScaling(
        initializer.scale * of_piece / of_whole,
        initializer.mode,
        initializer.distribution,
        _seed(initializer, j),
    )


def _fan(mode: str, shape: Sequence[int]) -> float:
    """What Keras divides a variance by: of ins, outs, or both (X. Glorot and Y.
    Bengio, "Understanding the difficulty of training deep networks", 2010)."""
    if len(shape) < 2:
        ins = outs = math.prod(shape)
    else:
        *window, ins, outs = shape
        ins, outs = ins * math.prod(window), outs * math.prod(window)
    fans = {"fan_in": ins, "fan_out": outs, "fan_avg": (ins + outs) / 2}
    return max(1.0, fans[mode])


def _cut(
    initializer: Any, shape: Sequence[int], sizes: Sequence[int], axis: int
) -> list[Callable[..., Any]]:
    """Each its part of one value, which is made when the first is asked for."""
    parts: list[Any] = []

    def of(j: int) -> Callable[..., Any]:
        def part(_: Any, dtype: Any = None) -> Any:
            if not parts:
                with tf.device("/CPU:0"):
                    value = initializer(tuple(shape), dtype=dtype)
                    parts.extend(tf.split(value, sizes, axis))
            return parts[j]

        return part

    return [of(j) for j in range(len(sizes))]
