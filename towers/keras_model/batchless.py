"""batchless: outputs of a model that have no row for each of the batch's.

Joined, such an output would be there once per tower: a weight [3, 2] as [9, 2].
From its shape alone it cannot be told: a tower of 3 rows gives [3, 2] too. So
the model is asked what it makes of an unknown number of rows.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from towers.keras_model import checks, layer_graph
from towers.keras_model.calls import ModelCall
from towers.keras_model.request import Request

# What is asked once per model: by what it is called with, first axes.
_told: weakref.WeakKeyDictionary[Any, dict[Any, Any]] = (
    weakref.WeakKeyDictionary()
)


def check_joined(
    graph: layer_graph.LayerGraph,
    inputs: Any,
    divided: Sequence[bool],
    request: Request,
    tower_outputs: Sequence[Any],
    rules: Sequence[str],
) -> None:
    """Raises if "concat" would repeat an output that is no batch.

    A model that has a fixed batch size is left alone, and one that cannot
    say what it makes of an unknown number of rows.

    Args:
      graph: of one model.
      inputs: the checked batch that the towers share.
      divided: for each leaf whether it is split by rows, or whole.
      request: tells the phase, and the call if there is more to it.
      tower_outputs: one nest per tower.
      rules: one per flat output.

    Raises:
      ValueError: names the output and the rules that would do.
    """
    undivided = [not mine for mine in divided]
    columns = list(zip(*[tf.nest.flatten(x) for x in tower_outputs]))
    suspects = [
        i
        for i, (rule, column) in enumerate(zip(rules, columns))
        if rule == "concat" and _may_be_batchless(column, any(undivided))
    ]
    if not suspects or _has_fixed_batch(graph, undivided):
        return
    axes = _first_axes(
        graph, inputs, undivided, request.training, columns, request.tower_fn
    )
    if len(axes) != len(columns):
        return
    for i in suspects:
        seen = {y.shape[0] for y in columns[i]} - {None}
        if axes[i] is not None and seen <= {axes[i]}:
            raise _refusal(i, columns[i][0])


def _may_be_batchless(column: Sequence[Any], any_whole: bool) -> bool:
    """Whether all towers give as many rows: of unequal shards, none do."""
    if any(y is None or not y.shape.rank for y in column):
        return False
    sizes = {y.shape[0] for y in column}
    return len(sizes - {None}) <= 1 and (sizes != {None} or any_whole)


def _has_fixed_batch(
    graph: layer_graph.LayerGraph, undivided: Sequence[bool]
) -> bool:
    symbols = tf.nest.flatten(_symbols(graph.models[0], "input"))
    if len(symbols) != len(undivided):
        undivided = [False] * len(symbols)
    return bool(graph.row_states) or any(
        x.shape[0] is not None
        for x, alone in zip(symbols, undivided)
        if x is not None and x.shape and not alone
    )


def _first_axes(
    graph: layer_graph.LayerGraph,
    inputs: Any,
    undivided: Sequence[bool],
    training: bool | None,
    columns: Sequence[Any],
    call: Callable[..., Any] | None,
) -> list[int | None]:
    """Of each flat output of any number of rows; of none if that fails."""
    model = graph.models[0]
    flat = tf.nest.flatten(inputs)
    if not any(undivided):
        rows = {x.shape[0] for x in flat if x is not None}
        if rows == {None}:  # as the towers were called
            return [_first_axis(column[0]) for column in columns]
        if type(model).call.__module__.split(".")[0] == "keras":
            symbols = tf.nest.flatten(_symbols(model, "output"))
            if symbols:
                return [_first_axis(x) for x in symbols]
    specs = [_spec(x, alone) for x, alone in zip(flat, undivided)]
    rest = [None if x[0] is None else str(x[0].shape[1:]) for x in columns]
    key = (str(tf.nest.pack_sequence_as(inputs, specs)), training, *rest)
    key += (str(call.kind) if isinstance(call, ModelCall) else "",)
    known = _told.setdefault(model, {})
    if key not in known:
        try:
            known[key] = checks.eagerly(
                lambda: _traced(graph, inputs, specs, training, call)
            )
        except Exception:  # whatever the user's layers raise
            known[key] = []
    return known[key]


def _traced(
    graph: layer_graph.LayerGraph,
    inputs: Any,
    specs: Sequence[Any],
    training: bool | None,
    model_call: Callable[..., Any] | None,
) -> list[int | None]:
    """First axes of what a model returns, called once more, on specs.

    Unlike `compute_output_spec` this calls it as towers do: with the phase,
    and with the casts of mixed precision.
    """
    model = graph.models[0]
    axes: list[int | None] = []

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
        axes[:] = [_first_axis(y) for y in tf.nest.flatten(outputs)]

    with _as_before(graph.layers):
        tf.function(call, autograph=False).get_concrete_function(
            *[spec for spec in specs if spec is not None]
        )
    return axes


@contextlib.contextmanager
def _as_before(layers: Sequence[keras.Layer]) -> Iterator[None]:
    """Takes back what layers note in attributes of their own meanwhile."""
    before = [dict(vars(layer)) for layer in layers]
    try:
        yield
    finally:
        for layer, attributes in zip(layers, before):
            for name in set(vars(layer)) - set(attributes):
                object.__delattr__(layer, name)
            for name, value in attributes.items():
                if vars(layer).get(name) is not value:
                    object.__setattr__(layer, name, value)


def _spec(value: Any, alone: bool) -> Any:
    """What a leaf is, of any number of rows; None stays.

    Of a whole one, axes of unknown size are 1: that size shows in an output,
    but not where rows are broadcast against it.
    """
    if value is None:
        return None
    spec = tf.type_spec_from_value(value)
    if spec.shape.rank is None:
        return spec
    if alone:
        shape = [1 if size is None else size for size in spec.shape]
    else:
        shape = [None, *spec.shape[1:]]
    if isinstance(spec, tf.RaggedTensorSpec):
        if alone:
            return spec
        return tf.RaggedTensorSpec(
            shape, spec.dtype, spec.ragged_rank, spec.row_splits_dtype
        )
    return type(spec)(shape, spec.dtype)


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
