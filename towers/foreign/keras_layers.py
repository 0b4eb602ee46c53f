"""keras_layers: what Keras knows of layers, variables and tensors, privately.

It has no public words for the mask and the logits of a tensor (`_keras_mask`,
`_keras_logits`); for what a batch norm saw (`_moments`) and how it
renormalises (`_update_renorm_statistics`), the training phase of a call
and what else layers pass on to those that they call (`_get_call_context`,
`_call_context_args`, `_register_call_context_args`), how many rows a stateful RNN keeps a state for
(`_expected_batch_size`), all nested layers (`_flatten_layers`), the losses that
it added itself (`_loss_ids`), and the metrics
that are attributes, without those of `compile` (`_metrics`); for the variable
behind a Keras variable (`_value`) and what an optimizer knows it by
(`_unique_id`); and for what a thread knows of the call that it is in
(`GLOBAL_STATE_TRACKER`), whose names begin variables' paths (`name_scope_stack`),
with its phase (`current_call_ctx`), and the `stateless_scope` and the
`symbolic_scope` that are open; for whether a layer computes its outputs again in the
backward pass (`_remat_mode`), and for the class of a model that is made of symbols
(`Functional`).
`keras_layers_test.py` fails when one of them changes.
"""

import contextlib
import copy
import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf
from keras.src.backend.common import global_state
from keras.src.models.functional import Functional

# Attributes of layers: of all (two), of batch norms, of stateful RNNs.
ADDED = "_loss_ids"
CALL_CONTEXT = "_get_call_context"
MOMENTS = "_moments"
EXPECTED_ROWS = "_expected_batch_size"

# An attribute of ours on TensorFlow's variables.
_MEANT = "_towers_meant_for"


def get_mask(tensor: Any) -> tf.Tensor | None:
    """The Keras mask that a layer attached to its output."""
    return getattr(tensor, "_keras_mask", None)


def is_mask_of_argument(layer: keras.Layer, name: str) -> bool:
    """Whether Keras gives the mask of an argument of `call` by this name."""
    argument = name.removesuffix("_mask")
    return argument != name and argument in getattr(
        layer, "call_signature_parameters", ()
    )


def set_mask(tensor: Any, mask: Any) -> None:
    """Attaches a Keras mask to a tensor."""
    set_notes(tensor, [{"mask": mask}])


def get_masks(nest: Any) -> list[dict[str, tf.Tensor | None]]:
    """For each flat tensor its Keras mask, as `set_notes` takes them."""
    return [{"mask": get_mask(x)} for x in tf.nest.flatten(nest)]


def get_notes(outputs: Any) -> list[dict[str, tf.Tensor | None]]:
    """What Keras attached to each flat output: its mask and its logits.

    Losses on probabilities take the logits, if those are known, because
    probabilities underflow.
    """

    def logits(output: Any) -> tf.Tensor | None:
        if activation(output):
            return output.op.inputs[0]
        return getattr(output, "_keras_logits", None)

    return [
        {"mask": get_mask(x), "logits": logits(x)}
        for x in tf.nest.flatten(outputs)
    ]


def set_notes(outputs: Any, notes: Sequence[dict[str, Any]]) -> None:
    """Attaches to flat outputs what `get_notes` says of others."""
    for output, note in zip(tf.nest.flatten(outputs), notes):
        for name, value in note.items():
            if value is not None:
                setattr(output, f"_keras_{name}", value)


def activation(output: Any) -> str | None:
    """ "Softmax" or "Sigmoid", if the op that made a tensor is that."""
    if not isinstance(output, tf.Tensor) or hasattr(output, "numpy"):
        return None  # eager tensors do not know where they come from
    kind = output.op.type
    return kind if kind in ("Softmax", "Sigmoid") else None


def context_arguments(layer: keras.Layer) -> set[str]:
    """Arguments of a call, beside the phase, that reach the layers inside.

    A layer registers them, since Keras 3.12, and need not have them in its `call`.
    """
    return getattr(layer, "_call_context_args", set()) - {"training"}


