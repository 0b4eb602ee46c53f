"""loss_parts: what a model was compiled with, computed in parts that add up.

A Keras loss divides what it summed by what it counted: elements, unmasked
positions or weights. Means of such means are wrong where shards count
differently, so towers say numerators and divisors, and those are summed.
"""

import contextlib
from typing import Any

import keras
import tensorflow as tf

from towers.foreign import keras_compile, keras_layers
from towers.foreign.keras_compile import Compiled
from towers.foreign.keras_layers import is_keras_own
from towers.foreign.patches import patched
from towers.keras_model.row_losses import adds_up


def check_mergeable(model: keras.Model) -> None:
    """Refuses losses and metrics of which towers cannot compute parts.

    Args:
      model: a compiled model whose losses and metrics are built.

    Raises:
      ValueError: names the loss or the metric.
    """
    compiled = Compiled.of(model)
    for loss in compiled.flat_losses:
        if type(loss).__call__ is not keras.losses.Loss.__call__:
            raise _unmergeable(
                f"loss {loss.name!r}", "has a `__call__` of its own", "`call`"
            )
        if loss.reduction in (None, "none"):
            raise _unmergeable(
                f"loss {loss.name!r}",
                f"has reduction={loss.reduction!r}",
                "'sum_over_batch_size', 'mean_with_sample_weight' or 'sum'",
            )
    for kind, one in [
        *(("loss", loss) for loss in compiled.flat_losses),
        *(("metric", metric) for metric in compiled.flat_metrics),
    ]:
        if adds_up(one) is False:
            raise _of_other_rows(f"{kind} {one.name!r}")
    for metric in compiled.flat_metrics:
        update = next(
            c for c in type(metric).__mro__ if "update_state" in vars(c)
        )
        if not is_keras_own(update):
            raise _unmergeable(
                f"metric {metric.name!r}",
                f"has an `update_state` of its own ({update.__name__})",
                "a Keras metric, or a function with one value per row",
            )


def are_counted_by_targets(model: keras.Model, outputs: Any) -> bool:
    """Whether divisors need no predictions, but for the masks of those.

    Args:
      model: the compiled model.
      outputs: a nest of `KerasTensor`s or specs, like its predictions.
    """
    shapes = [tf.TensorShape(x.shape) for x in tf.nest.flatten(outputs)]
    return (
        not tf.executing_eagerly()
        and all(shape[1:].is_fully_defined() for shape in shapes)
        and all(_is_keras_s(loss) for loss in Compiled.of(model).flat_losses)
    )


def check_as_told(y_pred: Any, outputs: Any) -> None:
    """Raises unless predictions are of the shapes that the model says they have.

    By those its losses and metrics were made.

    Args:
      y_pred: a tower's predictions.
      outputs: a nest of `KerasTensor`s or specs, of what is said.
    """
    for spec, output in zip(tf.nest.flatten(outputs), tf.nest.flatten(y_pred)):
        declared, actual = (_of_any_rows(x.shape) for x in (spec, output))
        if not declared.is_compatible_with(actual):
            raise ValueError(
                f"The model says that it makes outputs of shape {declared}, by which "
                f"losses and metrics are chosen, and it made {actual}. Expected a "
                "`compute_output_shape` that tells what `call` returns; or leave "
                "out `loss_on_towers=True`."
            )


def _of_any_rows(shape: Any) -> tf.TensorShape:
    shape = tf.TensorShape(shape)
    return tf.TensorShape([None, *shape[1:]]) if shape.rank else shape


def parts(
    model: keras.Model, y: Any, y_pred: Any, weights: Any, counted: bool = False
) -> tuple[tf.Tensor, tf.Tensor | None]:
    """One tower's numerators and divisors: [n_losses] each.

    Two tensors, since all that the backward pass needs of other towers is their
    divisors. They leave a tower together, when it has computed its outputs.

    Args:
      model: the compiled model.
      y, y_pred, weights: the tower's targets, predictions, sample weights.
      counted: whether the targets of the batch tell the divisors, which are
        None then, unless predictions have masks.
    """
    compiled = Compiled.of(model)
    sums: list[tuple[tf.Tensor, tf.Tensor]] = []
    masks: list[Any] = []

    def noting(loss: keras.losses.Loss) -> Any:
        def say(y: Any, y_pred: Any, weights: Any) -> float:
            sums.append(_parts(loss, y, y_pred, weights))
            masks.append(keras_layers.get_mask(y_pred))
            return 0.0

        return say

    with compiled.replaced([noting(loss) for loss in compiled.flat_losses]):
        compiled.loss(y, y_pred, weights)
    numerators, divisors = zip(*sums)
    if counted and all(mask is None for mask in masks):
        return tf.stack(numerators), None
    return tf.stack(numerators), tf.stack(divisors)


