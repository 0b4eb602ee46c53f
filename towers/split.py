"""split: one batch into one shard per tower, on the input device."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from towers import replicate
from towers.own_gradient import own_gradient
from towers.placement import Placement, check_placement


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


@dataclasses.dataclass(frozen=True)
class Shards:
    """A split batch.

    Attributes:
      fed: one nest per tower; an empty shard holds one spare row, because
        many kernels fail or give NaN on none.
      true: one nest per tower of exactly its rows, maybe 0.
      rows: int32 [n_towers], the rows of each true shard.
      ranges: which rows those are.
    """

    fed: list[Any]
    true: list[Any]
    rows: tf.Tensor
    ranges: Ranges

    @property
    def may_be_empty(self) -> list[bool]:
        """Whether a tower's shard can have no rows."""
        return self.ranges.may_be_empty


def split_batch(
    batch: Any, placement: Placement, whole: Sequence[Any] = ()
) -> list[Any]:
    """Slices a batch by the towers' weights, on the input device.

    Tower i gets the rows from `floor(rows * cumsum(weights)[i - 1] /
    sum(weights))` up to the same with i. The gradient is concatenated on the
    input device. In eager code this builds and runs a graph.

    >>> placement = towers.Placement(["/CPU:0", "/CPU:1"], weights=[3, 1])
    >>> [shard.shape[0] for shard in towers.split_batch(tf.ones([9, 2]),
    ...                                                 placement)]
    [6, 3]

    Args:
      batch: a nest of tensors, dense, ragged or sparse, of any dtype, each
        [rows, ...] with the same rows.
      placement: says how many towers, their weights and the input device.
      whole: keys of a dict, or positions in a list, of what is no batch and
        goes to every tower as it is, its gradients summed; a tuple of keys
        names what lies deeper in a nest.

    Returns:
      A list of nests like `batch`, one per tower, each leaf [shard rows, ...].

    Raises:
      TypeError: a leaf is no tensor, or `placement` is no `Placement`.
      ValueError: a leaf is a scalar, the rows disagree, or `whole` names what
        is not there.
    """
    check_placement(placement)
    batch = checked_batch(batch, whole=whole)

    def split(batch: Any) -> list[Any]:
        return split_shards(batch, placement, whole).true

    return in_graph(split, batch)


def split_shards(
    batch: Any, placement: Placement, whole: Sequence[Any] = ()
) -> Shards:
    """As `split_batch`, in a graph, with all that towers need to know."""
    flat, n = tf.nest.flatten(batch), len(placement.devices)
    device = placement.input_device
    undivided = whole_leaves(batch, whole)
    divided = [x for x, w in zip(flat, undivided) if x is not None and not w]
    with tf.device(device), tf.name_scope("split"):
        ranges = _ranges(divided, placement.shares)
        rows = tf.stack([tf.cast(r, tf.int32) for r in ranges.true])
        kept = replicate.keep_flags(rows, ranges.may_be_empty, device)

        def parts(leaf: Any, undivided: bool) -> tuple[list[Any], list[Any]]:
            if leaf is None:
                return [None] * n, [None] * n
            if undivided:
                return (_copies(leaf, device, kept),) * 2
            fed = deal(leaf, ranges, device)
            true = [
                _first_rows(x, r) if empty else x
                for x, r, empty in zip(fed, ranges.true, ranges.may_be_empty)
            ]
            return fed, true

        columns = [parts(x, w) for x, w in zip(flat, undivided)]

    def tower(kind: int, i: int) -> Any:
        return tf.nest.pack_sequence_as(batch, [x[kind][i] for x in columns])

    return Shards(
        [tower(0, i) for i in range(n)],
        [tower(1, i) for i in range(n)],
        rows,
        ranges,
    )


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


