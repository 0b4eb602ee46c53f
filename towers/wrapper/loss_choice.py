"""loss_choice: where `loss_on_towers="auto"` computes the loss.

On the towers no output crosses: what a tower's backward pass needs of the others is
how many elements they count, which targets tell where no tower is beside the outputs
and predictions have no mask. But it is the plain model's loss only if that adds up
from rows, which is known of Keras's own (`row_losses`), and of no other's.
"""

from typing import Any

import keras
import tensorflow as tf

from towers.foreign import keras_compile
from towers.foreign.keras_layers import all_layers, is_keras_own
from towers.foreign.keras_saving import overridden
from towers.keras_model.row_losses import adds_up

# What Keras makes one that adds up, by the shapes of the outputs.
_BY_SHAPE = ("accuracy", "acc", "crossentropy", "ce")


def check_loss_on_towers(choice: Any) -> None:
    """Raises if this argument of a `TowerModel` is unknown."""
    if choice not in (True, False, "auto"):
        raise ValueError(
            f"`loss_on_towers` must be True, False or 'auto'; got {choice!r}."
        )


def belongs_on_towers(model: Any) -> bool:
    """Whether the loss of a compiled `TowerModel` is cheapest on its towers.

    Decided by what it was compiled with, before anything of that is built.
    """
    placement = model.placement
    arguments = keras_compile.compile_arguments(model)
    usual = (
        placement.devices[0]
        if callable(placement.parameter_device)
        else placement.parameter_device
    )
    remote = any(x != placement.output_device for x in placement.devices)
    metrics = tf.nest.flatten(
        [arguments["metrics"], arguments["weighted_metrics"]]
    )
    losses = [x for x in tf.nest.flatten(arguments["loss"]) if x is not None]
    return (
        remote
        and placement.output_device == usual  # else somebody wants it there
        and model.merge == "concat"
        and not arguments["run_eagerly"]
        and bool(losses)
        and all(_adds_up(x, keras.losses) for x in losses)
        and all(
            x is None
            or (isinstance(x, str) and x in _BY_SHAPE)
            or _adds_up(x, keras.metrics)
            for x in metrics
        )
    )


def tells_its_outputs(model: keras.Model) -> bool:
    """Whether it is known that a model makes the shapes that it says.

    Keras's own layers do, but that of text: a row of one text, made a vector, has
    an axis less than it says. So does a layer which is not asked but called.
    """
    methods = ("compute_output_shape", "compute_output_spec")
    return not any(
        isinstance(x, keras.layers.TextVectorization)
        or (
            not is_keras_own(x)
            and not isinstance(x, keras.Model)
            and overridden(x, methods, keras.Layer)
        )
        for x in all_layers(model)
    )


def _adds_up(one: Any, module: Any) -> bool:
    """Whether a loss or a metric, or what its name says, is known to add up."""
    if isinstance(one, str):
        try:
            one = module.get(one)
        except ValueError:  # unknown: Keras will say so
            return False
    return adds_up(one) is True


def have_feature_axes(outputs: Any) -> bool:
    """Whether the last axis of no output is that of rows.

    Args:
      outputs: a nest of `KerasTensor`s or specs.
    """
    return all(len(x.shape) > 1 for x in tf.nest.flatten(outputs))
