"""compare: a model in towers against the plain one, on a batch of the user's."""

import collections
import dataclasses
from collections.abc import Sequence
from html import escape
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from towers.foreign import keras_layers
from towers.foreign.keras_saving import overridden
from towers.keras_model.checks import check_model
from towers.placement.placement import (
    Placement,
    as_placement,
    check_placement,
)
from towers.planning.compared_steps import ComparedSteps
from towers.planning.figures import Figure, figure_of
from towers.planning.suspects import first_suspect
from towers.report.execution import execution_report
from towers.report.report import ExecutionReport
from towers.wrapper.tower_model import TowerModel

_ROUGH = 0.01  # what rounding may explain without being told
_REPEATED = 1000  # roundings, at most, of a model that is equal to itself
_OPTIONS = ("merge", "whole", "synchronized")  # those that numbers depend on


@dataclasses.dataclass(frozen=True, repr=False)
class Comparison:
    """Towers against the plain model, see `compare`.

    Each figure has a `.distance` from the plain model's numbers, the distance that
    is `.allowed`, `.equal`, and `.worst`, the output or variable that is furthest.

    Attributes:
      predictions: of the outputs with `training=False`.
      outputs: of those of a training step.
      loss: of that step's loss.
      gradients: of those to the trainable variables.
      state: of what the forward pass leaves in variables: moving statistics, seeds,
        counters.
      weights: of what an optimizer like the model's makes of the gradients; None
        if the model is not compiled, or its optimizer cannot be asked.
      ops: by device, how many ops of the towers' step ran there.
      suspect: the path of the layer that is the first to differ, or "".
      reason: what is likely behind it, or "".
      notes: what was done otherwise than in a `fit`, a sentence each.
    """

    predictions: Figure
    outputs: Figure
    loss: Figure
    gradients: Figure
    state: Figure
    weights: Figure | None
    ops: dict[str, int]
    suspect: str = ""
    reason: str = ""
    notes: tuple[str, ...] = ()

    @property
    def figures(self) -> tuple[Figure, ...]:
        """All that there are, in the order of a step."""
        results = [self.predictions, self.outputs, self.loss, self.gradients]
        return tuple(filter(None, [*results, self.state, self.weights]))

    @property
    def equal(self) -> bool:
        """Whether all numbers are the plain model's, to rounding."""
        return all(figure.equal for figure in self.figures)

    def __repr__(self) -> str:
        wrong = ", ".join(f.kind for f in self.figures if not f.equal)
        return f"<Comparison: {f'not equal in {wrong}' if wrong else 'equal'}>"

    def _repr_html_(self) -> str:
        """The table of `print`, which notebooks show."""
        return f"<pre>{escape(str(self))}</pre>"

    def __str__(self) -> str:
        lines = [f"{'':12}{'from plain':>12}{'rounding':>12}"]
        for one in self.figures:
            verdict = f"DIFFERENT, most in {one.worst}"
            if one.equal:
                verdict = "equal"
                if one.allowed > _ROUGH:
                    verdict += ", as far as rounding lets one tell"
            lines.append(
                f"{one.kind:12}{one.distance:12.1e}{one.allowed:12.1e}"
                f"  {verdict}"
            )
        ran = ", ".join(f"{n:,} on {d}" for d, n in sorted(self.ops.items()))
        lines += [f"Ops of a step in towers: {ran}.", *self.notes]
        lines.append(
            "Equal: the towers' numbers are the plain model's."
            if self.equal
            else f"Not equal. {self.reason}".strip()
        )
        return "\n".join(lines)


