"""arrivals: shards that are on their towers before the step that takes them.

A batch can be split, and sent, while the step before it runs. The step gets both,
the batch and its shards: where it would split that batch, it takes these.
"""

import contextlib
import contextvars
from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow as tf

from towers.foreign.patches import bound
from towers.placement.placement import Placement
from towers.verbs.batch import Batch


class Arrivals:
    """The shards of a batch, each on its tower's device.

    Args:
      batch: what was split.
      placement: by which.
      shards: one nest like that of `batch` per tower, as they are fed.
    """

    def __init__(
        self, batch: Batch, placement: Placement, shards: Sequence[Any]
    ):
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

    @property
    def are_taken(self) -> bool:
        """Whether each of them was asked for."""
        return not self._left

    def take(
        self, leaf: Any, whole: bool, placement: Placement
    ) -> list[Any] | None:
        """Each tower's part of a leaf, or None if that was not split so."""
        _, was_whole, column = self._columns.get(id(leaf), (None, None, None))
        if was_whole is not whole or placement != self._placement:
            return None
        self._left.discard(id(leaf))
        return column


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
