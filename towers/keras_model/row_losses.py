"""row_losses: whether a loss or a metric is computed row by row, and adds up.

Then what towers say of their shards makes that of the batch. The one judge: what is
known to add up may be computed on the towers without asking, what is known not to is
refused, and of all else the values' shape tells.
"""

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import keras

from towers.foreign import keras_compile
from towers.foreign.keras_layers import is_keras_own

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
_REDUCTIONS = ("sum_over_batch_size", "mean", "sum")


def adds_up(one: Any, rank: int | None = None) -> bool | None:
    """Whether a loss or a metric of shards adds up to that of the batch.

    Args:
      one: a loss, a metric or a function, of the user's too.
      rank: that of targets and predictions, if it is known.

    Returns:
      True if it is known to be computed row by row, and to add up; False if it is
      known to look at other rows; None if neither is known.
    """
    function, options = keras_compile.computed_by(one)
    if _looks_at_other_rows(function, options, rank):
        return False
    if isinstance(one, (keras.losses.Loss, keras.metrics.Metric)):
        adds = (
            type(one) in (*_LOSSES, *_METRICS)
            and getattr(one, "reduction", "sum") in _REDUCTIONS
            and options.get("axis") in (None, -1)
        )
    else:
        adds = any(one is each for each in _functions())
    # Of rank 1, the last axis is that of the rows.
    return True if adds and rank != 1 else None


@functools.cache
def _functions() -> list[Any]:
    """What the losses above are as functions."""
    return [keras_compile.computed_by(kind())[0] for kind in _LOSSES]


def _looks_at_other_rows(
    function: Any, options: Mapping[str, Any], rank: int | None
) -> bool:
    """Whether one of Keras's own is known not to be computed row by row."""
    function = inspect.unwrap(function) if callable(function) else function
    circle = getattr(keras.losses, "circle", None)
    if circle is not None and function is circle:
        return True
    if not is_keras_own(function):
        return False
    axes = options.get("axis")
    axes = axes if isinstance(axes, (list, tuple)) else [axes]
    whole = [axis for axis in axes if isinstance(axis, int)]
    return any(
        axis == 0 or (rank is not None and axis == -rank) for axis in whole
    )
