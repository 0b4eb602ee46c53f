"""joined_batch: what towers have read, as one batch, where somebody asks for it."""

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from towers.engine.host import host_of
from towers.placement.placement import Placement
from towers.verbs.batch import Batch, whole_leaves
from towers.verbs.rows import Ranges
from towers.verbs.scatter import first_rows
from towers.wrapper.loss_on_towers import whole_of_data


def joined_batch(
    model: Any,
    towers: Sequence[Any],
    ranges: Ranges,
    inputs: bool = True,
    targets: bool = True,
) -> Batch:
    """What towers have, as one batch in their order.

    Inputs are joined where batches are split, and the rest beside the outputs.

    Args:
      model: a `TowerModel`.
      towers: what each has, and is fed: a nest as `fit` takes it.
      ranges: which rows of the batch those are.
      inputs, targets: whether inputs, and all else, are to be joined; or only
        stood for, by a part of no rows.
    """
    x, *_ = keras.utils.unpack_x_y_sample_weight(towers[0])
    placement = model.placement
    n, m = (len(tf.nest.flatten(nest)) for nest in (x, towers[0]))
    devices = [placement.input_device] * n
    devices += [str(placement.output_device)] * (m - n)
    are_joined = [inputs] * n + [targets] * (m - n)
    paths = whole_of_data(model)
    if x is towers[0]:
        paths = [path[1:] for path in paths]
    whole = whole_leaves(towers[0], paths)
    columns = zip(*map(tf.nest.flatten, towers))
    joined = [
        column[0]
        if column[0] is None or undivided
        else _joined(column, ranges, device, placement)
        if joins
        else _no_rows(column[0], ranges, placement)
        for column, undivided, device, joins in zip(
            columns, whole, devices, are_joined
        )
    ]
    return Batch(tf.nest.pack_sequence_as(towers[0], joined), whole)


def _joined(
    column: Sequence[Any], ranges: Ranges, device: str, placement: Placement
) -> Any:
    parts = []
    for i, (part, where) in enumerate(zip(column, placement.devices)):
        host = host_of(where)
        with tf.device(host):
            empty = ranges.may_be_empty[i]
            parts.append(
                first_rows(part, ranges.true[i], host) if empty else part
            )
    is_text = parts[0].dtype == tf.string
    with tf.device(host_of(device) if is_text else device):
        if isinstance(parts[0], tf.SparseTensor):
            return tf.sparse.concat(0, parts)
        return tf.concat(parts, 0)


def _no_rows(part: Any, ranges: Ranges, placement: Placement) -> Any:
    """A part without its rows, of which TensorFlow does not know that."""
    host = host_of(placement.devices[0])
    with tf.device(host):
        return first_rows(part, tf.minimum(ranges.true[0], 0), host)
