"""whole_call: a model called as plain Keras calls it, on specs of a whole batch.

Nothing is run. It tells what the model makes of other rows than a tower's, and
what Keras says of inputs that it does not take: of the shape that was given.
"""

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from towers.foreign.keras_layers import all_layers
from towers.keras_model import checks
from towers.keras_model.attributes import as_before

# Where an error may have a tower's name, though it is none of ours.
_NAMES = re.compile(r"tower_\d+|File \"[^\"]*\"|\{\{node .*?\}\}")


def told(
    model: keras.Layer,
    inputs: Any,
    specs: Sequence[Any],
    training: bool | None,
    call: Callable[..., Any] | None,
    tell: Callable[[Any], Any],
) -> list[Any]:
    """What `tell` says of each flat output of a model, called once more.

    Unlike `compute_output_spec` this calls it as towers do: with the phase, and
    with the casts of mixed precision.

    Args:
      model: a model, or a layer that is called by itself.
      inputs: a nest like those of the call.
      specs: one for each leaf, or None.
      training: the phase.
      call: how the model is called, if there is more to it.
      tell: of a tensor in the graph of the call.
    """
    return checks.eagerly(
        lambda: _traced(model, inputs, specs, training, call, tell)
    )


@contextlib.contextmanager
def refused_as_given(
    model: keras.Layer,
    inputs: Any,
    training: bool | None,
    call: Callable[..., Any] | None,
) -> Iterator[None]:
    """While open, what Keras refuses in a tower it refuses of the whole batch.

    Args:
      model: a model, or a layer that is called by itself.
      inputs: the batch that was given.
      training, call: as for `told`.

    Raises:
      Exception: what the model raises, of the shape of a batch and not of a shard.
    """
    try:
        yield
    except Exception as error:
        if "tower" not in _NAMES.sub("", str(error)).lower():
            _raise_again(error, model, inputs, training, call)
        raise


def _raise_again(
    error: Exception, model: keras.Layer, inputs: Any, training: Any, call: Any
) -> None:
    """Raises an error as the plain model has it, if that has it too."""
    specs = [
        None if x is None else tf.type_spec_from_value(x)
        for x in tf.nest.flatten(inputs)
    ]
    try:
        told(model, inputs, specs, training, call, lambda _: None)
    except type(error) as plain:
        raise plain from None
    except Exception:  # as it cannot be called so
        return


def _traced(
    model: keras.Layer,
    inputs: Any,
    specs: Sequence[Any],
    training: bool | None,
    model_call: Callable[..., Any] | None,
    tell: Callable[[Any], Any],
) -> list[Any]:
    said: list[Any] = []

    def call(*leaves: Any) -> None:
        given = iter(leaves)
        nest = tf.nest.pack_sequence_as(
            inputs, [None if s is None else next(given) for s in specs]
        )
        named = {} if training is None else {"training": training}
        with keras.StatelessScope():
            if model_call is not None:
                outputs = model_call(model, nest)
            else:
                outputs = model(nest, **named)
        said[:] = [
            None if y is None else tell(tf.convert_to_tensor(y))
            for y in tf.nest.flatten(outputs)
        ]

    with as_before(all_layers(model)):
        tf.function(call, autograph=False).get_concrete_function(
            *[spec for spec in specs if spec is not None]
        )
    return said
