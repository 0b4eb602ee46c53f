"""split: one batch into one shard per tower, on the input device."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tensorflow as tf

from towers.engine.draws import Place
from towers.engine.graphs import as_graphs
from towers.engine.host import host_of, on_host
from towers.placement.device_names import same_device
from towers.placement.placement import Placement, check_placement
from towers.verbs.arrivals import (
    are_sent_ahead,
    arrived,
    note_cast,
    own_ranges,
)
from towers.verbs.batch import Batch, checked_batch
from towers.verbs.departures import departing_first
from towers.verbs.handing_out import sent_narrow
from towers.verbs.relays import Relays, units_of
from towers.verbs.replicate import FULL
from towers.verbs.rows import Ranges, Rows, ranges_of, row_count, row_ranges
from towers.verbs.scatter import (
    first_rows,
    narrow_copies,
    scatter,
    whole_copies,
)


@dataclasses.dataclass(frozen=True)
class Shards:
    """A split batch.

    Attributes:
      fed: one nest per tower; an empty shard holds one spare row, because
        many kernels fail or give NaN on none.
      true: one nest per tower of exactly its rows, maybe 0; or None.
      rows: how many those are.
      ranges: which rows those are.
      divided: for each leaf whether it is split by rows, or whole.
      here: by place, of the batch, those leaves that are on the towers already.
      relayed: by place, of whole leaves that cross to a machine once: gives each
        tower's copy where it has crossed in a half dtype.
    """

    fed: list[Any]
    true: list[Any] | None
    rows: Rows
    ranges: Ranges
    divided: list[bool]
    here: Mapping[int, Any] = dataclasses.field(default_factory=dict)
    relayed: Mapping[int, Callable[[tf.DType], list[Any]]] = dataclasses.field(
        default_factory=dict
    )

    def crossing(
        self, devices: Sequence[str], predicate: Callable[[Any], bool]
    ) -> set[int]:
        """Which leaves go to a tower's device from another, or were sent ahead.

        Args:
          devices: the towers'.
          predicate: which leaves are asked about, as they are fed.
        """
        ahead = are_sent_ahead()
        return {
            k
            for shard, device in zip(self.fed, devices)
            for k, leaf in enumerate(tf.nest.flatten(shard))
            if predicate(leaf)
            and (
                ahead
                if k in self.here
                else not same_device(leaf.device, device)
            )
        }

    def narrowed(
        self, halves: Mapping[int, tf.DType], devices: Sequence[str]
    ) -> "Shards":
        """With what crosses to towers in half dtypes, as wide there as before.

        Args:
          halves: by leaf, in which.
          devices: the towers'.
        """
        if not halves:
            return self

        each = [tf.nest.flatten(shard) for shard in self.fed]
        with tf.name_scope("split"):
            for k, half in halves.items():
                relayed = self.relayed.get(k)
                copies = None if relayed is None else relayed(half)
                for i, (flat, device) in enumerate(zip(each, devices)):
                    if copies is not None:
                        flat[k] = copies[i]
                    elif k not in self.here and not same_device(
                        flat[k].device, device
                    ):
                        flat[k] = sent_narrow(flat[k], half, device)
        fed = list(map(tf.nest.pack_sequence_as, self.fed, each))
        return dataclasses.replace(self, fed=fed)

    def note_casts(self, halves: Mapping[int, tf.DType]) -> None:
        """Tells who sends ahead of what may come in half dtypes, by leaf."""
        for k, leaf in self.here.items():
            if k in halves:
                note_cast(leaf, halves[k])

    def places(self) -> list[Place]:
        """Where in the batch each tower's rows are."""
        ranges = self.ranges
        total = sum(ranges.true) if ranges.are_known else self.rows.counts
        return [
            Place(i, start, fed, total)
            for i, (start, fed) in enumerate(zip(ranges.starts, ranges.fed))
        ]


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
    checked = checked_batch(batch, whole=whole)

    def split(nest: Any) -> list[Any] | None:
        return split_shards(Batch(nest, checked.whole), placement, True).true

    return in_graph(split, checked.nest)