def take_context(wrapper: keras.Layer, layer: keras.Layer) -> None:
    """Registers for the calls of a wrapper what the layer has registered."""
    names = context_arguments(layer)
    if names:
        wrapper._register_call_context_args(*names)


def context_values(layer: keras.Layer) -> dict[str, Any]:
    """What the calls under way pass on to a layer, beside the phase."""
    with keras_context()():  # where there is no call, Keras would begin one
        values = dict(vars(layer._get_call_context()))
    for name in ("entry_layer", "training"):
        values.pop(name, None)
    return values


def phase_here() -> Any:
    """The phase that the calls under way pass on to layers; None for none."""
    context = global_state.get_global_attribute("current_call_ctx")
    return getattr(context, "training", None)


def scope_here() -> keras.StatelessScope | None:
    """What has values, or symbols, in the place of variables at the moment."""
    return global_state.get_global_attribute("stateless_scope")


def in_symbols() -> bool:
    """Whether Keras is at work to see which shapes a layer makes."""
    return global_state.get_global_attribute("symbolic_scope") is not None


@contextlib.contextmanager
def out_of_scope() -> Iterator[None]:
    """While open, variables are variables, unless Keras looks at shapes."""
    scope = scope_here()
    if scope is None or in_symbols():
        yield
        return
    global_state.set_global_attribute("stateless_scope", None)
    try:
        yield
    finally:
        global_state.set_global_attribute("stateless_scope", scope)


def keras_context() -> Callable[[], contextlib.AbstractContextManager[None]]:
    """What makes the Keras call that this one is in the current one again.

    Its phase, dtype policy and scopes are copies.
    """
    here = dict(vars(global_state.GLOBAL_STATE_TRACKER))

    @contextlib.contextmanager
    def entered() -> Iterator[None]:
        current = vars(global_state.GLOBAL_STATE_TRACKER)
        before = dict(current)
        current.clear()
        current.update({name: copy.copy(value) for name, value in here.items()})
        try:
            yield
        finally:
            current.clear()
            current.update(before)

    return entered


@contextlib.contextmanager
def out_of(layer: keras.Layer) -> Iterator[None]:
    """While open, paths of variables begin where this layer is called."""
    scopes = global_state.get_global_attribute("name_scope_stack") or []
    kept: list[Any] = []
    while scopes and scopes[-1].caller is layer:
        kept.append(scopes.pop())
    try:
        yield
    finally:
        scopes.extend(reversed(kept))


