"""departures: shards leave for other devices before a tower starts here.

A device that has a tower, and cuts the batch for others too, may compute first
and send then, and the others idle: with one thread TensorFlow does, as it goes on
with what has just become ready, and looks after the rest when that has ended. What
becomes ready last is sent first: so all shards are cut before one is handed out,
and those of others are handed out after the device's own. A GPU computes and sends
side by side. What another machine has for its towers (`relays`) has left already.
"""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from towers.engine.boundary import tensors_of
from towers.engine.host import is_host
from towers.foreign.tf_gradients import own_gradient_of_each
from towers.placement.device_names import process_of, same_device
from towers.placement.placement import Placement


def departing_first(shards: Sequence[Any], placement: Placement) -> list[Any]:
    """Shards that leave the input device before the towers there start.

    Args:
      shards: a nest of tensors per tower, on the input device.
      placement: where they go.
    """
    device, devices = placement.input_device, placement.devices
    stays = [same_device(other, device) for other in devices]
    if all(stays) or not any(stays) or not is_host(device):
        return list(shards)
    with tf.device(device):
        cut = [
            x if stay else _same(x, device) for x, stay in zip(shards, stays)
        ]
        others = [x for x, stay in zip(cut, stays) if not stay]
        with tf.control_dependencies(_here(others, device)):
            cut = [
                _same(x, device) if stay else x for x, stay in zip(cut, stays)
            ]
        own = [x for x, stay in zip(cut, stays) if stay]
        with tf.control_dependencies(_here(own, device)):
            return [
                x if stay else _same(x, device) for x, stay in zip(cut, stays)
            ]


def _here(shards: Any, device: str) -> list[tf.Tensor]:
    """The shards' tensors that are on the machine of a device."""
    machine = process_of(device)
    return [x for x in tensors_of(shards) if process_of(x.device) == machine]


def _same(shard: Any, device: str) -> Any:
    """The shard, its local tensors behind ops that TensorFlow does not drop."""
    here = _here(shard, device)
    passed = own_gradient_of_each(
        lambda tensors: [tf.ensure_shape(x, x.shape) for x in tensors],
        lambda _, upstream: upstream,
        here,
    )
    instead = {id(x): same for x, same in zip(here, passed)}
    return tf.nest.map_structure(
        lambda x: instead.get(id(x), x), shard, expand_composites=True
    )
