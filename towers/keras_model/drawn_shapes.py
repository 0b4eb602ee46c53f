"""drawn_shapes: which axes of what a model draws are rows, of a call of MANY.

As many rows as hardly any axis has, so that it shows in the shapes, where a tower
may take the number of its rows for a constant, which no op shows. Not more, as some
layers are loops over rows in Python, such as `RandomElasticTransform`; an axis that
has as many in a tower of other rows is none of rows.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import tensorflow as tf

from towers.foreign import tf_random_graphs
from towers.keras_model import row_order

# A layer's path, the kind of its draw, and which one of those it is.
Key = tuple[str, str, int]
MANY = 61  # a prime
BY_ROW = "in a loop over rows"  # for a sentence
STATEFUL = "op"  # the kind of all ops with a state


@dataclasses.dataclass(frozen=True)
class DrawShape:
    """What is drawn of MANY rows.

    Attributes:
      axes: those with rows; None if that is not known.
      of_row: so many in the first of them for each row.
      by_row: whether a loop over rows draws it.
      joined: whether these are of several views of the batch, one after another.
      shape: all of it, as far as it is known.
    """

    axes: tuple[int, ...] | None
    of_row: int = 1
    by_row: bool = False
    joined: bool = False
    shape: tuple[int | None, ...] | None = None

    @property
    def is_one(self) -> bool:
        """Whether it is one for the whole batch."""
        return self.axes == () and not self.by_row

    @property
    def is_once(self) -> bool:
        """Whether it is drawn once, with rows in order in one of its axes."""
        return len(self.axes or ()) == 1 and not (self.by_row or self.joined)

    @property
    def axis(self) -> int:
        """The first with rows."""
        return self.axes[0] if self.axes else 0

    @property
    def why_own(self) -> str:
        """Why a tower cannot have its rows of it, for a sentence."""
        if self.by_row:
            return BY_ROW
        if self.axes is None:
            return "of a size that its data tells"
        if self.joined:
            return "for several views of a batch, joined"
        if len(self.axes) > 1:
            return "for pairs of rows"
        return "that XLA cannot count, or that depend on other rows"

    @staticmethod
    def of(tensors: Iterable[tf.Tensor]) -> "DrawShape":
        """What an op has drawn; several, if it was made again in a loop's place."""
        each = [DrawShape._of(x) for x in tensors]
        with_rows = [x for x in each if x.axes != () or x.by_row]
        return next(iter([*with_rows, *each]), DrawShape(None))

    @staticmethod
    def _of(tensor: tf.Tensor) -> "DrawShape":
        shape = tensor.shape
        by_row = any(
            _counts_rows(op, condition)
            for op, condition in tf_random_graphs.loops_around(tensor.graph)
        )
        if shape.rank is None or None in shape:
            sizes = None if shape.rank is None else tuple(shape)
            return DrawShape(None, 1, by_row, shape=sizes)
        axes = tuple(a for a, n in enumerate(shape) if n and _is_rows(n))
        of_row = shape[axes[0]] // MANY if axes else 1
        joined = of_row > 1 and (
            axes[0] > 0 or row_order.is_for_joined(tensor, MANY)
        )
        return DrawShape(axes, of_row, by_row, joined, tuple(shape))

    def made_each(self, times: int) -> "DrawShape":
        """What it is if its layer makes so many of the kind.

        As many as MANY, and of no rows: a loop of Python's over rows makes them.
        """
        if self.axes == () and times >= MANY:
            return DrawShape(None, by_row=True)
        return self

    def of_tower(
        self, sizes: Sequence[int | None] | None, rows: Any
    ) -> "DrawShape":
        """The shape in a tower; an axis of the same size there is none of rows.

        Args:
          sizes: of what that draws, as far as they are known.
          rows: the tower's, an int if they are known.
        """
        if not (self.axes and self.shape and sizes):
            return self
        if isinstance(rows, int) and rows == MANY:
            return self
        axes = tuple(a for a in self.axes if sizes[a] != self.shape[a])
        if axes == self.axes:
            return self
        of_row = (self.shape[axes[0]] or MANY) // MANY if axes else 1
        return dataclasses.replace(self, axes=axes, of_row=of_row)

    def fits(
        self, sizes: Sequence[int | None], rows: Any, is_filled: bool
    ) -> bool:
        """Whether a tower may draw this of such sizes, some of them unknown.

        Args:
          sizes: what it draws.
          rows: the tower's, an int if they are known.
          is_filled: whether it is given other axes of unknown size.
        """
        if self.shape is None:
            return True
        if len(sizes) != len(self.shape):
            return False
        if self.axes == () and None in sizes and not is_filled:
            return False
        for a, (n, m) in enumerate(zip(sizes, self.shape)):
            if n is None or m is None:
                continue
            if a not in (self.axes or ()):
                if n != m:
                    return False
            elif isinstance(rows, int) and n != rows * (m // MANY):
                return False
        return True


def _is_rows(n: Any) -> bool:
    return n > 0 and n % MANY == 0


def _counts_rows(loop: tf.Operation, condition: Any) -> bool:
    """Whether a loop is one over MANY rows, by the numbers that it goes by."""
    inside = [x for op in condition.get_operations() for x in op.outputs]
    return any(
        _is_rows(number)
        for x in [*loop.inputs, *inside]
        for number in _numbers(x)
    )


def _numbers(count: tf.Tensor) -> Iterator[int]:
    """A whole number that is known, or those that it is made of."""
    todo, ids = [count], set[int]()
    while todo:
        x = todo.pop()
        if id(x) in ids or not (x.dtype.is_integer and x.shape.rank == 0):
            continue
        ids.add(id(x))
        value = tf.get_static_value(x)
        if value is None and x.op.type == "StridedSlice":  # of a shape
            shape, begin = map(tf.get_static_value, x.op.inputs[:2])
            if shape is not None and begin is not None:
                value = shape[tuple(begin)]
        if value is None:
            todo += tf_random_graphs.taken(x)
        else:
            yield int(value)


def key_of(counts: Counter[Any], path: str, kind: str) -> Key:
    counts[path, kind] += 1
    return path, kind, counts[path, kind]
