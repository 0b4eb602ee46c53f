"""batchless: outputs of a model that have no row for each of the batch's.

Joined, such an output would be there once per tower: a weight [3, 2] as [9, 2].
From its shape alone it cannot be told: a tower of 3 rows gives [3, 2] too. So
the model is asked what it makes of an unknown number of rows. Likewise of one
that puts a batch after another, where the order of rows would be lost.
"""

import dataclasses
from collections.abc import Callable, Container, Sequence
from typing import Any

import keras
import tensorflow as tf

from towers.foreign.keras_layers import is_keras_own
from towers.keras_model import layer_graph, row_order, whole_call
from towers.keras_model.findings import Findings
from towers.keras_model.request import Request

_FINDINGS: Findings[list[Any]] = Findings()


@dataclasses.dataclass(frozen=True)
class Question:
    """What a model is asked: a call that is not run.

    Attributes:
      graph: of one model.
      inputs: the batch that the towers share.
      divided: for each leaf whether it is split by rows, or whole.
      request: tells the phase, and the call if there is more to it.
    """

    graph: layer_graph.LayerGraph
    inputs: Any
    divided: Sequence[bool]
    request: Request

    def check_joined(
        self,
        outputs: Sequence[Any],
        rules: Sequence[str],
        unordered: Container[int],
    ) -> None:
        """Raises if "concat" would repeat an output that is no batch, or mix rows.

        A model that has a fixed batch size is left alone, and one that cannot
        say what it makes of an unknown number of rows.

        Args:
          outputs: one nest per tower.
          rules: one per flat output.
          unordered: flat outputs whose rows may come in another order.

        Raises:
          ValueError: names the output and the rules that would do.
        """
        joined = [i for i, rule in enumerate(rules) if rule == "concat"]
        mixed = [i for i in joined if i in unordered]
        if mixed and not self._has_fixed_batch():
            self._check_order(outputs[0], mixed)
        columns = list(zip(*[tf.nest.flatten(x) for x in outputs]))
        any_whole = not all(self.divided)
        suspects = [
            i for i in joined if _may_be_batchless(columns[i], any_whole)
        ]
        if not suspects or self._has_fixed_batch():
            return
        axes = self._first_axes(columns)
        if len(axes) != len(columns):
            return
        for i in suspects:
            sizes = {y.shape[0] for y in columns[i]} - {None}
            if axes[i] is not None and sizes <= {axes[i]}:
                raise _refusal(i, columns[i][0])

    def _has_fixed_batch(self) -> bool:
        """Whether the model keeps states of rows, or says how many it takes."""
        divided = self.divided
        symbols = tf.nest.flatten(_symbols(self.graph.models[0], "input"))
        if len(symbols) != len(divided):
            divided = [True] * len(symbols)
        return bool(self.graph.row_states) or any(
            x.shape[0] is not None
            for x, mine in zip(symbols, divided)
            if x is not None and x.shape and mine
        )

    def _check_order(self, outputs: Any, mixed: Sequence[int]) -> None:
        """Raises if the model puts one batch after another in an output."""
        joined = self._answers(
            tf.nest.flatten(outputs), row_order.MANY, row_order.joined_by
        )
        for i in mixed:
            if joined and joined[i] is not None:
                raise ValueError(
                    f"`merge` is 'concat' for output {i}, but the model puts "
                    "several times the batch's rows one after the other there, "
                    f"by {joined[i]!r}: towers' outputs, joined, would have them "
                    "in another order. Return the parts as outputs of their own, "
                    "or as [rows, parts, ...], and join them outside; or use "
                    "'none'."
                )

    def _first_axes(self, columns: Sequence[Any]) -> list[int | None]:
        """Of each flat output of any number of rows; of none if that fails."""
        model = self.graph.models[0]
        flat = tf.nest.flatten(self.inputs)
        if all(self.divided):
            rows = {x.shape[0] for x in flat if x is not None}
            if rows == {None}:  # as the towers were called
                return [_first_axis(column[0]) for column in columns]
            if is_keras_own(type(model).call):
                symbols = tf.nest.flatten(_symbols(model, "output"))
                if symbols:
                    return [_first_axis(x) for x in symbols]
        return self._answers([c[0] for c in columns], None, _first_axis)

    def _answers(
        self,
        outputs: Sequence[Any],
        rows: int | None,
        tell: Callable[[Any], Any],
    ) -> list[Any]:
        """What `tell` says of each output of `rows`; of none if that fails."""
        specs = row_order.specs_of(self.inputs, self.divided, rows)
        rest = [None if y is None else str(y.shape[1:]) for y in outputs]

        def look() -> list[Any]:
            whole = whole_call.WholeCall(
                self.graph.models[0],
                self.inputs,
                self.request.training,
                self.request.tower_fn,
            )
            try:
                return whole.answers(specs, tell)
            except Exception:  # whatever the user's layers raise
                return []

        call = str(specs), *rest
        answers = _FINDINGS.of(self.graph, self.request, call, look)
        return answers if len(answers) == len(outputs) else []


def _may_be_batchless(column: Sequence[Any], any_whole: bool) -> bool:
    """Whether all towers give as many rows: of unequal shards, none do."""
    if any(y is None or not y.shape.rank for y in column):
        return False
    sizes = {y.shape[0] for y in column}
    return len(sizes - {None}) <= 1 and (sizes != {None} or any_whole)


def _symbols(model: keras.Model, name: str) -> Any:
    """The "input" or "output" nest of a model made of symbols, or ()."""
    try:
        return getattr(model, name, ())
    except Exception:  # Keras has several, for a model that has none
        return ()


def _first_axis(value: Any) -> int | None:
    shape = getattr(value, "shape", None)
    if shape is None or tf.TensorShape(shape).rank in (None, 0):
        return None
    return shape[0]


def _refusal(i: int, output: tf.Tensor) -> ValueError:
    rules = ["'mean'"] if output.dtype.is_floating else []
    rules += ["'sum'", "'stack'", "'none'"]
    return ValueError(
        f"`merge` is 'concat' for output {i}, but that is no batch: it has as "
        f"many rows, here in shape {output.shape}, whatever the batch has, and "
        "joined it would be there once per tower. Use "
        f"{', '.join(rules[:-1])} or {rules[-1]} for it, in a nest of rules "
        "like the outputs."
    )
