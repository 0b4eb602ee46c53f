"""draws: random numbers of a tower's rows, or of a stream of its own."""

import dataclasses
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from towers.engine.host import device_here, on_host

# Towers draw from streams this far apart, so that neighbouring seeds of two
# layers do not meet: 2**32 over the golden ratio, below 2**31 after `floormod`.
STREAM = 1_640_531_527


@dataclasses.dataclass(frozen=True)
class Place:
    """Where in the batch a tower's rows are.

    Attributes:
      index: which tower it is.
      start: its first row, a Python int or an int32 scalar.
      fed: how many rows it has, likewise.
      total: the batch's rows: one int, or int32 [n_towers] of each tower's.
    """

    index: int
    start: Any
    fed: Any
    total: Any


def rows_of_whole(
    draw: Callable[[Any], tf.Tensor],
    shape: tf.Tensor,
    axis: int,
    of_row: int,
    place: Place,
) -> tf.Tensor:
    """The tower's rows of what is drawn for the whole batch.

    All of it is drawn, and cut: so it is the same numbers, whichever op draws
    them on whichever device, compiled or not.

    Args:
      draw: makes numbers of a shape.
      shape: int32 or int64 [rank], of what the tower needs.
      axis: of its rows.
      of_row: so many there for each.
      place: the tower's.
    """
    known = tf.get_static_value(shape, partial=True)
    if known is None:  # not even in part
        known = [None] * shape.shape[0]
    static = [None if n is None else int(n) for n in known]
    with on_host(device_here()):
        total = place.total
        if not isinstance(total, int):
            total = tf.reduce_sum(total)
        begin, whole = [0] * len(static), list(static)
        begin[axis], whole[axis] = of_row * place.start, of_row * total
        dynamic = tf.unstack(tf.cast(shape, tf.int32), len(static))
        here = [d if n is None else n for n, d in zip(static, dynamic)]
        whole = [d if n is None else n for n, d in zip(whole, dynamic)]
        begin, here, whole = (tf.stack(x) for x in (begin, here, whole))
    rows = tf.slice(draw(tf.cast(whole, shape.dtype)), begin, here)
    rows.set_shape(static)
    return rows


def own_key(key: tf.Tensor, place: Place) -> tf.Tensor:
    """The key, or the seed, of a stream of the tower's; tower 0 has the given.

    Args:
      key: of whole numbers, uint64 [1], or [2] of any dtype.
      place: the tower's.
    """
    step = [place.index * STREAM % 2**31, *([0] * (key.shape[0] - 1))]
    with on_host(device_here()):
        return key + tf.cast(tf.constant(step, tf.int64), key.dtype)


def own_seed(
    seeds: tuple[int, int], most: int, place: Place
) -> tuple[int, int]:
    """The seeds, below `most`, of an op of the tower's; tower 0 has the given."""
    seed = (seeds[1] + place.index * STREAM) % most
    # Two zeros would stand for no seed.
    return seeds[0], seed if seeds[0] or seed else most
