"""draws: a tower's rows of what would have been drawn for the whole batch.

TensorFlow's stateless random ops count (Philox, of Salmon et al., "Parallel random
numbers: as easy as 1, 2, 3", 2011): flat element j of a draw comes from block
`counter + j // elements * blocks`, of which it is number `j % elements`. So a tower
draws its rows by starting at another counter, and drops what is before them in the
first block.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import tensorflow as tf

from towers.engine.host import device_here, on_host

# Towers draw from streams this far apart, so that neighbouring seeds of two
# layers do not meet: 2**32 over the golden ratio, below 2**31 after `floormod`.
STREAM = 1_640_531_527
_PAIRS = 4  # so many rows hold whole pairs, and whole groups, of XLA's


@dataclasses.dataclass(frozen=True)
class Place:
    """Where in the batch a tower's rows are.

    Attributes:
      index: which tower it is, an int or an int64 scalar.
      start: its first row: an int, or a scalar.
      fed: how many rows it has, likewise; None where nobody asks.
      total: the batch's rows, likewise, or int32 [n_towers] of each tower's;
        None if nobody knows.
    """

    index: Any
    start: Any
    fed: Any
    total: Any

    @property
    def is_known(self) -> bool:
        """Whether all of it is known while the graph is built."""
        return isinstance(self.start, int) and isinstance(self.total, int)

    def all_rows(self) -> Any:
        """How many rows the batch has: an int, or a scalar."""
        if isinstance(self.total, int) or self.total.shape.rank == 0:
            return self.total
        with on_host(device_here()):
            return tf.reduce_sum(self.total)


def located(place: Place) -> tf.Tensor:
    """int64 [3] of a place, which a tower may be given: see `place_of`."""
    each = [place.start, place.all_rows(), place.index]
    if place.is_known:
        return tf.constant(each, tf.int64)
    return tf.stack([tf.cast(x, tf.int64) for x in each])


def place_of(located: tf.Tensor) -> Place:
    """The place that is `located`, in scalars."""
    with on_host(device_here()):
        start, total, index = tf.unstack(located)
    return Place(index, start, None, total)


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a stateless op counts.

    Attributes:
      elements: how many come from a group of blocks.
      blocks: how many blocks that is.
      in_pairs: whether it makes two of two along the first axis of even size.
    """

    elements: int
    blocks: int
    in_pairs: bool = False


@dataclasses.dataclass(frozen=True)
class Draw:
    """A draw for one tower.

    Attributes:
      draw: `f(shape, counter, parameters)`, the last by name.
      shape: int32 or int64 [rank], of what the tower needs.
      static: as much of that as is known.
      counter: uint64 [2]; None if the op has a seed only.
      axis: that of its rows.
      of_row: so many there for each.
      place: the tower's.
      parameters: by name what the op draws by, of as many rows or of none.
    """

    draw: Callable[[Any, Any, Mapping[str, Any]], tf.Tensor]
    shape: tf.Tensor
    static: list[int | None]
    counter: tf.Tensor | None
    axis: int
    of_row: int
    place: Place
    parameters: Mapping[str, tf.Tensor]

    def drawn(self, shape: Any, counter: Any) -> tf.Tensor:
        return self.draw(shape, counter, self.parameters)


