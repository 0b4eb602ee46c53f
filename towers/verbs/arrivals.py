"""arrivals: shards that are on their towers before the step that takes them.

A batch can be split, and sent, while the step before it runs; or its shards were
read where the towers are. The step gets both, the batch and its shards: where it
would split that batch, it takes these.
"""

import collections
import contextlib
import contextvars
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import tensorflow as tf

from towers.foreign.patches import bound
from towers.placement.placement import Placement
from towers.verbs.batch import Batch
from towers.verbs.rows import Ranges


class Arrivals:
    """The shards of a batch, each on its tower's device.

    Args:
      batch: what was split, or is joined from the shards if somebody asks.
      placement: by which.
      shards: one nest like that of `batch` per tower, as they are fed.
      ranges: which rows of the batch those are, if the placement's shares do not
        tell, as each tower has read its own.
    """

    def __init__(
        self,
        batch: Batch,
        placement: Placement,
        shards: Sequence[Any],
        ranges: Ranges | None = None,
    ):
        self.ranges = ranges
        leaves = tf.nest.flatten(batch.nest)
        columns = zip(*(tf.nest.flatten(shard) for shard in shards))
        self._placement = placement
        # With the leaf, as an id is of nothing that is gone.
        self._columns = {
            id(leaf): (leaf, whole, list(column))
            for leaf, whole, column in zip(leaves, batch.whole, columns)
            if leaf is not None
        }
        self._left = set(self._columns)
        self._places = {
            id(leaf): k for k, leaf in enumerate(leaves) if leaf is not None
        }
        self._takes: collections.Counter[int] = collections.Counter()
        self._casts: dict[int, list[tf.DType]] = collections.defaultdict(list)

    @property
    def halves(self) -> Mapping[int, tf.DType]:
        """By place, the half dtype to which all who take a leaf cast it."""
        return {
            self._places[leaf]: casts[0]
            for leaf, casts in self._casts.items()
            if len(casts) == self._takes[leaf] and len(set(casts)) == 1
        }

    @property
    def are_taken(self) -> bool:
        """Whether each of them was asked for."""
        return not self._left

    def are_taken_of(self, leaves: Sequence[Any]) -> bool:
        """Whether each of these was asked for."""
        return not any(id(leaf) in self._left for leaf in leaves)

    def take(
        self, leaf: Any, whole: bool, placement: Placement
    ) -> list[Any] | None:
        """Each tower's part of a leaf, or None if that was not split so."""
        _, was_whole, column = self._columns.get(id(leaf), (None, None, None))
        if was_whole is not whole or not self.fits(placement):
            return None
        self._left.discard(id(leaf))
        self._takes[id(leaf)] += 1
        return column

    def note_cast(self, leaf: Any, half: tf.DType) -> None:
        """Notes that who takes a leaf makes nothing of it but a cast."""
        self._casts[id(leaf)].append(half)

    def fits(self, placement: Placement) -> bool:
        """Whether the shards are those of this placement."""
        return placement == self._placement

    def has_one_of(self, leaves: Sequence[Any]) -> bool:
        """Whether a leaf is one of this batch."""
        return any(id(leaf) in self._columns for leaf in leaves)


_now: contextvars.ContextVar[Arrivals | None] = contextvars.ContextVar(
    "arrivals", default=None
)


@contextlib.contextmanager
def arriving(arrivals: Arrivals) -> Iterator[None]:
    """While open, what is split and has arrived is not split again."""
    with bound(_now, arrivals):
        yield


def arrived(leaf: Any, whole: bool, placement: Placement) -> list[Any] | None:
    """Each tower's part of a leaf, on its device, or None if it is not there."""
    arrivals = _now.get()
    return None if arrivals is None else arrivals.take(leaf, whole, placement)


def are_sent_ahead() -> bool:
    """Whether what has arrived was sent here, and not read here."""
    arrivals = _now.get()
    return arrivals is not None and arrivals.ranges is None


def note_cast(leaf: Any, half: tf.DType) -> None:
    """Notes that towers make nothing of a leaf that has arrived but a cast."""
    arrivals = _now.get()
    if arrivals is not None:
        arrivals.note_cast(leaf, half)


def own_ranges(leaves: Sequence[Any], placement: Placement) -> Ranges | None:
    """Which rows of these leaves towers have read, each its own; None if they
    are to be cut by the placement's shares."""
    arrivals = _now.get()
    if arrivals is None or not arrivals.has_one_of(leaves):
        return None
    return arrivals.ranges if arrivals.fits(placement) else None


def are_read_there() -> bool:
    """Whether towers have read the batch of this step, each its own rows."""
    return own_rows() is not None


def own_rows() -> Any:
    """How many rows a batch has that towers have read; None if it is no such."""
    arrivals = _now.get()
    if arrivals is None or arrivals.ranges is None:
        return None
    return sum(arrivals.ranges.true)
