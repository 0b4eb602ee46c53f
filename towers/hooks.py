"""hooks: what the layers of a model report while it is replayed.

Keras has no public words for it: `_moments` is what a batch norm saw,
`_get_call_context` the training phase of a call, `_expected_batch_size` how many
rows a stateful RNN keeps a state for, and `GLOBAL_STATE_TRACKER` what a thread
knows of the call that it is in. `hooks_test.py` fails when one of them changes.
"""

import contextlib
import contextvars
import copy
import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tensorflow as tf

try:
    import keras
except ImportError as error:  # another backend that is not installed
    raise RuntimeError(
        "towers needs Keras 3 on its TensorFlow backend, but importing Keras "
        f"failed: {error}. Set KERAS_BACKEND=tensorflow."
    ) from error

if not keras.__version__.startswith("3"):
    raise RuntimeError(
        f"towers needs Keras 3; got Keras {keras.__version__}. Upgrade with "
        "`pip install 'keras>=3'`."
    )
if keras.backend.backend() != "tensorflow":
    raise RuntimeError(
        "towers needs Keras on its TensorFlow backend, but KERAS_BACKEND is "
        f"{keras.backend.backend()!r}. Set KERAS_BACKEND=tensorflow before "
        "Keras is imported."
    )

from keras.src.backend.common import global_state

from towers import attached, meeting, merge_rules

_ABSENT = object()
_notes: contextvars.ContextVar[Any] = contextvars.ContextVar(
    "notes", default=None
)


@dataclasses.dataclass(frozen=True)
class Moments:
    """What one call of a batch-norm layer saw in one tower.

    Attributes:
      mean, variance: [channels], over the tower's shard.
      count: scalar, the unmasked positions; None without a mask, when the
        tower's rows say as much.
    """

    mean: tf.Tensor
    variance: tf.Tensor
    count: tf.Tensor | None


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
    graph = notes._graph
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
                mean, variance, said = _met(said[0], tf.size(inputs))
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


def _brought(arguments: Any) -> Any:
    """Tensors on the current device, from where they were made.

    A tower takes an identity of what it is given; what the tower does not
    need itself should not go by way of it.
    """

    def bring(value: Any) -> Any:
        if not isinstance(value, tf.Tensor):
            return value
        notes = attached.get_notes(value)
        while value.op.type == "Identity":
            value = value.op.inputs[0]
        value = tf.identity(value)
        attached.set_notes(value, notes)
        return value

    return tf.nest.map_structure(bring, arguments)


def is_stateful(layer: Any) -> bool:
    """Whether a layer keeps a state for each row, from batch to batch."""
    return (
        isinstance(layer, keras.layers.RNN)
        and layer.stateful
        and layer.states is not None
    )


def has_moments(layer: Any) -> bool:
    return isinstance(layer, keras.layers.BatchNormalization) and hasattr(
        layer, "_moments"
    )


def is_pooled(layer: Any) -> bool:
    """Whether a layer keeps a moving mean and variance of its batches.

    Unless somebody has declared another rule for them.
    """
    return has_moments(layer) and not any(
        merge_rules.declared(v) for v in statistics(layer)
    )


def statistics(layer: Any) -> list[Any]:
    """The variables that a batch norm moves by the moments of its batches."""
    names = ["moving_mean", "moving_variance"]
    if getattr(layer, "renorm", False):
        names += ["moving_stddev", "renorm_mean", "renorm_stddev"]
    return [getattr(layer, name, None) for name in names]


def pooled(
    means: tf.Tensor, variances: tf.Tensor, counts: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """Mean and variance, [channels], of all shards, from those of each.

    The law of total variance: the mean of the variances plus the variance of
    the means, weighted by how much each tower saw (Chan, Golub and LeVeque,
    "Updating formulae and a pairwise algorithm for computing sample
    variances", 1979).

    Args:
      means, variances: [n, channels].
      counts: [n, channels] or [n, 1], of which the shares are taken.
    """
    shares = tf.math.divide_no_nan(counts, tf.reduce_sum(counts, 0))
    mean = tf.reduce_sum(shares * means, 0)
    between = tf.math.squared_difference(means, mean)
    return mean, tf.reduce_sum(shares * (variances + between), 0)


def _met(seen: Moments, size: tf.Tensor) -> tuple[Any, Any, list[Moments]]:
    """Moments of the whole batch, and for one tower what it says of them.

    One vector crosses to where towers meet, and one back.
    """
    channels = seen.mean.shape[0]
    count = seen.count
    if count is None:
        count = tf.cast(size // channels, seen.mean.dtype)
    said = []

    def pool(parts: tf.Tensor) -> tf.Tensor:  # [n, 2 * channels + 1]
        seen = tf.split(parts, [channels, channels, 1], 1)
        said.append(Moments(*pooled(*seen), None))
        return tf.stack([said[0].mean, said[0].variance])

    part = tf.concat([seen.mean, seen.variance, count[tf.newaxis]], 0)
    whole = meeting.asked(pool, (part[tf.newaxis],), pure=True)
    return *tf.unstack(whole), said