def rows_by_counter(draw: Draw, layout: Layout) -> tf.Tensor:
    """The tower's rows of a draw that has them in its first axis, and no others.

    At most 13 small ops, on the host; see `can_count`.
    """
    if layout.in_pairs:
        return _rows_in_pairs(draw, layout)
    static, start = draw.static, draw.place.start
    elements, blocks = layout.elements, layout.blocks
    with on_host(device_here()):
        of_row = _product(draw.of_row, static[1:], draw.shape[1:])
        if elements == 1 or (isinstance(of_row, int) and not of_row % elements):
            steps = start * _int64(of_row // elements * blocks, 0)
            counter = draw.counter + tf.cast(steps, tf.uint64)
            rest = None
        else:
            first = start * _int64(of_row)
            steps = first // elements * _int64(blocks, 0)
            counter = draw.counter + tf.cast(steps, tf.uint64)
            rest = first % elements
            size = _int64(_product(1, static, draw.shape))
            length = size + (elements - 1)
    if rest is None:
        return draw.drawn(draw.shape, counter)
    rows = tf.slice(draw.drawn(length, counter), rest, size)
    return tf.reshape(rows, draw.shape)


def can_count(draw: Draw, layout: Layout) -> bool:
    """Whether its rows can be drawn by counter, see `rows_by_counter`."""
    return draw.axis == 0 and not (layout.in_pairs and None in draw.static[1:])


def has_split_pairs(draw: Draw, layout: Layout) -> bool:
    """Whether pairs may be of different towers, so that no tower has its rows."""
    rest, total = draw.static[1:], draw.place.all_rows()
    odd = [n for n in rest if n is not None and n % 2]
    if not layout.in_pairs or len(odd) < len(rest):
        return False
    if not isinstance(total, int):
        return max(odd, default=1) > 1
    total *= draw.of_row
    return total % 2 == 1 and total < max(odd, default=1)


def _rows_in_pairs(draw: Draw, layout: Layout) -> tf.Tensor:
    """XLA pairs numbers along the first axis of even size, rows if they are.

    So more rows are drawn, from one that begins a group and a pair: an even number
    of them if the whole's is even, else an odd one. Both, if that is not known. Of
    odd sizes only, the largest axis counts; where that is not the rows', pairs are
    of different towers, and a tower's numbers are of a stream of its own.
    """
    rest = [n for n in draw.static[1:] if n is not None]  # all are known
    start = draw.of_row * draw.place.start
    total = draw.of_row * draw.place.all_rows()
    rows = draw.static[0]
    if rows is None:
        rows = draw.shape[0]
    dtype, skip = draw.shape.dtype, start % _PAIRS
    first = (start - skip) * math.prod(rest) // layout.elements

    def of(some: Any) -> tf.Tensor:
        counter = draw.counter + tf.cast(first * _int64(1, 0), tf.uint64)
        shape = tf.stack([tf.cast(some, dtype), *rest])
        begin = tf.stack([tf.cast(skip, dtype), *[0] * len(rest)])
        rows = tf.slice(draw.drawn(shape, counter), begin, draw.shape)
        rows.set_shape(draw.static)
        return rows

    even, odd = rows + _PAIRS - rows % 2, rows + _PAIRS - 1 + rows % 2
    if any(n % 2 == 0 for n in rest):
        if isinstance(total, int):
            return of(odd if total % 2 else even)
        return tf.where(total % 2 == 0, of(even), of(odd))
    most = max(rest, default=1)
    own = draw.drawn(draw.shape, _other(draw.counter, draw.place.index))
    if isinstance(total, int):
        return of(even) if total % 2 == 0 or total >= most else own
    return tf.where((total % 2 == 0) | (total >= most), of(even), own)


def rows_of_whole(draw: Draw) -> tf.Tensor:
    """The tower's rows of what is drawn for the whole batch.

    All of it is drawn, and cut: so it is the same numbers, whichever op draws
    them on whichever device, compiled or not. What it draws by for other rows
    does not matter.
    """
    static, place, axis = draw.static, draw.place, draw.axis
    with on_host(device_here()):
        start, total = draw.of_row * place.start, draw.of_row * place.all_rows()
        begin, whole = [0] * len(static), [*static]
        begin[axis], whole[axis] = start, total
        dynamic = tf.unstack(tf.cast(draw.shape, tf.int64), len(static))
        here = [d if n is None else n for n, d in zip(static, dynamic)]
        whole = [d if n is None else n for n, d in zip(whole, dynamic)]
        after = total - start - here[axis]
        begin, here, whole = (_int64(*x) for x in (begin, here, whole))
    parameters = {
        name: _padded(x, axis - len(static), start, after, static[axis] == 1)
        for name, x in draw.parameters.items()
    }
    shape = tf.cast(whole, draw.shape.dtype)
    rows = tf.slice(draw.draw(shape, draw.counter, parameters), begin, here)
    rows.set_shape(static)
    return rows


def _padded(
    x: tf.Tensor, axis: int, before: Any, after: Any, is_of_one: bool
) -> tf.Tensor:
    """A parameter of all rows, with ones for others', if it has rows.

    Args:
      x: broadcast to the draw's shape, by its last axes.
      axis: that of rows, from the last.
      before, after: how many others there are.
      is_of_one: whether the tower has one row only, as a parameter may.
    """
    axis += x.shape.rank
    if axis < 0 or (x.shape[axis] == 1 and not is_of_one):
        return x
    with on_host(device_here()):
        pads = [[0, 0]] * x.shape.rank
        pads[axis] = [before, after]
        pads = tf.stack([_int64(*pair) for pair in pads])
    return tf.pad(x, pads, constant_values=tf.ones([], x.dtype))


def own_key(key: tf.Tensor, place: Place) -> tf.Tensor:
    """The key, or the seed, of a stream of the tower's; tower 0 has the given.

    Args:
      key: of whole numbers, uint64 [1], or [2] of any dtype.
      place: the tower's.
    """
    with on_host(device_here()):
        step = place.index * _int64(STREAM) % 2**31
        if key.shape[0] == 2:
            step *= _int64(1, 0)
        return key + tf.cast(step, key.dtype)


def own_seed(
    seeds: tuple[int, int], most: int, place: Place
) -> tuple[int, int]:
    """The seeds, below `most`, of an op of the tower's; tower 0 has the given."""
    seed = (seeds[1] + place.index * STREAM) % most
    # Two zeros would stand for no seed.
    return seeds[0], seed if seeds[0] or seed else most


def _other(counter: tf.Tensor, index: Any) -> tf.Tensor:
    """The start of a counter stream that overlaps no other tower's."""
    with on_host(device_here()):
        return counter + tf.cast(index * _int64(0, 1), tf.uint64)


def _int64(*numbers: Any) -> tf.Tensor:
    """An int64 vector of Python ints, or of scalar tensors."""
    if all(isinstance(n, int) for n in numbers):
        return tf.constant(numbers, tf.int64)
    each = [tf.cast(n, tf.int64) for n in numbers]
    return tf.stack(each) if len(each) > 1 else tf.reshape(each[0], [1])


def _product(times: int, sizes: list[int | None], shape: tf.Tensor) -> Any:
    """A product of sizes: an int, or an int64 scalar if some are not known."""
    if None not in sizes:
        return times * math.prod(n for n in sizes if n is not None)
    product = tf.reduce_prod(tf.cast(shape, tf.int64))
    return product if times == 1 else times * product
