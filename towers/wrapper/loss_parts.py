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
from towers.foreign.patches import patched


def check_mergeable(model: keras.Model) -> None:
    """Refuses losses and metrics of which towers cannot compute parts.

    Args:
      model: a compiled model whose losses and metrics are built.

    Raises:
      ValueError: names the loss or the metric.
    """
    made = Compiled.of(model)
    for loss in made.flat_losses:
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
        *(("loss", loss) for loss in made.flat_losses),
        *(("metric", metric) for metric in made.flat_metrics),
    ]:
        if keras_compile.looks_at_other_rows(one):
            raise _of_other_rows(f"{kind} {one.name!r}")
    for metric in made.flat_metrics:
        update = next(
            c for c in type(metric).__mro__ if "update_state" in vars(c)
        )
        if not update.__module__.startswith("keras."):
            raise _unmergeable(
                f"metric {metric.name!r}",
                f"has an `update_state` of its own ({update.__name__})",
                "a Keras metric, or a function with one value per row",
            )


def parts(
    model: keras.Model, y: Any, y_pred: Any, weights: Any
) -> tuple[tf.Tensor, tf.Tensor]:
    """One tower's numerators and divisors: [n_losses] each.

    Two tensors, since all that the backward pass needs of other towers is their
    divisors, which they know before the forward pass.

    Args:
      model: the compiled model.
      y, y_pred, weights: the tower's targets, predictions, sample weights.
    """
    made = Compiled.of(model)
    said: list[tuple[tf.Tensor, tf.Tensor]] = []

    def told(loss: keras.losses.Loss) -> Any:
        def say(y: Any, y_pred: Any, weights: Any) -> float:
            said.append(_parts(loss, y, y_pred, weights))
            return 0.0

        return say

    with made.replaced([told(loss) for loss in made.flat_losses]):
        made.loss(y, y_pred, weights)
    numerators, divisors = zip(*said)
    return tf.stack(numerators), tf.stack(divisors)


def merged(
    model: keras.Model, parts: tuple[tf.Tensor, tf.Tensor], y: Any, like: Any
) -> Any:
    """The compiled loss, from the sum of all towers' `parts`.

    Keras itself weighs the losses and keeps their trackers.

    Args:
      model: the compiled model.
      parts: numerators and divisors, [n_losses] each.
      y: the targets.
      like: a nest like the predictions, of tensors with as many rows.
    """
    made = Compiled.of(model)

    def said(i: int, loss: keras.losses.Loss) -> Any:
        numerator, divisor = parts[0][i], parts[1][i]
        if loss.reduction == "sum":
            return lambda *_: numerator
        return lambda *_: tf.math.divide_no_nan(numerator, divisor)

    values = [said(i, loss) for i, loss in enumerate(made.flat_losses)]
    with made.replaced(values, tracked=True):
        return made.loss(y, like)


def update_metrics(metrics: Any, y: Any, y_pred: Any, weights: Any) -> None:
    """Updates compiled metrics, whose functions must speak of each row."""
    with contextlib.ExitStack() as stack:
        for metric in metrics.metrics:
            if isinstance(metric, keras.metrics.MeanMetricWrapper):
                stack.enter_context(keras_compile.checked(metric, _check_rows))
        metrics.update_state(y, y_pred, weights)


def _parts(
    loss: keras.losses.Loss, y: Any, y_pred: Any, weights: Any
) -> tuple[tf.Tensor, tf.Tensor]:
    """Two scalars, from what `loss` itself answers when asked for sums, and of ones.

    With ones for values, the sum over the reduced value is what the reduction
    divides by.
    """
    seen: list[tf.Tensor] = []
    call = loss.call

    def kept(y: Any, y_pred: Any) -> tf.Tensor:
        seen.append(call(y, y_pred))
        _check_rows(f"loss {loss.name!r}", loss, seen[0], y, y_pred)
        return seen[0]

    def ones(y: Any, y_pred: Any) -> tf.Tensor:
        one = _ones(loss, seen[0], y)
        keras_layers.set_notes(one, [{"mask": keras_layers.get_mask(seen[0])}])
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
    parts = (type(loss), getattr(loss, "fn", loss))
    own = all(getattr(x, "__module__", "").startswith("keras.") for x in parts)
    if (
        own
        and isinstance(y, tf.Tensor)
        and y.shape.rank
        and shape[1:].is_fully_defined()
    ):
        ones = tf.ones([tf.shape(y)[0], *shape[1:]], values.dtype)
        return tf.ensure_shape(ones, shape)
    return tf.ones_like(values)


def _check_rows(name: str, one: Any, values: Any, y: Any, y_pred: Any) -> None:
    """Raises unless each value is that of a row."""
    shape = tf.convert_to_tensor(values).shape
    if not shape.rank:
        raise _unmergeable(
            name, "returns a scalar for all rows", "one value per row"
        )
    given = [
        tf.convert_to_tensor(x).shape
        for x in tf.nest.flatten((y, y_pred))
        if x is not None
    ]
    # Keras gives both the larger rank.
    rank = max((x.rank for x in given if x.rank), default=None)
    if keras_compile.looks_at_other_rows(one, rank):
        raise _of_other_rows(name)
    rows = {x[0] for x in given if x.rank}
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
