"""loss_choice: where `loss_on_towers="auto"` computes the loss.

On the towers no output crosses: what a tower's backward pass needs of the others is
how many elements they count, which targets tell where no tower is beside the outputs
and predictions have no mask. But it is the plain model's loss only if that adds up
from rows, which is known of Keras's own, and of no other's.
"""

from typing import Any

import keras
import tensorflow as tf

from towers.foreign import keras_compile

# Those of Keras that look at one row at a time, by exact type: a subclass may do
# anything. Circle looks at other rows, Dice and Tversky divide by all of them.
_LOSSES = (
    keras.losses.BinaryCrossentropy,
    keras.losses.BinaryFocalCrossentropy,
    keras.losses.CategoricalCrossentropy,
    keras.losses.CategoricalFocalCrossentropy,
    keras.losses.CategoricalHinge,
    keras.losses.CosineSimilarity,
    keras.losses.Hinge,
    keras.losses.Huber,
    keras.losses.KLDivergence,
    keras.losses.LogCosh,
    keras.losses.MeanAbsoluteError,
    keras.losses.MeanAbsolutePercentageError,
    keras.losses.MeanSquaredError,
    keras.losses.MeanSquaredLogarithmicError,
    keras.losses.Poisson,
    keras.losses.SparseCategoricalCrossentropy,
    keras.losses.SquaredHinge,
)
_METRICS = (
    keras.metrics.AUC,
    keras.metrics.Accuracy,
    keras.metrics.BinaryAccuracy,
    keras.metrics.BinaryCrossentropy,
    keras.metrics.CategoricalAccuracy,
    keras.metrics.CategoricalCrossentropy,
    keras.metrics.CategoricalHinge,
    keras.metrics.CosineSimilarity,
    keras.metrics.FalseNegatives,
    keras.metrics.FalsePositives,
    keras.metrics.Hinge,
    keras.metrics.KLDivergence,
    keras.metrics.LogCoshError,
    keras.metrics.MeanAbsoluteError,
    keras.metrics.MeanAbsolutePercentageError,
    keras.metrics.MeanSquaredError,
    keras.metrics.MeanSquaredLogarithmicError,
    keras.metrics.Poisson,
    keras.metrics.Precision,
    keras.metrics.Recall,
    keras.metrics.RootMeanSquaredError,
    keras.metrics.SparseCategoricalAccuracy,
    keras.metrics.SparseCategoricalCrossentropy,
    keras.metrics.SparseTopKCategoricalAccuracy,
    keras.metrics.SquaredHinge,
    keras.metrics.TopKCategoricalAccuracy,
    keras.metrics.TrueNegatives,
    keras.metrics.TruePositives,
)
# What Keras makes one of the above, by the shapes of the outputs.
_BY_SHAPE = ("accuracy", "acc", "crossentropy", "ce")
_REDUCTIONS = ("sum_over_batch_size", "mean", "sum")


def belongs_on_towers(model: Any) -> bool:
    """Whether the loss of a compiled `TowerModel` is cheapest on its towers.

    Decided by what it was compiled with, before anything of that is built.
    """
    placement, told = model.placement, keras_compile.compile_arguments(model)
    usual = (
        placement.devices[0]
        if callable(placement.parameter_device)
        else placement.parameter_device
    )
    remote = any(x != placement.output_device for x in placement.devices)
    metrics = tf.nest.flatten([told["metrics"], told["weighted_metrics"]])
    losses = [x for x in tf.nest.flatten(told["loss"]) if x is not None]
    return (
        remote
        and placement.output_device == usual  # else somebody wants it there
        and model.merge == "concat"
        and not told["run_eagerly"]
        and bool(losses)
        and all(_is_of_rows(x, keras.losses, _LOSSES) for x in losses)
        and all(
            x is None
            or (isinstance(x, str) and x in _BY_SHAPE)
            or _is_of_rows(x, keras.metrics, _METRICS)
            for x in metrics
        )
    )


def _is_of_rows(one: Any, module: Any, known: tuple[type, ...]) -> bool:
    """Whether a loss or a metric is one of Keras's that add up from rows."""
    if isinstance(one, str):
        try:
            one = module.get(one)
        except ValueError:  # unknown: Keras will say so
            return False
    if isinstance(one, type):
        return False
    if not isinstance(one, (keras.losses.Loss, keras.metrics.Metric)):
        return any(one is function for function in _functions())
    return (
        type(one) in known
        and getattr(one, "reduction", "sum") in _REDUCTIONS
        and keras_compile.axis_of(one) in (None, -1)
    )


def _functions() -> list[Any]:
    """What the losses above are as functions."""
    names = [
        "binary_crossentropy",
        "binary_focal_crossentropy",
        "categorical_crossentropy",
        "categorical_focal_crossentropy",
        "categorical_hinge",
        "cosine_similarity",
        "hinge",
        "huber",
        "kl_divergence",
        "log_cosh",
        "mean_absolute_error",
        "mean_absolute_percentage_error",
        "mean_squared_error",
        "mean_squared_logarithmic_error",
        "poisson",
        "sparse_categorical_crossentropy",
        "squared_hinge",
    ]
    return [keras.losses.get(name) for name in names]


def has_rows_of_more(outputs: Any) -> bool:
    """Whether the last axis of no output is that of rows.

    Args:
      outputs: a nest of `KerasTensor`s or specs.
    """
    return all(len(x.shape) > 1 for x in tf.nest.flatten(outputs))
