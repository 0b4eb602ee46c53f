"""stand_ins: what towers get of a table of which they read rows, in its place.

It has no rows itself, and takes the table's sparse gradients back.
"""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from towers.foreign.tf_gradients import accessed, own_gradient
from towers.verbs.handing_out import open_rows
from towers.verbs.rows import total


def stand_ins(
    variable: tf.Variable, device: str, kept: Sequence[tf.Tensor | None]
) -> list[tf.Tensor]:
    """For each tower what it gets of a table; the gradients are summed there.

    Args:
      variable: the table.
      device: where it lives.
      kept: as for `replicate`.

    Returns:
      A list of tensors [0, width], of open rows, one per tower.
    """
    accessed(variable)

    def empty(_: tf.Tensor) -> Any:
        def backward(*upstream: Any) -> Any:
            with tf.device(device):
                return total([_sparse(g, variable) for g in upstream], kept)

        return [open_rows(variable)] * len(kept), backward

    with tf.device(device):
        return own_gradient(empty)(variable.handle)


def _sparse(gradient: Any, variable: tf.Variable) -> Any:
    """A table's gradient; of a tower that reads nothing a tape makes no rows."""
    if isinstance(gradient, tf.IndexedSlices):
        return gradient
    every = tf.range(tf.shape(gradient)[0])
    return tf.IndexedSlices(gradient, every, tf.constant([*variable.shape]))