def merged_loss(
    model: keras.Model,
    parts: tuple[tf.Tensor, tf.Tensor | None],
    y: Any,
    like: Any,
    weights: Any = None,
) -> Any:
    """The compiled loss, from the sum of all towers' `parts`.

    Keras itself weighs the losses and keeps their trackers.

    Args:
      model: the compiled model.
      parts: numerators and divisors, [n_losses] each, or None for the divisors
        that targets and weights tell.
      y, weights: the targets and sample weights of the batch.
      like: a nest like the predictions, of tensors with as many rows; of their
        shapes if there are no divisors.
    """
    compiled = Compiled.of(model)
    numerators, divisors = parts

    def mean_of(i: int, loss: keras.losses.Loss) -> Any:
        def value(y: Any, like: Any, weights: Any) -> tf.Tensor:
            if loss.reduction == "sum":
                return numerators[i]
            divisor = (
                _parts(loss, y, like, weights)[1]
                if divisors is None
                else divisors[i]
            )
            return tf.math.divide_no_nan(numerators[i], divisor)

        return value

    values = [mean_of(i, loss) for i, loss in enumerate(compiled.flat_losses)]
    with compiled.replaced(values, tracked=True):
        return compiled.loss(y, like, weights)


def metric_sums(
    metrics: Any, y: Any, y_pred: Any, weights: Any
) -> list[tf.Tensor]:
    """What a tower adds to each variable of compiled metrics, from its shard.

    Their functions must speak of each row.
    """
    zeros = [(v, tf.zeros(v.shape, v.dtype)) for v in metrics.variables]
    scope = keras.StatelessScope(state_mapping=zeros)
    with scope, contextlib.ExitStack() as stack:
        for metric in metrics.metrics:
            if isinstance(metric, keras.metrics.MeanMetricWrapper):
                stack.enter_context(
                    keras_compile.checked_metric(metric, _check_rows)
                )
        metrics.update_state(y, y_pred, weights)
    return [tf.stop_gradient(scope.get_current_value(v)) for v, _ in zeros]


def _parts(
    loss: keras.losses.Loss, y: Any, y_pred: Any, weights: Any
) -> tuple[tf.Tensor, tf.Tensor]:
    """Two scalars, from what `loss` itself answers when asked for sums, and of ones.

    With ones for values, the sum over the reduced value is what the reduction
    divides by.
    """
    values: list[tf.Tensor] = []
    call = loss.call

    def kept(y: Any, y_pred: Any) -> tf.Tensor:
        values.append(call(y, y_pred))
        _check_rows(f"loss {loss.name!r}", loss, values[0], y, y_pred)
        return values[0]

    def ones(y: Any, y_pred: Any) -> tf.Tensor:
        one = _ones(loss, values[0], y)
        keras_layers.set_notes(
            one, [{"mask": keras_layers.get_mask(values[0])}]
        )
        return one

    weighs = loss.reduction == "mean_with_sample_weight"
    counted = weights if weighs else None
    summed = loss, "reduction", "sum"
    with patched((loss, "call", kept), summed):
        numerator = loss(y, y_pred, weights)
    with patched((loss, "call", ones)):
        mean = loss(y, y_pred, counted)
    with patched((loss, "call", ones), summed):
        total = loss(y, y_pred, counted)
    divisor = tf.stop_gradient(tf.math.divide_no_nan(total, mean))
    return numerator, divisor


def _ones(loss: keras.losses.Loss, values: tf.Tensor, y: Any) -> tf.Tensor:
    """Ones like a loss's values, that need not wait for them where `y` tells.

    A loss of Keras's own has a value for each row of `y`; of others only the
    values tell how many there are.
    """
    shape = values.shape
    if shape.is_fully_defined():
        return tf.ones(shape, values.dtype)
    if (
        _is_keras_s(loss)
        and isinstance(y, tf.Tensor)
        and y.shape.rank
        and shape[1:].is_fully_defined()
    ):
        ones = tf.ones([tf.shape(y)[0], *shape[1:]], values.dtype)
        return tf.ensure_shape(ones, shape)
    return tf.ones_like(values)


def _is_keras_s(loss: keras.losses.Loss) -> bool:
    """Whether a loss, and the function that it is made of, is Keras's own."""
    function = getattr(loss, "fn", type(loss))
    return is_keras_own(type(loss)) and is_keras_own(function)


def _check_rows(name: str, one: Any, values: Any, y: Any, y_pred: Any) -> None:
    """Raises unless each value is that of a row."""
    shape = tf.convert_to_tensor(values).shape
    if not shape.rank:
        raise _unmergeable(
            name, "returns a scalar for all rows", "one value per row"
        )
    shapes = [
        tf.convert_to_tensor(x).shape
        for x in tf.nest.flatten((y, y_pred))
        if x is not None
    ]
    # Keras gives both the larger rank.
    rank = max((x.rank for x in shapes if x.rank), default=None)
    if adds_up(one, rank) is False:
        raise _of_other_rows(name)
    rows = {x[0] for x in shapes if x.rank}
    if shape[0] is not None and shape[0] not in rows:
        raise _unmergeable(
            name,
            f"returns values of shape {shape} for rows of another number",
            "one value per row",
        )


def _of_other_rows(name: str) -> ValueError:
    return _unmergeable(
        name,
        "looks at other rows of the batch, of which a tower has its shard only",
        "one that is computed row by row",
    )


def _unmergeable(name: str, problem: str, expected: str) -> ValueError:
    return ValueError(
        f"The {name} {problem}, so what towers say of their shards cannot be "
        f"merged. Expected {expected}; or leave out `loss_on_towers=True`."
    )