def split_shards(
    batch: Batch, placement: Placement, handed_out: bool = False
) -> Shards:
    """As `split_batch`, in a graph, with all that towers need to know.

    What is handed out besides are the true shards.
    """
    flat, n = tf.nest.flatten(batch.nest), len(placement.devices)
    device, places = placement.input_device, placement.devices
    divided = [x for x, w in zip(flat, batch.whole) if x is not None and not w]
    with tf.device(device), tf.name_scope("split"):
        ranges = own_ranges(divided, placement) or row_ranges(
            divided, placement.shares, device
        )
        with on_host(device):
            counts = tf.stack([tf.cast(r, tf.int32) for r in ranges.true])
        rows = Rows(counts, ranges.may_be_empty)
        kept, relays = functools.cache(rows.kept), Relays()
        kept(device)
        there = [arrived(x, w, placement) for x, w in zip(flat, batch.whole)]

        def parts(
            leaf: Any, undivided: bool, there: list[Any] | None
        ) -> tuple[list[Any], list[Any]]:
            if leaf is None:
                return [None] * n, [None] * n
            if undivided:
                whole = there or whole_copies(
                    leaf, device, places, relays, kept
                )
                return whole, whole
            fed = there or scatter(leaf, ranges, device)
            if not handed_out:
                return fed, []
            true = [
                first_rows(x, r, where) if empty else x
                for x, r, empty, where in zip(
                    *(fed, ranges.true, ranges.may_be_empty),
                    places if there else [device] * n,
                )
            ]
            return fed, true

        columns = [parts(*each) for each in zip(flat, batch.whole, there)]

    def tower(kind: int, i: int) -> Any:
        return tf.nest.pack_sequence_as(
            batch.nest, [x[kind][i] for x in columns]
        )

    fed = [tower(0, i) for i in range(n)]
    return Shards(
        fed if any(there) else departing_first(fed, placement),
        [tower(1, i) for i in range(n)] if handed_out else None,
        rows,
        ranges,
        [not w for w in batch.whole],
        {k: leaf for k, leaf in enumerate(flat) if there[k]},
        {
            k: functools.partial(
                narrow_copies, leaf, device, places, relays, kept
            )
            for k, leaf in enumerate(flat)
            if batch.whole[k] and not there[k]
            if _is_relayed(leaf, device, places)
        },
    )


def _is_relayed(leaf: Any, device: str, places: Sequence[str]) -> bool:
    """Whether towers share what crosses of a leaf, which may be in half."""
    is_full = isinstance(leaf, tf.Tensor) and leaf.dtype == FULL
    return is_full and len(units_of(places, device)) < len(places)


def own_shards(
    batch: Batch, placement: Placement, handed_out: bool = False
) -> Shards:
    """What each tower has already, with all that towers need to know.

    Only the numbers of rows leave the towers, and these only where they are not
    known. No tower is without rows.
    """
    each = batch.each or []
    if len(each) != len(placement.devices):
        raise ValueError(
            f"`inputs` are of {len(each)} towers, but `placement` has "
            f"{len(placement.devices)}. Expected the placement that "
            "`batches` was given."
        )
    device = placement.input_device
    problem = (
        "`inputs` of each tower must have at least one row, the same number in "
        "all leaves. Leave out batches without rows by `filter` of the dataset. "
        "Rows of each tower, -1 where leaves disagree:"
    )
    with tf.name_scope("split"):
        true = [
            _own_rows(nest, batch.whole, host_of(where))
            for nest, where in zip(each, placement.devices)
        ]
        if any(isinstance(r, int) and r < 1 for r in true):
            raise ValueError(f"{problem} {true}.")
        with tf.device(device), on_host(device):
            counts = tf.stack([tf.cast(r, tf.int32) for r in true])
            # One for all: TensorFlow has each assertion wait for the last.
            check = tf.debugging.Assert(
                tf.reduce_all(counts > 0),
                [problem, counts],
                summarize=len(true),
            )
            with tf.control_dependencies([] if check is None else [check]):
                counts = tf.identity(counts)
            here = [
                r if isinstance(r, int) else counts[i]
                for i, r in enumerate(true)
            ]
            ranges = ranges_of(here, [False] * len(here))
    own, rows = list(each), Rows(counts, ranges.may_be_empty)
    return Shards(own, own, rows, ranges, [not w for w in batch.whole])


def _own_rows(nest: Any, whole: Sequence[bool], device: str) -> Any:
    """How many rows a tower's own nest has; -1 if its leaves disagree."""
    flat = tf.nest.flatten(nest)
    divided = [x for x, w in zip(flat, whole) if x is not None and not w]
    with tf.device(device):
        counts = [row_count(x, device) for x in divided]
        if all(isinstance(count, int) for count in counts):
            return counts[0]  # as all are, see `checked_batch`
        if len(counts) == 1:
            return counts[0]
        alike = tf.reduce_all(tf.equal(tf.stack(counts), counts[0]))
        return tf.where(alike, counts[0], -1)


def in_graph(function: Callable[..., Any], *args: Any) -> Any:
    """Calls `function`, in a graph of its own when the caller is eager."""
    if not tf.executing_eagerly():
        return function(*args)
    with as_graphs():
        return tf.function(function, autograph=False)(*args)
