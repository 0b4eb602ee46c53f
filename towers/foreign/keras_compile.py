"""keras_compile: what `compile` made of a model: its losses and metrics.

Keras has no public word for its internals that this file touches:
`_compile_loss`, `_compile_metrics` and `_loss_tracker` (what was made), their
`_user_*` (of what), `_flat_losses` and `_metrics` (one for each output), `_fn`
and `_fn_kwargs` (what a metric is the mean of, and how a loss is computed),
and `_compute_loss_has_training_arg` and `_call_has_training_arg` (what Keras read
from signatures).
`keras_compile_test.py` and `own_class_test.py` fail when one of them changes.
"""

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from towers.foreign import specs
from towers.foreign.containers import leaves
from towers.foreign.patches import patched


def use_compute_loss(model: keras.Model, function: Callable[..., Any]) -> None:
    """Has Keras tell `compute_loss` the phase if `function` asks for it.

    Keras goes by the signature of the model's own method when it is made.
    """
    takes = "training" in inspect.signature(function).parameters
    model._compute_loss_has_training_arg = takes


def is_told_phase(model: keras.Model) -> bool:
    """Whether Keras's steps call a model with a phase: if its `call` has one.

    Else nothing in it trains: its dropout does nothing in `fit`.
    """
    return model._call_has_training_arg


def tell_phase_as(wrapper: keras.Model, model: keras.Model) -> None:
    """Has Keras's steps tell a wrapper the phase where they tell the model.

    The wrapper's `call` has one always, as every call of a model may say it.
    """
    wrapper._call_has_training_arg = is_told_phase(model)


def compile_arguments(model: keras.Model) -> dict[str, Any]:
    """What `compile` was called with, as live objects.

    The optimizer is what Keras made of the one that it was given, so a scaled one
    is not to be scaled again, nor one that was not to be scaled at all. There is
    none where Keras calls a loaded model compiled whose `compile` is its own.
    `model.loss` is no longer what was given: an attribute's lists are TensorFlow's.
    """
    loss, metrics = model._compile_loss, model._compile_metrics
    return {
        "optimizer": getattr(model, "optimizer", None),
        "loss": loss and loss._user_loss,
        "loss_weights": loss and loss._user_loss_weights,
        "metrics": metrics and metrics._user_metrics,
        "weighted_metrics": metrics and metrics._user_weighted_metrics,
        "run_eagerly": model.run_eagerly,
        "steps_per_execution": model.steps_per_execution,
        "auto_scale_loss": False,
    }


def share_metrics(of: keras.Model, model: keras.Model) -> None:
    """Has a model count in the compiled metrics of another, of equal outputs.

    Metrics that are objects are in both, but each resets only those that it has
    built: what one has counted would be in the other's first result.
    """
    vars(model)["_compile_metrics"] = of._compile_metrics  # which none tracks


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What `compile` made of its arguments.

    Attributes:
      loss: the compiled loss of all outputs, or None.
      metrics: the compiled metrics of all outputs, or None.
      tracker: the metric behind "loss" in the logs.
    """

    loss: Any
    metrics: Any
    tracker: keras.metrics.Metric

    @classmethod
    def of(cls, model: keras.Model) -> "Compiled":
        """What a compiled model was compiled to."""
        return cls(
            model._compile_loss, model._compile_metrics, model._loss_tracker
        )

    @property
    def built(self) -> bool:
        """Whether losses and metrics know their outputs."""
        return all(x is None or x.built for x in (self.loss, self.metrics))

    def build(self, y: Any, y_pred: Any, weights: Any) -> None:
        """Makes what Keras makes at the first batch, in a graph of its own.

        A `tf.function` in which variables are made is traced twice.

        Args:
          y, y_pred, weights: nests of tensors, specs or `KerasTensor`s.
        """
        if self.built:
            return

        def build(y: Any, y_pred: Any, weights: Any) -> None:
            if self.metrics is not None:
                self.metrics.update_state(y, y_pred, weights)
            if self.loss is not None:
                self.loss(y, y_pred, weights)

        arguments = tf.nest.map_structure(specs.of, (y, y_pred, weights))
        tf.function(build, autograph=False).get_concrete_function(*arguments)

    @property
    def flat_losses(self) -> list[keras.losses.Loss]:
        """One loss per output that has one."""
        return [x.loss for x in self.loss._flat_losses] if self.loss else []

    @property
    def flat_metrics(self) -> list[keras.metrics.Metric]:
        """All metrics of all outputs."""
        return list(self.metrics.metrics) if self.metrics else []

    @property
    def variables(self) -> list[Any]:
        """Those of all metrics that are made, the losses' means included."""
        losses = self.loss.metrics if self.loss else []
        metrics = [self.tracker, *losses, *self.flat_metrics]
        return [v for metric in metrics if metric for v in metric.variables]

    @contextlib.contextmanager
    def replaced(
        self, losses: Sequence[Callable], tracked: bool = False
    ) -> Iterator[None]:
        """While open, other functions stand for `flat_losses`.

        Args:
          losses: `f(y_true, y_pred, sample_weight)` for each.
          tracked: whether each output's loss is kept for the logs.
        """
        loss = self.loss
        flat, trackers = loss._flat_losses, loss._metrics
        other = [x._replace(loss=f) for x, f in zip(flat, losses)]
        kept = trackers if tracked else [None] * len(flat)
        with patched((loss, "_flat_losses", other), (loss, "_metrics", kept)):
            yield


def metric_variables(model: Any) -> list[Any]:
    """Those of losses and metrics: what `compile` was given, and made of it."""
    if not model.compiled:
        return []
    compiled = Compiled.of(model)
    metrics = compiled.metrics and [
        compiled.metrics._user_metrics,
        compiled.metrics._user_weighted_metrics,
    ]
    own = [
        v
        for metric in tf.nest.flatten(metrics)
        if isinstance(metric, keras.metrics.Metric)
        for v in metric.variables
    ]
    return list({id(v): v for v in [*compiled.variables, *own]}.values())


@contextlib.contextmanager
def checked_metric(
    metric: keras.metrics.MeanMetricWrapper, check: Callable[..., None]
) -> Iterator[None]:
    """While open, `check(name, metric, values, y, y_pred)` hears of each call."""
    function = metric._fn

    def checked_values(y: Any, y_pred: Any, **kwargs: Any) -> Any:
        values = function(y, y_pred, **kwargs)
        check(f"metric {metric.name!r}", metric, values, y, y_pred)
        return values

    with patched((metric, "_fn", checked_values)):
        yield


def computed_by(one: Any) -> tuple[Any, dict[str, Any]]:
    """The function that a loss or a metric is made of, and its options.

    Args:
      one: a loss, a metric or a function; it is itself where nothing is below.
    """
    options: dict[str, Any] = {}
    while True:
        if isinstance(one, functools.partial):
            options, one = {**one.keywords, **options}, one.func
        elif isinstance(one, keras.metrics.MeanMetricWrapper):
            options, one = {**one._fn_kwargs, **options}, one._fn
        elif isinstance(one, keras.losses.Loss) and hasattr(one, "_fn_kwargs"):
            options, one = {**one._fn_kwargs, **options}, one.fn
        else:
            return one, options


def optimizers(model: Any) -> list[keras.Optimizer]:
    """Those of a model, or of a wrapper and its template, attributes too."""

    owners = [model, vars(model).get("template")]
    kept = [dict(vars(owner)) for owner in owners if owner is not None]
    objects = [x for x in leaves(kept) if isinstance(x, keras.Optimizer)]
    return list({id(x): x for x in objects}.values())
