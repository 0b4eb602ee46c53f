"""sources: what a tower is given, of which it makes all that it computes."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from towers.engine import boundary


@dataclasses.dataclass(frozen=True)
class Sources:
    """What the tensors of one tower are made of, in its graph.

    Attributes:
      copies: of each variable of the model.
      shard: the nest of its inputs.
      divided: for each leaf of that whether it is of the tower's rows, or whole.
      located: where these are in the batch, see `draws.located`; None where no
        tensor tells.
      drawn: what the tower has drawn for its rows, as a `row_sums.Judge` takes it.
    """

    copies: Sequence[tf.Tensor]
    shard: Any
    divided: Sequence[bool]
    located: tf.Tensor | None = None
    drawn: Sequence[tuple[tf.Tensor, int, int]] = ()

    @property
    def own(self) -> list[Any]:
        """The leaves of the shard that are of the tower's rows, and not whole."""
        flat = zip(tf.nest.flatten(self.shard), self.divided)
        return [leaf for leaf, mine in flat if mine and leaf is not None]

    @property
    def rows(self) -> list[tf.Tensor]:
        """Their tensors."""
        return boundary.tensors_of(self.own)
