"""scatter: each tower's rows of one tensor, dense, ragged or sparse."""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from towers.engine.host import on_host
from towers.foreign.tf_gradients import own_gradient
from towers.verbs.handing_out import widened
from towers.verbs.relays import Kept, Relays, replicate_between
from towers.verbs.rows import Ranges, drop


def scatter(leaf: Any, ranges: Ranges, device: str) -> list[Any]:
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


def whole_copies(
    leaf: Any, device: str, places: Sequence[str], relays: Relays, kept: Kept
) -> list[Any]:
    """The whole leaf for each tower; gradients are summed on `device`.

    Args:
      leaf: dense, ragged or sparse, on `device`.
      device: where it is.
      places: per tower, where it is wanted.
      relays: choose by which devices of other machines it goes.
      kept: by device, as for `replicate`.
    """
    columns = [
        replicate_between(x, device, places, relays, kept)
        for x in tf.nest.flatten(leaf, expand_composites=True)
    ]
    return [
        tf.nest.pack_sequence_as(leaf, list(parts), expand_composites=True)
        for parts in zip(*columns)
    ]


def narrow_copies(
    leaf: tf.Tensor,
    device: str,
    places: Sequence[str],
    relays: Relays,
    kept: Kept,
    half: tf.DType,
) -> list[tf.Tensor]:
    """As `whole_copies` of a float32 tensor, which cross in a half dtype."""
    sent = replicate_between(leaf, device, places, relays, kept, half)
    return [widened(x, leaf.dtype, place) for x, place in zip(sent, places)]


def first_rows(x: Any, rows: Any, device: str = "") -> Any:
    """The first rows of a tensor on a device, dense, ragged or sparse."""
    if isinstance(x, tf.SparseTensor):
        with on_host(device):  # a GPU has no kernel for it
            size = tf.concat([[tf.cast(rows, tf.int64)], x.dense_shape[1:]], 0)
            return tf.sparse.slice(x, tf.zeros_like(size), size)
    if isinstance(x, tf.RaggedTensor):
        with on_host(device):
            splits = x.row_splits[: rows + 1]
            count = tf.cast(splits[-1], tf.int32)
        return _partitioned(
            first_rows(x.values, count, device),
            splits,
            x.uniform_row_length,
            rows,
            device,
        )
    with tf.device(device):
        return x[:rows]


def _partitioned(
    values: Any, splits: tf.Tensor, length: Any, rows: Any, device: str
) -> tf.RaggedTensor:
    """Rows of values, all of one length if that is not None."""
    with on_host(device):
        if length is not None:
            return tf.RaggedTensor.from_uniform_row_length(
                values, length, nrows=rows
            )
        return tf.RaggedTensor.from_row_splits(values, splits, validate=False)


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
            static = count if isinstance(count, int) else None
            shard.set_shape([static, *leaf.shape[1:]])

        def backward(*upstream: Any) -> tf.Tensor:
            with tf.device(device):
                # Sparse where a tower has gathered rows by their numbers.
                dense = map(tf.convert_to_tensor, upstream)
                return tf.concat([g[:r] for g, r in zip(dense, ranges.true)], 0)

        return shards, backward

    with tf.device(device):
        return slices(leaf)


def _ragged(
    leaf: tf.RaggedTensor, ranges: Ranges, device: str
) -> list[tf.RaggedTensor]:
    """Rows of a ragged tensor: what they hold is one range of its values."""
    with on_host(device):
        splits = tf.cast(leaf.row_splits, tf.int32)
        first = [splits[start] for start in ranges.starts]
        fed, true = (
            [
                splits[start + count] - begin
                for start, count, begin in zip(ranges.starts, counts, first)
            ]
            for counts in (ranges.fed, ranges.true)
        )
        rows = [
            leaf.row_splits[start : start + count + 1] - leaf.row_splits[start]
            for start, count in zip(ranges.starts, ranges.fed)
        ]
    inner = Ranges(first, fed, true, ranges.may_be_empty)
    return [
        _partitioned(values, splits, leaf.uniform_row_length, count, device)
        for values, splits, count in zip(
            scatter(leaf.values, inner, device), rows, ranges.fed
        )
    ]


def _sparse(
    leaf: tf.SparseTensor, ranges: Ranges, device: str
) -> list[tf.SparseTensor]:
    """Rows of a sparse tensor, whose entries may be in any order."""
    with on_host(device):  # how many entries those are is not known before
        row = leaf.indices[:, 0]
        starts = [tf.cast(start, tf.int64) for start in ranges.starts]
        counts = [tf.cast(count, tf.int64) for count in ranges.fed]
        entries = [
            tf.where((row >= start) & (row < start + count))[:, 0]
            for start, count in zip(starts, counts)
        ]
        places = [
            tf.gather(leaf.indices, where)
            - [start, *[0] * (len(leaf.shape) - 1)]
            for where, start in zip(entries, starts)
        ]
        shapes = [
            tf.concat([[count], leaf.dense_shape[1:]], 0) for count in counts
        ]

    @own_gradient
    def values(values: tf.Tensor) -> Any:
        def backward(*upstream: tf.Tensor) -> tf.Tensor:
            with tf.device(device):
                return tf.add_n(
                    [
                        tf.scatter_nd(
                            where[:, tf.newaxis],
                            g if not empty else drop(g, true > 0),
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
            tf.SparseTensor(*parts)
            for parts in zip(places, values(leaf.values), shapes)
        ]