def carried(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, for another thread, in the Keras call that this one is in.

    Its phase, dtype policy and scopes are copies.
    """
    context = keras_context()
    thread = threading.get_ident()

    def call(*args: Any) -> Any:
        if threading.get_ident() == thread:
            return function(*args)
        with context():
            return function(*args)

    return call


def is_recurrent(layer: Any) -> bool:
    """Whether a layer may take cuDNN."""
    return isinstance(layer, keras.layers.RNN)


def is_stateful(layer: Any) -> bool:
    """Whether a layer keeps a state for each row, from batch to batch."""
    return (
        isinstance(layer, keras.layers.RNN)
        and layer.stateful
        and layer.states is not None
    )


def is_quantized(layer: Any) -> bool:
    """Whether Keras calls `quantized_call` in the place of a layer's `call`."""
    return getattr(layer, "quantization_mode", None) is not None


def is_seed(variable: Any) -> bool:
    """Whether this variable is the state of a `SeedGenerator`."""
    return variable.name == "seed_generator_state"


def has_moments(layer: Any) -> bool:
    return isinstance(layer, keras.layers.BatchNormalization) and hasattr(
        layer, MOMENTS
    )


def raw(variable: Any) -> tf.Variable:
    """The TensorFlow variable, without the casts of mixed precision."""
    return getattr(variable, "_value", variable)


def device_of(variable: Any) -> str:
    """The device that a variable is meant for, which may be absent here."""
    own = raw(variable)
    return getattr(own, _MEANT, None) or own.device


def mark_device(variable: Any, device: str) -> None:
    """Notes the device that a variable is meant for, as it is absent here."""
    setattr(raw(variable), _MEANT, device)


def is_made(variable: keras.Variable) -> bool:
    """Whether a Keras variable has its value, and not an initializer yet."""
    return variable._value is not None


def replace_raw(variable: Any, new: tf.Variable) -> None:
    """Puts another TensorFlow variable behind a Keras variable."""
    new._unique_id = raw(variable)._unique_id  # the optimizer knows it by this
    variable._value = new


def made_by_strategy(variable: tf.Variable) -> bool:
    """Whether a variable consists of parts, one for each replica's device."""
    return type(variable).__module__.startswith("tensorflow.python.distribute")


def children(layer: keras.Layer) -> list[keras.Layer]:
    """The layers that a layer holds, without those that they hold."""
    return layer._flatten_layers(include_self=False, recursive=False)


def bare_operations(layer: Any) -> list[Any]:
    """What a functional model calls that is no layer, as in `x + y`."""
    return [
        operation
        for operation in getattr(layer, "operations", ())
        if not isinstance(operation, keras.Layer)
    ]


def is_keras_own(what: Any) -> bool:
    """Whether all that something computes is written in Keras.

    What takes a function with its inputs, as `keras.ops.map`, is not.

    Args:
      what: a class or a function; or a layer, an operation, a loss or a metric,
        with the functions among its attributes: an activation, or what a `Lambda`
        calls.
    """
    is_kind = isinstance(what, type) or inspect.isroutine(what)
    module = (what if is_kind else type(what)).__module__ or ""
    if not module.startswith("keras.") or module.endswith(".ops.core"):
        return False
    # A model calls its layers, which are asked.
    if is_kind or isinstance(what, keras.Model):
        return True
    parts: list[Any] = []
    for value in vars(what).values():
        parts += value if isinstance(value, (list, tuple)) else [value]
    modules = [getattr(x, "__module__", None) for x in parts if callable(x)]
    return all(
        # Of ours is what speaks for a layer in pieces.
        (m or "").split(".")[0] in ("keras", "tensorflow", "towers")
        for m in modules
    )


def is_as_written(layer: Any, kinds: tuple[type, ...]) -> bool:
    """Whether a layer is one of these kinds of Keras's, and computes just that.

    Not if it is of a subclass, quantized, or computes something anew in the backward
    pass; nor with a function of a user's own, in the place of a method too.

    Args:
      layer: any.
      kinds: classes of Keras's; all models that are made of symbols count.
    """
    kind = type(layer)
    return (
        (kind in kinds or kind is Functional)
        and is_keras_own(kind.call)
        and not {"call", "compute_mask"} & vars(layer).keys()
        and is_keras_own(layer)
        and not is_quantized(layer)
        and getattr(layer, "_remat_mode", None) is None
    )


def has_added(layer: keras.Layer, loss: tf.Tensor) -> bool:
    """Whether it is this layer that added a loss, in a `StatelessScope`."""
    return id(loss) in layer._loss_ids


def forget_added(layer: keras.Layer) -> None:
    """Begins a set of losses that a layer has added, and leaves the old one."""
    object.__setattr__(layer, ADDED, set())


def kept_metrics(layer: keras.Layer) -> list[keras.metrics.Metric]:
    """The metrics that are attributes of a layer, or of a model."""
    return layer._metrics


def renormalize(
    layer: keras.layers.BatchNormalization, mean: tf.Tensor, variance: tf.Tensor
) -> None:
    """Updates what a batch norm with `renorm` keeps, from a batch's moments."""
    layer._update_renorm_statistics(mean, variance)


def all_layers(model: Any) -> list[keras.Layer]:
    """The layers of a model or layer, or of a nest of them, nested ones too."""
    return unique(
        layer
        for m in tf.nest.flatten(model)
        if isinstance(m, keras.Layer)
        for layer in m._flatten_layers()
    )


def unique(items: Any) -> list[Any]:
    return list({id(item): item for item in items}.values())


def is_built(model: keras.Model) -> bool:
    """Whether the model and all its layers have their variables."""
    return all(
        # A TextVectorization never calls the lookup that it has.
        layer.built or isinstance(layer, keras.layers.StringLookup)
        for layer in model._flatten_layers()
    )
