"""rows: who gets which rows of a batch, and what says nothing for want of any."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from towers.engine.host import host_of, on_host
from towers.foreign.tf_gradients import kept_apart


@dataclasses.dataclass(frozen=True)
class Rows:
    """How many rows each tower has.

    Attributes:
      counts: int32 [n_towers].
      may_be_empty: per tower, whether it can have none.
    """

    counts: tf.Tensor
    may_be_empty: Sequence[bool]

    def kept(self, device: str) -> list[Any]:
        """Per tower None, or a bool scalar on `device`: whether it had rows."""
        with tf.device(device):
            return [
                self.counts[t] > 0 if empty else None
                for t, empty in enumerate(self.may_be_empty)
            ]

    def shares(self, dtype: tf.DType) -> tf.Tensor:
        """[n_towers], each tower's part of all rows."""
        counts = tf.cast(self.counts, dtype)
        return tf.math.divide_no_nan(counts, tf.reduce_sum(counts))

    def concat(self, column: Sequence[tf.Tensor]) -> tf.Tensor:
        """[all rows, ...]: what towers with rows say, joined."""
        return tf.concat(self.without_spare(column), 0)

    def without_spare(self, column: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """What each tower says, and nothing of a spare row."""
        return [
            _true_rows(x, self.counts[i]) if empty else x
            for i, (x, empty) in enumerate(zip(column, self.may_be_empty))
        ]

    def of(self, towers: Sequence[int]) -> "Rows":
        """The rows of some of the towers."""
        counts = tf.stack([self.counts[i] for i in towers])
        return Rows(counts, [self.may_be_empty[i] for i in towers])

    def together(self, units: Sequence[Sequence[int]]) -> "Rows":
        """The rows of units of towers, each unit counted as one tower."""
        counts = [
            functools.reduce(tf.add, [self.counts[i] for i in unit])
            for unit in units
        ]
        empty = [all(self.may_be_empty[i] for i in unit) for unit in units]
        return Rows(tf.stack(counts), empty)

    def last(self, column: Sequence[tf.Tensor]) -> tf.Tensor:
        """The value of the last tower with rows; the first if none has any."""
        latest = column[0]
        for i, x in enumerate(column[1:], 1):
            if self.may_be_empty[i]:
                x = tf.where(self.counts[i] > 0, x, latest)
            latest = x
        return latest

    def chosen(
        self, either: Callable[..., tf.Tensor], column: Sequence[tf.Tensor]
    ) -> tf.Tensor:
        """The values of all towers with rows, reduced in pairs by `either`."""
        last = self.last(column)
        each = [
            tf.where(self.counts[i] > 0, x, last) if empty else x
            for i, (x, empty) in enumerate(zip(column, self.may_be_empty))
        ]
        return functools.reduce(either, each)

    def masked(self, column: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """What each tower says, zeros if it has no rows."""
        return [
            drop(x, self.counts[i] > 0) if empty else x
            for i, (x, empty) in enumerate(zip(column, self.may_be_empty))
        ]


@dataclasses.dataclass(frozen=True)
class Ranges:
    """Which rows each tower gets: Python ints, or int32 scalars.

    Attributes:
      starts: the first row, per tower.
      fed: how many it is fed; one spare row where it has none of its own.
      true: how many are its own.
      may_be_empty: whether it can have no rows of its own.
    """

    starts: list[Any]
    fed: list[Any]
    true: list[Any]
    may_be_empty: list[bool]

    @property
    def are_known(self) -> bool:
        """Whether they are known while the graph is built."""
        return all(isinstance(rows, int) for rows in self.true)


def row_ranges(
    leaves: Sequence[Any], shares: tuple[float, ...], device: str
) -> Ranges:
    """Which rows each tower gets, by its share, of tensors of equal rows.

    Args:
      leaves: the tensors, on `device`; the ranges are on the host of that.
      shares: one per tower.
      device: where batches are split.
    """
    static = next((x.shape[0] for x in leaves if x.shape[0] is not None), None)
    open_ones = [x for x in leaves if x.shape[0] is None]
    counts = [_count(x, device) for x in open_ones if len(leaves) > 1]
    total = static
    if total is None:
        total = counts[0] if counts else _count(leaves[0], device)
    with on_host(device):
        return _ranges(total, counts, shares)


def _ranges(
    total: Any, counts: Sequence[tf.Tensor], shares: tuple[float, ...]
) -> Ranges:
    """As `row_ranges`, of `total` rows, with which all `counts` must agree."""
    static = total if isinstance(total, int) else None
    checks = [
        tf.debugging.assert_equal(
            count,
            total,
            message="The inputs' rows disagree: every leaf of `inputs` "
            "must have the same number of rows, or be named in `whole`.",
        )
        for count in counts
    ]
    with tf.control_dependencies([c for c in checks if c is not None]):
        if static is None:
            total = tf.identity(total)
    ends = _ends(total, shares)
    starts = [0, *ends[:-1]]
    rows = [end - start for start, end in zip(starts, ends)]
    # An empty tower borrows a row of the batch.
    if static is not None:
        empty = [r == 0 for r in rows]
        starts = [min(start, max(total - 1, 0)) for start in starts]
        return Ranges(
            starts, [max(r, min(total, 1)) for r in rows], rows, empty
        )
    empty = [True] * len(shares)
    # The last tower with a share gets at least one row of any batch.
    empty[_last_with_share(shares)] = False
    last = tf.maximum(total - 1, 0)
    return Ranges(
        [tf.clip_by_value(start, 0, last) for start in starts],
        [
            tf.maximum(r, tf.minimum(total, 1)) if e else r
            for r, e in zip(rows, empty)
        ],
        rows,
        empty,
    )


def ranges_of(true: Sequence[Any], may_be_empty: Sequence[bool]) -> Ranges:
    """Which rows towers have that read their own, one after the other.

    Args:
      true: how many each has, Python ints or int32 scalars on a host.
      may_be_empty: which can have none, of their own; one has some.
    """
    ends = list(itertools.accumulate(true))
    starts = [0, *ends[:-1]]
    if not any(may_be_empty):
        return Ranges(starts, list(true), list(true), list(may_be_empty))
    last = ends[-1] - 1
    return Ranges(
        [tf.minimum(start, last) for start in starts],
        [tf.maximum(r, 1) if e else r for r, e in zip(true, may_be_empty)],
        list(true),
        list(may_be_empty),
    )


def row_count(x: Any, device: str) -> Any:
    """How many rows a tensor has: a Python int, or an int32 scalar."""
    static = x.shape[0]
    return _count(x, device) if static is None else static


def _count(x: Any, device: str) -> tf.Tensor:
    """How many rows, an int32 scalar that no host waits for."""
    if isinstance(x, tf.Tensor):
        return tf.shape(x)[0]  # a GPU's kernels for this are the host's, too
    with on_host(device):
        rows = x.nrows() if isinstance(x, tf.RaggedTensor) else x.dense_shape[0]
        return tf.cast(rows, tf.int32)


def _ends(total: Any, shares: tuple[float, ...]) -> list[Any]:
    """Where each shard ends: Python ints, or int32 scalars."""
    cumulative = np.cumsum(np.asarray(shares, np.float64))
    last = _last_with_share(shares)
    ends: list[Any]
    if isinstance(total, int):
        ends = [int(e) for e in np.floor(total * cumulative / cumulative[-1])]
    else:
        exact = tf.cast(total, tf.float64) * cumulative / cumulative[-1]
        ends = tf.unstack(tf.cast(tf.floor(exact), tf.int32))
    # No rounding may lose the last row.
    return ends[:last] + [total] * (len(shares) - last)


def _last_with_share(shares: tuple[float, ...]) -> int:
    return max(i for i, share in enumerate(shares) if share > 0)


def _true_rows(x: tf.Tensor, rows: tf.Tensor) -> tf.Tensor:
    """A tower's values, without those of a spare row."""
    if x.shape.rank == 0:
        return drop(x, rows > 0)
    return x[: tf.minimum(rows, 1) * tf.shape(x)[0]]


def drop(gradient: Any, keep: tf.Tensor) -> Any:
    """Nothing of `gradient` unless `keep`, whatever it holds: 0 * NaN is NaN."""
    if isinstance(gradient, tf.IndexedSlices):
        # No `tf.where`, which a GPU computes in its own memory.
        with tf.device(host_of(keep.device)):
            once = tf.cast(keep, tf.int32)
        count = once * tf.shape(gradient.indices)[0]
        return tf.IndexedSlices(
            gradient.values[:count],
            gradient.indices[:count],
            gradient.dense_shape,
        )
    # As in `total`.
    return tf.compat.v1.where(keep, gradient, tf.zeros_like(gradient))


def total(
    gradients: Sequence[Any], kept: Sequence[tf.Tensor | None] = ()
) -> Any:
    """The sum of gradients; `tf.IndexedSlices` stay sparse.

    Of three terms or more TensorFlow's optimizer makes one `AddN`, and for its
    sake simulates the memory of the whole graph and takes it apart again: of
    eight towers of a ResNet-50, a third of the first step. So each sum is kept
    apart from the next, by the `keep` or by `kept_apart`, which cost nothing:
    both pass on the tensor that they are given.

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
            result = kept_apart(more)
        else:
            # The v1 op passes on what it chooses when the condition is scalar.
            result = tf.compat.v1.where(keep, more, result)
    return result
