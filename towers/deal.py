"""deal: each tower's rows of one tensor, dense, ragged or sparse."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from towers import replicate
from towers.own_gradient import own_gradient


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


def row_ranges(leaves: Sequence[Any], shares: tuple[float, ...]) -> Ranges:
    """Which rows each tower gets, by its share, of tensors of equal rows."""
    known = next((x.shape[0] for x in leaves if x.shape[0] is not None), None)
    total = _count(leaves[0]) if known is None else known
    checks = [
        tf.debugging.assert_equal(
            _count(x),
            total,
            message="The inputs' rows disagree: every leaf of `inputs` "
            "must have the same number of rows, or be named in `whole`.",
        )
        for x in leaves
        if x.shape[0] is None and len(leaves) > 1
    ]
    with tf.control_dependencies([c for c in checks if c is not None]):
        if known is None:
            total = tf.identity(total)
    ends = _ends(total, shares)
    starts = [0, *ends[:-1]]
    rows = [end - start for start, end in zip(starts, ends)]
    # An empty tower borrows a row of the batch.
    if known is not None:
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


def _count(x: Any) -> tf.Tensor:
    """How many rows, an int32 scalar."""
    if isinstance(x, tf.RaggedTensor):
        return tf.cast(x.nrows(), tf.int32)
    if isinstance(x, tf.SparseTensor):
        return tf.cast(x.dense_shape[0], tf.int32)
    return tf.shape(x)[0]


def deal(leaf: Any, ranges: Ranges, device: str) -> list[Any]:
    """Each tower's rows of one tensor; gradients are joined on `device`.

    Args:
      leaf: [rows, ...], dense, ragged or sparse.
      ranges: which rows each tower is fed.
      device: where to cut.
    """
    if isinstance(leaf, tf.RaggedTensor):
        return _ragged(leaf, ranges, device)
    if isinstance(leaf, tf.SparseTensor):
        return _sparse(leaf, ranges, device)
    return _dense(leaf, ranges, device)


def copies(leaf: Any, device: str, kept: Sequence[Any]) -> list[Any]:
    """The whole leaf for each tower; gradients are summed on `device`."""
    columns = [
        replicate.replicate(x, device, kept)
        for x in tf.nest.flatten(leaf, expand_composites=True)
    ]
    return [
        tf.nest.pack_sequence_as(leaf, list(parts), expand_composites=True)
        for parts in zip(*columns)
    ]


def first_rows(x: Any, rows: Any) -> Any:
    """The first rows of a tensor, dense, ragged or sparse."""
    if isinstance(x, tf.SparseTensor):
        size = tf.concat([[tf.cast(rows, tf.int64)], x.dense_shape[1:]], 0)
        return tf.sparse.slice(x, tf.zeros_like(size), size)
    return x[:rows]


def _dense(leaf: tf.Tensor, ranges: Ranges, device: str) -> list[tf.Tensor]:
    """Slices whose gradient is one concat, without the spare rows."""

    @own_gradient
    def slices(leaf: tf.Tensor) -> Any:
        rest = [-1] * (leaf.shape.rank - 1)
        zeros = [0] * (leaf.shape.rank - 1)
        shards = [
            tf.slice(leaf, [start, *zeros], [count, *rest])
            for start, count in zip(ranges.starts, ranges.fed)
        ]

        for shard, count in zip(shards, ranges.fed):
            known = count if isinstance(count, int) else None
            shard.set_shape([known, *leaf.shape[1:]])

        def backward(*upstream: tf.Tensor) -> tf.Tensor:
            with tf.device(device):
                return tf.concat(
                    [g[:r] for g, r in zip(upstream, ranges.true)], 0
                )

        return shards, backward

    with tf.device(device):
        return slices(leaf)


def _ragged(
    leaf: tf.RaggedTensor, ranges: Ranges, device: str
) -> list[tf.RaggedTensor]:
    """Rows of a ragged tensor: what they hold is one range of its values."""
    splits = tf.cast(leaf.row_splits, tf.int32)
    first = [splits[start] for start in ranges.starts]
    fed, true = (
        [
            splits[start + count] - begin
            for start, count, begin in zip(ranges.starts, counts, first)
        ]
        for counts in (ranges.fed, ranges.true)
    )
    inner = Ranges(first, fed, true, ranges.may_be_empty)
    length = leaf.uniform_row_length
    return [
        tf.RaggedTensor.from_uniform_row_length(values, length, nrows=count)
        if length is not None
        else tf.RaggedTensor.from_row_splits(
            values,
            leaf.row_splits[start : start + count + 1] - leaf.row_splits[start],
            validate=False,
        )
        for values, start, count in zip(
            deal(leaf.values, inner, device), ranges.starts, ranges.fed
        )
    ]


def _sparse(
    leaf: tf.SparseTensor, ranges: Ranges, device: str
) -> list[tf.SparseTensor]:
    """Rows of a sparse tensor, whose entries may be in any order."""
    row = leaf.indices[:, 0]
    starts = [tf.cast(start, tf.int64) for start in ranges.starts]
    counts = [tf.cast(count, tf.int64) for count in ranges.fed]
    entries = [
        tf.where((row >= start) & (row < start + count))[:, 0]
        for start, count in zip(starts, counts)
    ]

    @own_gradient
    def values(values: tf.Tensor) -> Any:
        def backward(*upstream: tf.Tensor) -> tf.Tensor:
            with tf.device(device):
                return tf.add_n(
                    [
                        tf.scatter_nd(
                            where[:, tf.newaxis],
                            g if not empty else replicate.drop(g, true > 0),
                            tf.shape(values, tf.int64),
                        )
                        for where, g, true, empty in zip(
                            entries, upstream, ranges.true, ranges.may_be_empty
                        )
                    ]
                )

        return [tf.gather(values, where) for where in entries], backward

    with tf.device(device):
        return [
            tf.SparseTensor(
                tf.gather(leaf.indices, where)
                - [start, *[0] * (len(leaf.shape) - 1)],
                shard,
                tf.concat([[count], leaf.dense_shape[1:]], 0),
            )
            for where, shard, start, count in zip(
                entries, values(leaf.values), starts, counts
            )
        ]


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
