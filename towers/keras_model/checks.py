"""checks: whether a model can be made towers of: of Keras 3, and built."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from typing import Any

import keras
import tensorflow as tf

from towers.foreign.keras_layers import (
    all_layers,
    is_built,
    is_recurrent,
    keras_context,
    out_of_scope,
)
from towers.keras_model import model_calls
from towers.keras_model.held import held_variables


def not_compilable(
    name: str, why: str, instead: str = "a model without such layers"
) -> ValueError:
    """What is said of what XLA cannot compile with the rest of its tower."""
    return ValueError(
        f"`jit_compile=True` makes each tower one XLA program, but {name!r} "
        f"{why}. Expected {instead}; or leave out jit_compile=True."
    )


def check_compilable(
    graph: Any, training: bool | None = True, tower_fn: Any = None
) -> None:
    """Raises unless XLA can compile each tower by itself.

    Args:
      graph: the `LayerGraph`.
      training: the phase; False trains no batch norm.
      tower_fn: the user's function, whose calls may have another.
    """

    def refuse(layer: Any, why: str) -> ValueError:
        return not_compilable(getattr(layer, "name", layer), why)

    for layer in graph.layers:
        if not getattr(layer, "supports_jit", True):
            raise refuse(layer, "says supports_jit=False")
    for held in held_variables(graph.layers):
        raise refuse(held.layer, f"reads {held.variable.name!r} where it is")
    for layer, device in graph.pinned_layers:
        raise refuse(layer, f"runs on {device}, by `layer_devices`")
    meeting = [
        layer
        for layer in graph.layers
        if getattr(layer, "needs_all_towers", False)
    ]
    if training is not False or tower_fn is not None:
        meeting += graph.meeting_norms
    for layer in meeting:
        why = "asks all towers, in their midst"
        if graph.meets(layer):
            why += ", for the statistics of the batch (synchronized=True)"
        raise refuse(layer, why)
    if graph.talks(tower_fn):
        raise ValueError(
            "`jit_compile=True` makes each tower one XLA program, but the "
            "`tower_fn` says that it needs all towers. Leave one out."
        )


def check_model(model: Any, nested: bool = False) -> None:
    """Raises a `TypeError` unless `model` is a Keras model.

    With `nested` it may be a list or dict of models and metrics.
    """
    leaves = tf.nest.flatten(model) if nested else [model]
    for leaf in leaves:
        if isinstance(leaf, keras.Model):
            continue
        if nested and isinstance(leaf, keras.metrics.Metric):
            continue
        origin = type(leaf).__mro__
        if any(c.__module__.startswith("tf_keras") for c in origin):
            raise TypeError(
                "`model` is a Keras 2 model "
                f"({type(leaf).__module__}.{type(leaf).__name__}), but towers "
                "needs Keras 3. Build it with `import keras`, without "
                "TF_USE_LEGACY_KERAS=1."
            )
        raise TypeError(
            "`model` must be a keras.Model, or with `tower_fn` a list or "
            f"dict of models and metrics; got {type(leaf).__name__}. For a "
            "single layer, write keras.Sequential([layer])."
        )


@contextlib.contextmanager
def phase_known(training: Any) -> Iterator[None]:
    """Tells of a phase that is a tensor, where a layer asks for its value."""
    try:
        yield
    except tf.errors.OperatorNotAllowedInGraphError as error:
        if not tf.is_tensor(training):
            raise
        raise TypeError(
            "`training` must be True, False or None while the graph is built, "
            f"since layers of Keras 3 go by it in Python; got {training}. "
            "Build towers twice, with training=True and with training=False: "
            "they share the model's variables, in a Session's graph too."
        ) from error


def ensure_built(model: Any, inputs: Any, whole: Sequence[Any] = ()) -> None:
    """Builds a model that has no variables yet, outside any graph.

    Args:
      model: a Keras model.
      inputs: what it will be called with.
      whole: which of them have no axis of rows, see `split_batch`.

    Raises:
      ValueError: it cannot be built from inputs of these shapes.
    """
    if not is_built(model):
        ensure_called(model, model_calls.model_call([inputs], {}, whole))


def ensure_called(model: Any, call: model_calls.ModelCall) -> None:
    """As `ensure_built`, of a model or a layer that will be called so.

    Layers that such a call does not reach may stay without variables.

    Raises:
      ValueError: it cannot be built so.
    """
    if is_built(model):
        return
    try:
        if in_v1_graph():
            eagerly(lambda: _called(model, call))
        elif call.inside:  # of which Keras is to know nothing
            with tf.init_scope(), keras_context()(), out_of_scope():
                _called(model, call)
        else:
            with tf.init_scope(), out_of_scope():
                _called(model, call)
    except Exception as error:  # whatever the user's layer raises
        each = [tuple(x.shape) for x in call.batch]
        shapes = each if len(each) > 1 else each[0]
        raise ValueError(
            f"`model` {model.name!r} is not built, and could not be built "
            f"from inputs of shape {shapes}: {error}. Call it once on real "
            "data before it is given to towers."
        ) from error


@contextlib.contextmanager
def row_alone(model: Any, inputs: Any) -> Iterator[None]:
    """Says what helps where Keras refuses a row of a dataset without batches.

    Rows of one number each are a batch to Keras, which adds the axis.
    """
    try:
        yield
    except ValueError as error:
        batches = [x.shape for x in getattr(model, "inputs", None) or ()]
        shapes = [x.shape for x in tf.nest.flatten(inputs) if x is not None]
        if len(shapes) == len(batches) and all(map(_is_row, shapes, batches)):
            own = ", ".join(str(tuple(shape)) for shape in shapes)
            expected = ", ".join(str(tuple(shape)) for shape in batches)
            error.args = (
                f"{error}\n\nWhat was given, {own}, is a row alone. Expected "
                f"batches, {expected}: write dataset.batch(rows), or x[None] for an "
                "array of one row.",
            )
        raise


def _is_row(shape: tf.TensorShape, batch: Sequence[int | None]) -> bool:
    """Whether a shape is that of a row of what a model takes."""
    return (
        shape.rank == len(batch) - 1
        and batch[0] is None
        and batch[-1] != 1
        and shape.is_compatible_with(batch[1:])
    )


def _called(model: Any, call: model_calls.ModelCall) -> None:
    """Calls a model that has no variables, for it to have them."""
    stateful = [
        layer
        for layer in all_layers(model)
        if is_recurrent(layer) and layer.stateful
    ]
    static = all(x.shape.is_fully_defined() for x in call.batch)
    if not (stateful and static):
        args, kwargs = symbols(call)
        model(*args, **kwargs)
        return
    # Its states have a number of rows, and are made by no symbol.
    args, kwargs = call.bound([tf.zeros(x.shape, x.dtype) for x in call.batch])
    model(*args, **kwargs, **({} if call.inside else {"training": False}))
    for layer in stateful:
        layer.reset_state()


def symbols(call: model_calls.ModelCall) -> Any:
    """(args, kwargs) of a call, with Keras symbols of any number of rows."""
    return call.bound(
        [
            symbol(x, batched=i not in call.whole)
            for i, x in enumerate(call.batch)
        ]
    )


def symbol(value: Any, batched: bool = True) -> Any:
    """The Keras symbol of a tensor, of any number of rows; None stays."""
    if value is None:
        return None
    shape = (None, *value.shape[1:]) if batched else tuple(value.shape)
    kinds = {"sparse": tf.SparseTensor, "ragged": tf.RaggedTensor}
    kind = {name: True for name, c in kinds.items() if isinstance(value, c)}
    dtype = keras.backend.standardize_dtype(value.dtype)
    try:
        return keras.KerasTensor(shape, dtype, **kind)
    except TypeError as error:
        raise ValueError(
            f"Keras {keras.__version__} has no symbols for ragged tensors, so "
            "it cannot tell what a model makes of them. Call the model once on "
            "real data before it is given to towers, and leave out "
            "`loss_on_towers`; or upgrade Keras."
        ) from error


def check_given(model: Any, inputs: Any) -> None:
    """Has Keras say which input is needed, where none is given to split."""
    tensors = [x for x in tf.nest.flatten(inputs) if x is not None]
    if not tensors and is_built(model):
        output_spec(model, inputs)


def output_spec(model: Any, inputs: Any) -> Any:
    """The Keras symbols of what a call of a built model with `inputs` returns.

    That may be another nest than the one declared: of a list of one output, a
    functional model returns the output.
    """
    exactly = functools.partial(symbol, batched=False)
    symbols = tf.nest.map_structure(exactly, inputs)
    are_there = [x is not None for x in tf.nest.flatten(inputs)]
    if any(are_there) and not all(are_there):
        # A functional model looks for the shape of an input that is left out.
        return keras.Operation.compute_output_spec(model, symbols)
    with row_alone(model, inputs):
        declared = model.compute_output_spec(symbols)
    if isinstance(declared, (list, tuple)) and len(declared) == 1:
        return keras.Operation.compute_output_spec(model, symbols)
    return declared


def in_v1_graph() -> bool:
    """Whether ops made here run in a Session."""
    return not tf.compat.v1.executing_eagerly_outside_functions()


def are_built(model: Any) -> bool:
    """Whether all models of a nest have their variables."""
    models = [x for x in tf.nest.flatten(model) if isinstance(x, keras.Model)]
    return all(map(is_built, models))


@tf.autograph.experimental.do_not_convert
def eagerly(function: Callable[[], Any]) -> Any:
    """Calls a function outside of any graph: a fresh thread is eager.

    Raises:
      RuntimeError: eager execution is switched off altogether.
    """

    def call() -> Any:
        if not tf.executing_eagerly():
            raise RuntimeError(
                "towers needs eager execution to read a Keras 3 model, but it "
                "is switched off. Leave out tf.compat.v1.disable_v2_behavior() "
                "and disable_eager_execution(); build the graph under "
                "`with tf.Graph().as_default():`, and all of tf.compat.v1 "
                "works there."
            )
        return function()

    with futures.ThreadPoolExecutor(1) as thread:
        return thread.submit(call).result()