def whole_leaves(batch: Any, whole: Sequence[Any]) -> list[bool]:
    """For each leaf whether it goes to every tower whole.

    Raises:
      TypeError: `whole` is no list.
      ValueError: `whole` names something that the batch has not.
    """
    if isinstance(whole, str) or not isinstance(whole, Sequence):
        raise TypeError(
            "`whole` must be a list of names, or positions, of inputs that "
            f"every tower gets whole; got {whole!r}."
        )
    paths = [key if isinstance(key, tuple) else (key,) for key in whole]
    return tf.nest.flatten(_marked(batch, paths))


def _marked(batch: Any, paths: Sequence[tuple[Any, ...]]) -> Any:
    """A nest like `batch` of bools: whether a leaf is below one of `paths`."""
    if not paths or () in paths:
        return tf.nest.map_structure(lambda _: bool(paths), batch)
    children: dict[Any, Any] = {}
    if isinstance(batch, Mapping):
        children = dict(batch)
    elif isinstance(batch, (list, tuple)):
        children = dict(enumerate(batch))
    unknown = [path[0] for path in paths if path[0] not in children]
    if unknown:
        raise ValueError(
            f"`whole` names {unknown[0]!r}, but the inputs have "
            f"{list(children)}. Expected keys of a dict of inputs, or "
            "positions in a list; a tuple of those for what lies deeper."
        )
    marked = {
        key: _marked(child, [path[1:] for path in paths if path[0] == key])
        for key, child in children.items()
    }
    return marked if isinstance(batch, Mapping) else list(marked.values())


def checked_batch(
    batch: Any, argument: str = "inputs", whole: Sequence[Any] = ()
) -> Any:
    """The batch as tensors whose rows agree, where that is known."""

    def convert(path_index: int, value: Any, undivided: bool) -> Any:
        where = f"`{argument}`" + (
            f" (leaf {path_index})" if path_index or nested else ""
        )
        if value is None:
            return None
        tensor = value
        if not isinstance(value, (tf.RaggedTensor, tf.SparseTensor)):
            try:
                tensor = tf.convert_to_tensor(value)
            except (TypeError, ValueError) as error:
                raise TypeError(
                    f"{where} must be a tensor or an array; got {value!r}."
                ) from error
        if not undivided and not tensor.shape.rank:
            raise ValueError(
                f"{where} must have a first axis of rows to split; got shape "
                f"{tensor.shape}. Give each row its own value, as with "
                "tf.repeat, or name the input in `whole`, so that every tower "
                "gets it as it is."
            )
        return tensor

    nested = tf.nest.is_nested(batch)
    undivided = whole_leaves(batch, whole)
    flat = [
        convert(i, x, w)
        for i, (x, w) in enumerate(zip(tf.nest.flatten(batch), undivided))
    ]
    divided = [x for x, w in zip(flat, undivided) if x is not None and not w]
    if not divided:
        raise ValueError(
            f"`{argument}` must hold at least one tensor to split; got "
            f"{batch!r}."
        )
    rows = [x.shape[0] for x in divided]
    if len({r for r in rows if r is not None}) > 1:
        raise ValueError(
            f"All leaves of `{argument}` must have the same number of rows; "
            f"got {rows}. Pass inputs whose first axes agree, and name in "
            "`whole` those that are not batched."
        )
    return tf.nest.pack_sequence_as(batch, flat)


def in_graph(function: Callable[..., Any], *args: Any) -> Any:
    """Calls `function`, in a graph of its own when the caller is eager."""
    if not tf.executing_eagerly():
        return function(*args)
    return tf.function(function, autograph=False)(*args)


def _ranges(leaves: Sequence[Any], shares: tuple[float, ...]) -> Ranges:
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


def _copies(leaf: Any, device: str, kept: Sequence[Any]) -> list[Any]:
    """The whole leaf for each tower; gradients are summed on `device`."""
    columns = [
        replicate.replicate(x, device, kept)
        for x in tf.nest.flatten(leaf, expand_composites=True)
    ]
    return [
        tf.nest.pack_sequence_as(leaf, list(parts), expand_composites=True)
        for parts in zip(*columns)
    ]


def _first_rows(x: Any, rows: Any) -> Any:
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
