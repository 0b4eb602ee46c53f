"""brought: what a layer is given, on the device that it runs on."""

from typing import Any

import tensorflow as tf

from towers.foreign import keras_layers
from towers.foreign.tf_ancestry import identities


def brought(arguments: Any) -> Any:
    """Tensors on the current device, from where they were made.

    A tower takes an identity of what it is given; what the tower does not
    need itself should not go by way of it.
    """

    def bring(value: Any) -> Any:
        if not isinstance(value, tf.Tensor):
            return value
        notes = keras_layers.get_notes(value)
        *_, first = identities(value)
        value = tf.identity(first)
        keras_layers.set_notes(value, notes)
        return value

    return tf.nest.map_structure(bring, arguments)
