"""hooks: what the layers of a model report while it is replayed.

Keras has no public words for it: `_moments` is what a batch norm saw,
`_get_call_context` the training phase of a call, `_expected_batch_size` how many
rows a stateful RNN keeps a state for, and `GLOBAL_STATE_TRACKER` what a thread
knows of the call that it is in. `hooks_test.py` fails when one of them changes.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from towers.engine import meeting
from towers.foreign import keras_layers
from towers.foreign.keras_layers import has_moments, is_stateful
from towers.keras_model.moments import Moments, is_pooled, met

_ABSENT = object()


_notes: contextvars.ContextVar[Any] = contextvars.ContextVar(
    "notes", default=None
)


class Notes:
    """What hooks note of one replay, in the thread that it runs in.

    Attributes:
      training: the phase that layers go by.
      stateless: what holds the values of variables.
      scopes: the name scopes of the calls that it is in, outermost first.
      moments, seen: as `moments` and `layer_outputs` of a `Replay`.
      sums: the losses that are sums over rows.
    """

    def __init__(
        self,
        graph: Any,
        scope: str,
        training: bool | None,
        stateless: Any,
    ):
        self.training = training
        self.stateless = stateless
        self.scopes = [scope]
        self.moments: dict[int, list[Moments]] = {}
        self.seen: dict[str, list[Any]] = {}
        self.sums: list[tf.Tensor] = []
        self.graph = graph

    def again(self, stateless: Any, scopes: Sequence[str]) -> "Notes":
        """Other notes of the same tower, in the calls of `scopes`."""
        notes = Notes(self.graph, "", self.training, stateless)
        notes.scopes = list(scopes)
        return notes

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        token = _notes.set(self)
        try:
            yield
        finally:
            _notes.reset(token)

    @staticmethod
    def of(graph: Any) -> "Notes | None":
        """The notes of the current replay, if that is one of `graph`."""
        notes = _notes.get()
        return notes if notes is not None and notes.graph is graph else None


def note_update(variable: Any, before: tf.Tensor) -> None:
    """Notes that a tower updates a variable, if that is for all towers.

    Args:
      variable: one of the model's.
      before: its value in the tower.

    Raises:
      ValueError: a function of `all_towers` updates it, but of its towers only
        one would hear of that.
    """
    notes = _notes.get()
    if notes is None or not meeting.in_function():
        return
    graph = notes.graph
    if graph.is_seed(graph.index_of(variable)):
        meeting.note_draw(variable, before)
    elif all(variable is not v for v in graph.metric_variables):
        raise ValueError(
            f"The function that all_towers was given updates {variable.path!r}"
            ", which it does in one tower only. Expected it to return the new "
            "value, and the layer to assign that, as in "
            "self.count.assign(all_towers(function, x))."
        )


@contextlib.contextmanager
def hooked(graph: Any) -> Iterator[None]:
    """While open, a replay names each layer's scope, and takes notes.

    Towers in step are replayed side by side: each hook asks whose call it
    is, by the thread.

    Args:
      graph: a `LayerGraph`.
    """
    if graph.is_hooked:
        yield
        return
    index = {id(v): i for i, v in enumerate(graph.variables)}

    def called(layer: keras.Layer) -> Callable[..., Any]:
        original = layer.call
        device = graph.pins.get(id(layer))

        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            notes = Notes.of(graph)
            if notes is None:
                return original(*args, **kwargs)
            scopes = notes.scopes
            scopes.append(f"{scopes[-1]}{layer.name}/")
            try:
                with tf.name_scope(scopes[-1]):
                    if device is None:
                        outputs = original(*args, **kwargs)
                    else:
                        with tf.device(device):
                            args, kwargs = _brought((args, kwargs))
                            outputs = original(*args, **kwargs)
            finally:
                path = scopes.pop()[len(scopes[0]) : -1]
            if path in graph.wanted:
                notes.seen.setdefault(path, []).append(outputs)
            return outputs

        return call

    def phased(layer: keras.Layer) -> Callable[[], Any]:
        original = layer._get_call_context

        def opened() -> Any:
            context, notes = original(), Notes.of(graph)
            if notes is not None and notes.training is not None:
                if context.entry_layer is layer:  # called by no other
                    context.training = notes.training
            return context

        return opened

    def watched(layer: keras.layers.BatchNormalization) -> Callable:
        original = layer._moments

        def saw(inputs: tf.Tensor, mask: tf.Tensor | None) -> Any:
            notes = Notes.of(graph)
            if notes is None:
                return original(inputs, mask)
            synchronized = layer.synchronized
            try:
                # True asks tf.distribute for the sum of all replicas.
                layer.synchronized = False
                mean, variance = original(inputs, mask)
            finally:
                layer.synchronized = synchronized
            count = None
            if mask is not None:
                count = tf.reduce_sum(tf.cast(mask, mean.dtype))
            said = [Moments(mean, variance, count)]
            if synchronized:
                mean, variance, said = met(said[0], tf.size(inputs))
            if is_pooled(layer):
                key = index[id(layer.moving_mean)]
                notes.moments.setdefault(key, []).extend(said)
            return mean, variance

        return saw

    def summed(layer: keras.Layer) -> Callable:
        original = layer.activity_regularizer

        def term(output: tf.Tensor) -> tf.Tensor:
            # Keras divides this by the rows, or before 3.14 takes it as
            # it is, a sum over the rows.
            loss, notes = original(output), Notes.of(graph)
            if notes is not None:
                notes.sums.append(loss)
            return loss

        return term

    def of_rows(variable: Any) -> Callable:
        original = variable.assign

        def assign(value: Any) -> Any:
            """Past a check that all rows of the batch are there."""
            notes = Notes.of(graph)
            if notes is None:
                return original(value)
            value = tf.cast(value, variable.dtype)
            notes.stateless.add_update((variable, value))
            return value

        return assign

    roots = {id(m) for m in graph.models} if len(graph.models) == 1 else {}
    shadows: list[tuple[Any, str, Any]] = []
    before: list[Any] = []
    try:
        for layer in graph.layers:
            names: dict[str, Any] = {"_get_call_context": phased(layer)}
            if id(layer) not in roots:
                names["call"] = called(layer)
            if has_moments(layer):
                names["_moments"] = watched(layer)
            if layer.activity_regularizer is not None:
                names["activity_regularizer"] = summed(layer)
            if is_stateful(layer):
                names["_expected_batch_size"] = None
            shadows += [(layer, *item) for item in names.items()]
        for i in graph.row_states:
            variable = graph.variables[i]
            shadows.append((variable, "assign", of_rows(variable)))
        for owner, name, value in shadows:
            before.append(vars(owner).get(name, _ABSENT))
            # Past Keras's own tracking of attributes.
            object.__setattr__(owner, name, value)
        graph.is_hooked = True
        yield
    finally:
        graph.is_hooked = False
        for (owner, name, _), value in zip(shadows, before):
            if value is _ABSENT:
                object.__delattr__(owner, name)
            else:
                object.__setattr__(owner, name, value)


def _brought(arguments: Any) -> Any:
    """Tensors on the current device, from where they were made.

    A tower takes an identity of what it is given; what the tower does not
    need itself should not go by way of it.
    """

    def bring(value: Any) -> Any:
        if not isinstance(value, tf.Tensor):
            return value
        notes = keras_layers.get_notes(value)
        while value.op.type == "Identity":
            value = value.op.inputs[0]
        value = tf.identity(value)
        keras_layers.set_notes(value, notes)
        return value

    return tf.nest.map_structure(bring, arguments)
