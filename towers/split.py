"""split: one batch into one shard per tower, on the input device."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from towers.own_gradient import own_gradient
from towers.placement import Placement, check_placement


@dataclasses.dataclass(frozen=True)
class Shards:
    """A split batch.

    Attributes:
      fed: one nest per tower; an empty shard holds one spare row, because
        many kernels fail or give NaN on none.
      true: one nest per tower of exactly its rows, maybe 0.
      rows: int32 [n_towers], the rows of each true shard.
      may_be_empty: whether a tower's shard can have no rows.
    """

    fed: list[Any]
    true: list[Any]
    rows: tf.Tensor
    may_be_empty: list[bool]


def split_batch(batch: Any, placement: Placement) -> list[Any]:
    """Slices a batch by the towers' weights, on the input device.

    Tower i gets the rows from `floor(rows * cumsum(weights)[i - 1] /
    sum(weights))` up to the same with i. The gradient is concatenated on the
    input device. In eager code this builds and runs a graph.

    >>> placement = towers.Placement(["/CPU:0", "/CPU:1"], weights=[3, 1])
    >>> [shard.shape[0] for shard in towers.split_batch(tf.ones([9, 2]),
    ...                                                 placement)]
    [6, 3]

    Args:
      batch: a nest of dense tensors, each [rows, ...] with the same rows.
      placement: says how many towers, their weights and the input device.

    Returns:
      A list of nests like `batch`, one per tower, each leaf [shard rows, ...].

    Raises:
      TypeError: a leaf is not dense, or `placement` is no `Placement`.
      ValueError: a leaf is a scalar, or the rows disagree.
    """
    check_placement(placement)
    batch = checked_batch(batch)

    def split(batch: Any) -> list[Any]:
        return split_shards(batch, placement).true

    return in_graph(split, batch)


def split_shards(batch: Any, placement: Placement) -> Shards:
    """As `split_batch`, in a graph, with all that towers need to know."""
    leaves = [x for x in tf.nest.flatten(batch) if x is not None]
    n = len(placement.devices)
    with tf.device(placement.input_device), tf.name_scope("split"):
        known = next(
            (x.shape[0] for x in leaves if x.shape[0] is not None), None
        )
        total = tf.shape(leaves[0])[0] if known is None else known
        checks = [
            tf.debugging.assert_equal(
                tf.shape(x)[0],
                total,
                message="The inputs' rows disagree: every leaf of `inputs` "
                "must have the same number of rows.",
            )
            for x in leaves
            if x.shape[0] is None and len(leaves) > 1
        ]
        with tf.control_dependencies([c for c in checks if c is not None]):
            if known is None:
                total = tf.identity(total)
        ends = _ends(total, placement.shares)
        starts = [0, *ends[:-1]]
        rows = [end - start for start, end in zip(starts, ends)]
        if known is None:
            may_be_empty = [True] * n
            # The last tower with a share gets at least one row of any batch.
            may_be_empty[_last_with_share(placement.shares)] = False
            # An empty tower borrows a row of the batch.
            starts = [
                tf.clip_by_value(start, 0, tf.maximum(total - 1, 0))
                for start in starts
            ]
            fed_rows = [
                tf.maximum(r, tf.minimum(total, 1)) if empty else r
                for r, empty in zip(rows, may_be_empty)
            ]
        else:
            may_be_empty = [r == 0 for r in rows]
            starts = [min(start, max(total - 1, 0)) for start in starts]
            fed_rows = [max(r, min(total, 1)) for r in rows]

        def shards(leaf: Any) -> tuple[list[Any], list[Any]]:
            if leaf is None:
                return [None] * n, [None] * n
            fed = _slices(leaf, starts, fed_rows, rows, placement.input_device)
            true = [
                x[:r] if empty else x
                for x, r, empty in zip(fed, rows, may_be_empty)
            ]
            return fed, true

        flat = [shards(leaf) for leaf in tf.nest.flatten(batch)]

        def tower(kind: int, i: int) -> Any:
            return tf.nest.pack_sequence_as(batch, [x[kind][i] for x in flat])

        return Shards(
            [tower(0, i) for i in range(n)],
            [tower(1, i) for i in range(n)],
            tf.stack([tf.cast(r, tf.int32) for r in rows]),
            may_be_empty,
        )


def checked_batch(batch: Any, argument: str = "inputs") -> Any:
    """The batch as dense tensors whose rows agree, where that is known."""

    def convert(path_index: int, value: Any) -> Any:
        where = f"`{argument}`" + (
            f" (leaf {path_index})" if path_index or nested else ""
        )
        if value is None:
            return None
        if isinstance(value, (tf.RaggedTensor, tf.SparseTensor)):
            raise TypeError(
                f"{where} must be a dense tensor; got a "
                f"{type(value).__name__}. Make it dense with to_tensor() or "
                "tf.sparse.to_dense."
            )
        try:
            tensor = tf.convert_to_tensor(value)
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"{where} must be a tensor or an array; got {value!r}."
            ) from error
        if tensor.shape.rank is None or tensor.shape.rank == 0:
            raise ValueError(
                f"{where} must have a first axis of rows to split; got shape "
                f"{tensor.shape}. Give each row its own value, as with "
                "tf.repeat, or close over it."
            )
        return tensor

    nested = tf.nest.is_nested(batch)
    flat = [convert(i, x) for i, x in enumerate(tf.nest.flatten(batch))]
    if not any(x is not None for x in flat):
        raise ValueError(
            f"`{argument}` must hold at least one tensor; got {batch!r}."
        )
    rows = [x.shape[0] for x in flat if x is not None]
    if len({r for r in rows if r is not None}) > 1:
        raise ValueError(
            f"All leaves of `{argument}` must have the same number of rows; "
            f"got {rows}. Pass inputs whose first axes agree."
        )
    return tf.nest.pack_sequence_as(batch, flat)


def in_graph(function: Callable[..., Any], *args: Any) -> Any:
    """Calls `function`, in a graph of its own when the caller is eager."""
    if not tf.executing_eagerly():
        return function(*args)
    return tf.function(function, autograph=False)(*args)


def _slices(
    leaf: tf.Tensor,
    starts: list[Any],
    fed_rows: list[Any],
    rows: list[Any],
    device: str,
) -> list[tf.Tensor]:
    """Slices whose gradient is one concat, without the spare rows."""

    @own_gradient
    def slices(leaf: tf.Tensor) -> Any:
        rest = [-1] * (leaf.shape.rank - 1)
        zeros = [0] * (leaf.shape.rank - 1)
        shards = [
            tf.slice(leaf, [start, *zeros], [count, *rest])
            for start, count in zip(starts, fed_rows)
        ]

        for shard, count in zip(shards, fed_rows):
            known = count if isinstance(count, int) else None
            shard.set_shape([known, *leaf.shape[1:]])

        def backward(*upstream: tf.Tensor) -> tf.Tensor:
            with tf.device(device):
                return tf.concat([g[:r] for g, r in zip(upstream, rows)], 0)

        return shards, backward

    return slices(leaf)


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
