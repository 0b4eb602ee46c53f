"""hooks: what the layers of a model report while it is replayed.

`HOOKS` is the table of what is taken the place of while a model is replayed.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf

from towers.engine import errand, host
from towers.foreign import (
    keras_layers,
    keras_machine,
    tf_random,
    tf_random_graphs,
)
from towers.foreign.keras_layers import (
    has_moments,
    is_quantized,
    is_stateful,
)
from towers.foreign.keras_masks import forget_masks
from towers.foreign.patches import patched
from towers.keras_model import widths
from towers.keras_model.brought import brought
from towers.keras_model.fixed_rows import noise_of_rows
from towers.keras_model.moments import is_pooled, moments_of, moments_of_all
from towers.keras_model.notes import Notes, notes_here
from towers.keras_model.pieces import computed

Function = Callable[..., Any]


@contextlib.contextmanager
def hooked(graph: Any, is_plain: bool = False) -> Iterator[None]:
    """While open, a replay names each layer's scope, and takes notes.

    Towers in step are replayed side by side: each hook asks whose call it
    is, by the thread.

    Args:
      graph: a `LayerGraph`.
      is_plain: whether nothing else is listened to, see `guards.Guards`.
    """
    if graph.is_hooked:
        yield
        return
    hooks = [
        (layer, name, hook)
        for layer in graph.layers
        for has, name, hook in HOOKS
        if has(layer)
    ]
    shadows = [
        (layer, name, hook(graph, layer, getattr(layer, name, None)))
        for layer, name, hook in hooks
    ]
    if len(graph.models) == 1 and not graph.is_part:
        # Its scope is the tower's own.
        root = graph.models[0]
        shadows = [x for x in shadows if x[:2] != (root, "call")]
    shadows += [
        (layer, "call", _placed(graph, layer, layer.call))
        for layer, _ in graph.pinned_layers
        if all(layer is not other for other in graph.layers)  # an operation
    ]
    # Of towers, which each have their own.
    shadows += [(layer, keras_layers.ADDED, set()) for layer in graph.layers]
    for i in graph.row_states:
        state = graph.variables[i]
        shadows.append(
            (state, "assign", _unchecked(graph, state, state.assign))
        )
    # Keras sets it where cuDNN is taken, which is a tower's affair.
    shadows += [
        (layer, "supports_jit", layer.supports_jit)
        for layer in graph.layers
        if keras_layers.is_recurrent(layer)
    ]
    flags = (graph, "is_hooked", True), (graph, "is_plain", is_plain)
    with contextlib.ExitStack() as stack:
        stack.enter_context(patched(*flags, *shadows))
        for listens in () if is_plain else _LISTENS:
            stack.enter_context(listens())
        yield


# What is listened to besides: whoever asks for the device, makes ragged rows dense, or
# draws random numbers.
_LISTENS: tuple[Callable[[], contextlib.AbstractContextManager[None]], ...] = (
    lambda: keras_machine.asks_device(_device, host.on_host, _portable),
    lambda: widths.of_batch(notes_here),
    lambda: tf_random.asks(_seeds, _drawn),
)


def _device() -> str | None:
    """The device that a tower is on here and now; None outside of towers."""
    notes = notes_here()
    if notes is None or tf.executing_eagerly():
        return None
    return host.device_here() or notes.device or notes.home


def _drawing() -> Notes | None:
    """The notes of a tower that draws here and now, for itself."""
    notes = notes_here()
    if notes is None or notes.draws is None or errand.is_run():
        return None
    return notes if tf_random_graphs.is_made_in(notes.draws.root) else None


def _seeds(get_seed: Function, op_seed: Any) -> Any:
    """The seeds of a random op; a tower may have others than the batch."""
    notes = _drawing()
    if notes is None:
        return get_seed(op_seed)
    return notes.draws.seeds(notes.path, get_seed, op_seed)


def _drawn(name: str, by: str, original: Function, arguments: Any) -> Any:
    """What a stateless function draws; a tower may draw its rows of it."""
    notes = _drawing()
    if notes is None:
        return original(**arguments)
    return notes.draws.drawn(notes.path, name, by, original, arguments)


def _portable() -> bool:
    """Whether what a tower builds is to run where there are no GPUs, too."""
    notes = notes_here()
    return notes is not None and notes.graph.is_portable


def _placed(graph: Any, layer: Any, original: Function) -> Function:
    """A layer's call, under its name and on its own device."""
    if graph.cuts.pins:
        original = computed.call_in_pieces(graph, layer, original)

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        notes = Notes.of(graph)
        if notes is None:
            return original(*args, **kwargs)
        if is_stateful(layer) and not args[1:]:
            kwargs = _from_states(layer, kwargs)
        scopes, outer = notes.scopes, notes.device
        if notes.masks is not None:
            kwargs = notes.masks.in_arguments(layer, kwargs)
        compute, tables = original, notes.stateless.tables
        if tables is not None:
            compute = tables.call(layer, original, notes)
        phase = kwargs.get("training", notes.training)
        device = graph.device_of(layer, notes.tower)
        scopes.append(f"{scopes[-1]}{layer.name}/")
        try:
            with tf.name_scope(scopes[-1]), _noised(layer, args, phase, notes):
                if device in (None, outer):
                    outputs = compute(*args, **kwargs)
                else:
                    notes.device = device
                    with tf.device(device):
                        before = args, kwargs
                        args, kwargs = brought(before)
                        outputs = compute(*args, **kwargs)
                        forget_masks(before, (args, kwargs))
            if graph.layer_outputs and notes.path in graph.layer_outputs:
                notes.layer_outputs.setdefault(notes.path, []).append(outputs)
        finally:
            notes.device = outer
            scopes.pop()
        return outputs

    return call