def compare(
    model: keras.Model,
    placement: Placement | int | Sequence[str],
    x: Any,
    y: Any = None,
    sample_weight: Any = None,
    **options: Any,
) -> Comparison:
    """Compares a model in towers with itself, plain, on one batch.

    Both predict the batch and take a training step of it, from the same seeds:
    outputs, loss, gradients, what the step leaves in other variables, and what the
    optimizer would make of the weights. They are equal if they are no further
    apart than a few times what a rounding in every weight and input makes of the
    plain model's numbers, by the largest of their kind; of state and weights, by
    the largest of each variable. Else the first layer is named that differs, with
    the likely reason. The model, its devices, its seeds and its optimizer stay as
    they are.

    >>> model = keras.Sequential([keras.Input([3]), keras.layers.Dense(2)])
    >>> model.compile("sgd", "mse")
    >>> placement = towers.Placement(["/CPU:0", "/CPU:1"])
    >>> x, y = np.random.rand(8, 3), np.random.rand(8, 2)
    >>> comparison = towers.compare(model, placement, x, y)
    >>> comparison.equal, comparison.gradients.equal, sorted(comparison.ops)
    (True, True, ['/CPU:0', '/CPU:1'])

    A model that is not compiled, or a batch without `y`, has the mean of its
    outputs' squares for a loss. A `train_step` of the model's own is not run: what
    it calls is compared, as its `call` and `compute_loss` have it.

    Args:
      model: a built `keras.Model`; of a `TowerModel` its template, with its options,
        and what it was compiled to.
      placement: of the towers, as for `TowerModel`.
      x: a batch of inputs, a nest of [rows, ...] arrays or tensors.
      y: its targets, as for `fit`; [rows, ...] arrays.
      sample_weight: as for `fit`.
      **options: `merge`, `whole` and `synchronized`, as for `TowerModel`.

    Returns:
      A `Comparison`. `print(comparison)` shows a table.

    Raises:
      TypeError: the model or the placement is of the wrong kind, or an option is
        unknown.
      ValueError: the model is not built, or has no `call`.
      RuntimeError: called inside a graph.
    """
    check_model(model)
    compiled = model  # which `fit` is called of
    if isinstance(model, TowerModel):
        options = {**{k: getattr(model, k) for k in _OPTIONS}, **options}
        model = model.template
        compiled = compiled if compiled.compiled else model
    where: Placement = as_placement(placement)
    check_placement(where)
    _check(model, options)
    batch = tf.nest.map_structure(_tensor, (x, y, sample_weight))
    steps = ComparedSteps(model, where, batch, options, compiled)
    reports: list[ExecutionReport] = []

    def reported(step: Any, *args: Any) -> Any:
        results: list[Any] = []
        reports.append(execution_report(lambda: results.append(step(*args))))
        return results[0]

    compute = steps.plain()
    plain, again = compute(steps.x), compute(steps.x)
    repeated = all(
        figure_of(kind, plain[kind], again[kind], [], steps.rounding).distance
        < _REPEATED * steps.rounding
        for kind in plain
    )
    moved = []
    # What differs anyhow would allow any difference.
    for seed in range(2) if repeated else ():
        with steps.moved(seed) as near:
            moved.append(compute(near))
    towered = steps.towers()(steps.x, reported)
    figures = {
        kind: figure_of(
            *(kind, plain[kind], towered[kind]),
            [values[kind] for values in moved],
            steps.rounding,
            apart=kind == "state",
        )
        for kind in plain
    }
    after = [steps.weights(values) for values in (plain, towered, *moved)]
    weight_sets = [one for one in after if one is not None]
    weights = None
    if len(weight_sets) == len(after):
        one, other, *near = weight_sets
        weights = figure_of(
            "weights", one, other, near, steps.rounding, apart=True
        )
    ops: collections.Counter[str] = collections.Counter()
    for (device, _), count in reports[0].ops.items():
        ops[device] += count
    result = Comparison(
        **figures,  # type: ignore[arg-type]
        weights=weights,
        ops=dict(ops),
    )
    if not repeated:
        reason = (
            "The plain model, with the same seeds, is not even equal to itself: "
            "it draws what no seed decides, as tf.random's ops with a state do."
        )
        result = dataclasses.replace(result, reason=reason)
    elif not result.equal:
        suspect, reason = first_suspect(steps, result.predictions.equal)
        if not suspect:
            first = next(f for f in result.figures if not f.equal)
            reason = (
                "No layer's outputs differ; the first that does is "
                f"{first.worst} of the {first.kind}."
            )
        result = dataclasses.replace(result, suspect=suspect, reason=reason)
    return dataclasses.replace(result, notes=tuple(steps.notes))


def _check(model: Any, options: Any) -> None:
    """Raises where a model cannot be compared."""
    unknown = sorted(set(options) - set(_OPTIONS))
    if unknown:
        raise TypeError(
            f"compare has no option {', '.join(unknown)}. Expected some of "
            f"{', '.join(_OPTIONS)}."
        )
    if not tf.executing_eagerly():
        raise RuntimeError(
            "compare runs steps of its own: expected an eager call, got one "
            "inside a graph."
        )
    if not overridden(model, ["call"]):
        raise ValueError(
            f"{type(model).__name__} has no `call`, so there are no outputs to "
            "compare. Compare the models that it holds, one by one."
        )
    if not keras_layers.is_built(model):
        raise ValueError(
            f"The model {model.name!r} is not built, and to build it would change "
            "it. Call it on a batch first, model(x), so that it has weights."
        )


def _tensor(value: Any) -> Any:
    """A leaf of a batch, as `fit` takes it."""
    if value is None or tf.is_tensor(value):
        return value
    array = np.asarray(value)
    if array.dtype == np.float64:
        array = array.astype(keras.config.floatx())
    return tf.constant(array)
