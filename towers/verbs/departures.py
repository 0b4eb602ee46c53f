"""departures: what other devices wait for leaves before a tower starts here.

TensorFlow runs what is ready in an order of its own. A device that has a tower,
and parameters or shards of other towers too, may compute first and send then, and
the others idle: with one thread it does. So its tower waits for what it sends to
be made, which takes next to no time.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow as tf

from towers.placement.device_names import same_device

# What may be between a value and the tensor in which it crossed.
_CARRIERS = ("Identity", "IdentityN", "Reshape", "SplitV")


def after_departures(
    shards: Sequence[Any], copies: Sequence[Any], devices: Sequence[str]
) -> list[Any]:
    """Shards that are there when what leaves their device for others is.

    Args:
      shards: a nest of tensors per tower.
      copies: further tensors that each tower is given.
      devices: each tower's.
    """
    waiting = []
    for shard, device in zip(shards, devices):
        leaving = {
            x.name: x
            for other, *given in zip(devices, shards, copies)
            if not same_device(other, device)
            for leaf in tf.nest.flatten(given, expand_composites=True)
            if leaf is not None
            for x in _left(leaf, other)
            if same_device(x.device, device)
        }
        if leaving:
            with tf.control_dependencies(leaving.values()), tf.device(device):
                shard = tf.nest.map_structure(
                    lambda x: x if x is None else tf.identity(x),
                    shard,
                    expand_composites=True,
                )
        waiting.append(shard)
    return waiting


def _left(tensor: tf.Tensor, device: str) -> Iterator[tf.Tensor]:
    """In what a tensor has crossed to a device."""
    known = {tensor.name}
    waiting = [tensor]
    while waiting:
        one = waiting.pop()
        if not same_device(one.device, device):
            yield one
        elif one.op.type in _CARRIERS:
            new = [x for x in one.op.inputs if x.name not in known]
            known.update(x.name for x in new)
            waiting += new
