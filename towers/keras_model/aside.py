"""aside: a call of a model that is not run, and of which layers keep nothing."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from towers.foreign import keras_layers
from towers.keras_model import checks
from towers.keras_model.attributes import as_before


def call_aside(
    call: Callable[..., None],
    layers: Sequence[keras.Layer],
    beside: Callable[[], Any],
    *specs: Any,
) -> None:
    """Traces a call, in a graph that is never run.

    What layers note in attributes and add as losses, and what it draws from the
    generators of Python and NumPy, is taken back. It is made in a thread of its own,
    as a layer may be in the middle of a call here, in a copy of that call's context.

    Args:
      call: of a model, in a graph.
      layers: those that it may call.
      beside: opens what other towers there are to it, see `all_towers`.
      *specs: nests of them, of its arguments.
    """

    def traced() -> None:
        with beside(), as_before(layers):
            for layer in layers:
                keras_layers.forget_added(layer)
            traces = tf.function(call, autograph=False)
            traces.get_concrete_function(*specs)

    checks.eagerly(keras_layers.carried(traced))