def _noised(
    layer: Any, args: Any, phase: Any, notes: Notes
) -> contextlib.AbstractContextManager[None]:
    place = notes.place  # None where nobody listens for noise
    if place is None:
        return contextlib.nullcontext()
    return noise_of_rows(layer, args, phase, place)


def _masked(graph: Any, layer: Any, original: Function) -> Function:
    """A layer's masks, of the tower's rows."""

    @functools.wraps(original)
    def masks(*args: Any, **kwargs: Any) -> Any:
        result, notes = original(*args, **kwargs), Notes.of(graph)
        if notes is None or notes.masks is None:
            return result
        return notes.masks.of(layer, result)

    return masks


def _from_states(layer: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a stateful RNN, with the tower's rows of its states.

    Keras takes the variables themselves, which have the shape of all rows.
    """
    if kwargs.get("initial_state") is not None:
        return kwargs
    states = tf.nest.flatten(layer.states)
    own = [tf.convert_to_tensor(state) for state in states]
    packed = tf.nest.pack_sequence_as(layer.states, own)
    return {**kwargs, "initial_state": packed}


def _phased(graph: Any, layer: Any, original: Function) -> Function:
    """A layer's call context, of the tower's phase."""

    def opened() -> Any:
        context, notes = original(), Notes.of(graph)
        if notes is not None and notes.training is not None:
            if context.entry_layer is layer:  # called by no other
                context.training = notes.training
        return context

    return opened


def _noted(graph: Any, layer: Any, original: Function) -> Function:
    """A batch norm's moments, which are noted; of all towers if they meet."""

    def moments(inputs: tf.Tensor, mask: tf.Tensor | None) -> Any:
        notes = Notes.of(graph)
        if notes is None:
            return original(inputs, mask)
        # True asks tf.distribute for the sum of all replicas.
        with patched((layer, "synchronized", False)):
            mean, variance = original(inputs, mask)
        own = [moments_of(layer, inputs, mask, (mean, variance))]
        if graph.meets(layer):
            name = widths.path_or_model(graph, notes.path)
            mean, variance, own = moments_of_all(own[0], tf.size(inputs), name)
        if is_pooled(layer):
            key = graph.index_of(layer.moving_mean)
            notes.moments.setdefault(key, []).extend(own)
        return mean, variance

    return moments


def _summed(graph: Any, _: Any, original: Function) -> Function:
    """An activity regulariser, whose loss is noted as a sum over rows."""

    def term(output: tf.Tensor) -> tf.Tensor:
        loss, notes = original(output), Notes.of(graph)
        if notes is not None:
            notes.sums.append(loss)
        return loss

    return term


def _any_number(*_: Any) -> None:
    """How many rows a stateful RNN expects: a tower has some of them."""


def _unchecked(graph: Any, variable: Any, original: Function) -> Function:
    """The assignment of an RNN's state, past a check that all rows are there."""

    def assign(value: Any) -> Any:
        notes = Notes.of(graph)
        if notes is None:
            return original(value)
        value = tf.cast(value, variable.dtype)
        notes.stateless.add_update((variable, value))
        return value

    return assign


# Regularisers that are sums over rows; of others the graph tells.
_SUMS = (keras.regularizers.L1, keras.regularizers.L2, keras.regularizers.L1L2)
# (which layers, their attribute, what takes its place)
HOOKS: list[tuple[Callable[[Any], bool], str, Callable[..., Any]]] = [
    (lambda layer: True, keras_layers.CALL_CONTEXT, _phased),
    (lambda layer: True, "call", _placed),
    (lambda layer: True, "compute_mask", _masked),
    (is_quantized, "quantized_call", _placed),
    (has_moments, keras_layers.MOMENTS, _noted),
    (
        lambda layer: type(layer.activity_regularizer) in _SUMS,
        "activity_regularizer",
        _summed,
    ),
    (is_stateful, keras_layers.EXPECTED_ROWS, _any_number),
]
