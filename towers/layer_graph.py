"""LayerGraph: a Keras model as a pure function, replayed layer by layer.

With `template.py`, `compiled.py` and `proxy.py` the only file that touches
Keras's internals, because Keras has no public word for them: `_flatten_layers`
(all nested layers), `_moments` (what a batch norm saw), `_get_call_context` (the
training phase of a call), `_value` and `_unique_id` (the variable behind a Keras
variable), `_expected_batch_size` (of a stateful RNN), `_keras_mask` and
`_keras_logits`, and `GLOBAL_STATE_TRACKER` (what a
thread knows of the call that it is in). `layer_graph_test.py` fails when one of
them changes.
"""

import contextlib
import contextvars
import copy
import dataclasses
import difflib
import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
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

from towers import meeting

# Towers draw from streams this far apart, so that neighbouring seeds of two
# layers do not meet: 2**32 over the golden ratio, below 2**31 after `floormod`.
_STREAM = 1_640_531_527


_ABSENT = object()


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


@dataclasses.dataclass(frozen=True)
class Replay:
    """What one tower computed.

    Attributes:
      outputs: what the model (or the tower function) returned.
      notes: what Keras attached to each flat output, see `get_notes`.
      activations: for each flat output "Softmax" or "Sigmoid", if its logits
        are among the notes and it is just that of them; else None.
      losses: scalars from `add_loss` and activity regularisers, each as
        {rule: scalar} with the rule by which those of all towers merge.
      state: new values by index into `LayerGraph.variables`.
      moments: by batch-norm layer's index, one `Moments` per call.
      layer_outputs: output by layer path, a list if called several times.
    """

    outputs: Any
    notes: list[dict[str, tf.Tensor | None]]
    activations: list[str | None]
    losses: list[dict[str, tf.Tensor]]
    state: dict[int, tf.Tensor]
    moments: dict[int, list[Moments]]
    layer_outputs: dict[str, Any]


class LayerGraph:
    """A built model (or a nest of models) as a function of its variables.

    Args:
      model: a built `keras.Model`, or a list or dict of models and metrics.
      layer_outputs: paths of layers whose outputs are wanted.
      layer_devices: the devices of layers, by name or path, that run
        elsewhere than their tower.

    Raises:
      ValueError: there is no such layer.
    """

    def __init__(
        self,
        model: Any,
        layer_outputs: Sequence[str] = (),
        layer_devices: Mapping[str, str] | None = None,
    ):
        self.model = model
        leaves = tf.nest.flatten(model)
        self.models = [m for m in leaves if isinstance(m, keras.Model)]
        self.wanted = tuple(layer_outputs)
        self.variables = _unique(v for m in self.models for v in m.variables)
        metrics = _unique(
            v
            for m in leaves
            for v in (_metric_variables(m) if m in self.models else m.variables)
        )
        known = {id(v) for v in self.variables}
        self.metric_variables = [v for v in metrics if id(v) not in known]
        self.variables += self.metric_variables
        self.layers = _unique(
            layer for m in self.models for layer in _layers(m)
        )
        known = {id(v) for v in self.variables}
        states = _unique(
            v
            for layer in self.layers
            if _is_stateful(layer)
            for v in tf.nest.flatten(layer.states)
        )
        # Keras counts them among no layer's variables.
        self.variables += [v for v in states if id(v) not in known]
        self.row_states = [self.index_of(v) for v in states]
        self.trainable = [
            i
            for i, v in enumerate(self.variables)
            if any(v is t for m in self.models for t in m.trainable_variables)
        ]
        by_path = self._by_path()
        for name in self.wanted:
            if name not in by_path:
                raise _no_layer("layer_outputs", name, list(by_path))
        pins = layer_devices or {}
        self._pins = {id(_found(by_path, n)): d for n, d in pins.items()}
        homes = {
            id(v): device
            for name, device in pins.items()
            for v in _found(by_path, name).variables
        }
        self.pinned = {
            i: homes[id(v)]
            for i, v in enumerate(self.variables)
            if id(v) in homes
        }

    def _by_path(self) -> dict[str, keras.Layer]:
        """Layers as "conv2d", or "encoder/conv2d" in a nested model.

        With several models, paths start with the model's name.
        """

        def below(layer: Any, prefix: str) -> Iterator[Any]:
            for child in layer._flatten_layers(
                include_self=False, recursive=False
            ):
                yield prefix + child.name, child
                yield from below(child, f"{prefix}{child.name}/")

        if len(self.models) == 1:
            return dict(below(self.models[0], ""))
        return {
            path: layer
            for m in self.models
            for path, layer in ((m.name, m), *below(m, f"{m.name}/"))
        }

    def is_seed(self, index: int) -> bool:
        """Whether this variable is the state of a `SeedGenerator`."""
        return self.variables[index].name == "seed_generator_state"

    def stream(self, index: int, value: tf.Tensor, tower: int) -> tf.Tensor:
        """The seed state [seed, counter] of one tower; tower 0 has the own."""
        return value + tf.constant([tower * _STREAM, 0], value.dtype)

    def regularization_loss(self, index: int, home: Any) -> tf.Tensor | None:
        """A variable's weight regulariser, computed where it lives."""
        regularizer = self.variables[index].regularizer
        if regularizer is None:
            return None
        with tf.device(home.device):
            return regularizer(home.variable.read_value())

    def replay(
        self,
        values: Sequence[tf.Tensor],
        inputs: Any,
        training: bool | None,
        scope: str,
        tower_fn: Callable[..., Any] | None = None,
    ) -> Replay:
        """Calls the model with `values` for its variables, changing none.

        To be called while `hooked`.

        Args:
          values: one tensor per variable of `self.variables`.
          inputs: the nest that the model is called with.
          training: what layers that are not told otherwise go by.
          scope: an absolute name scope, with its slash.
          tower_fn: `f(model, inputs)` in the place of `model(inputs)`.
        """
        stateless = _Scope(self.variables, values)
        notes = _Notes(self, scope, training, stateless)
        with (
            tf.name_scope(scope),
            stateless,
            tf.variable_creator_scope(_refuse_variable),
            notes.taken(),
        ):
            if tower_fn is not None:
                outputs = tower_fn(self.model, inputs)
            elif training is None:
                outputs = self.model(inputs)
            else:
                outputs = self.model(inputs, training=training)
            losses = [loss for m in self.models for loss in _own_losses(m)]
        outputs = tf.nest.map_structure(_as_tensor, outputs)
        state = {}
        for i, (variable, value) in enumerate(zip(self.variables, values)):
            new = stateless.get_current_value(variable)
            if new is not value:
                state[i] = new
        return Replay(
            outputs,
            get_notes(outputs),
            [_activation(x) for x in tf.nest.flatten(outputs)],
            [
                {"sum" if any(loss is s for s in notes.sums) else "mean": loss}
                for loss in losses
            ],
            state,
            notes.moments,
            {k: v[0] if len(v) == 1 else v for k, v in notes.seen.items()},
        )

    @contextlib.contextmanager
    def hooked(self) -> Iterator[None]:
        """While open, a replay names each layer's scope, and takes notes.

        Towers in step are replayed side by side: each hook asks whose call it
        is, by the thread.
        """
        index = {id(v): i for i, v in enumerate(self.variables)}

        def called(layer: keras.Layer) -> Callable[..., Any]:
            original = layer.call
            device = self._pins.get(id(layer))

            @functools.wraps(original)
            def call(*args: Any, **kwargs: Any) -> Any:
                notes = _Notes.of(self)
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
                if path in self.wanted:
                    notes.seen.setdefault(path, []).append(outputs)
                return outputs

            return call

        def phased(layer: keras.Layer) -> Callable[[], Any]:
            original = layer._get_call_context

            def opened() -> Any:
                context, notes = original(), _Notes.of(self)
                if notes is not None and notes.training is not None:
                    if context.entry_layer is layer:  # called by no other
                        context.training = notes.training
                return context

            return opened

        def watched(layer: keras.layers.BatchNormalization) -> Callable:
            original = layer._moments

            def saw(inputs: tf.Tensor, mask: tf.Tensor | None) -> Any:
                notes = _Notes.of(self)
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
                loss, notes = original(output), _Notes.of(self)
                if notes is not None:
                    notes.sums.append(loss)
                return loss

            return term

        def of_rows(variable: Any) -> Callable:
            original = variable.assign

            def assign(value: Any) -> Any:
                """Past a check that all rows of the batch are there."""
                notes = _Notes.of(self)
                if notes is None:
                    return original(value)
                value = tf.cast(value, variable.dtype)
                notes.stateless.add_update((variable, value))
                return value

            return assign

        roots = {id(m) for m in self.models} if len(self.models) == 1 else {}
        shadows: list[tuple[Any, str, Any]] = []
        before: list[Any] = []
        try:
            for layer in self.layers:
                names: dict[str, Any] = {"_get_call_context": phased(layer)}
                if id(layer) not in roots:
                    names["call"] = called(layer)
                if _has_moments(layer):
                    names["_moments"] = watched(layer)
                if layer.activity_regularizer is not None:
                    names["activity_regularizer"] = summed(layer)
                if _is_stateful(layer):
                    names["_expected_batch_size"] = None
                shadows += [(layer, *item) for item in names.items()]
            for i in self.row_states:
                variable = self.variables[i]
                shadows.append((variable, "assign", of_rows(variable)))
            for owner, name, value in shadows:
                before.append(vars(owner).get(name, _ABSENT))
                # Past Keras's own tracking of attributes.
                object.__setattr__(owner, name, value)
            yield
        finally:
            for (owner, name, _), value in zip(shadows, before):
                if value is _ABSENT:
                    object.__delattr__(owner, name)
                else:
                    object.__setattr__(owner, name, value)

    def talks(self, training: bool | None, tower_fn: Any) -> bool:
        """Whether a tower needs the others: by declaration, or to train."""
        declared = [tower_fn, *self.layers]
        may_train = training is not False or tower_fn is not None
        return any(
            getattr(x, "needs_all_towers", False) for x in declared
        ) or any(
            may_train and _has_moments(x) and x.synchronized
            for x in self.layers
        )

    def batch_norms(self) -> dict[int, keras.layers.BatchNormalization]:
        """The layers whose statistics are pooled, by `moving_mean`'s index."""
        index = {id(v): i for i, v in enumerate(self.variables)}
        return {
            index[id(layer.moving_mean)]: layer
            for layer in self.layers
            if is_pooled(layer) and layer.built
        }

    def index_of(self, variable: keras.Variable) -> int:
        """The place of a variable in `self.variables`."""
        return next(i for i, v in enumerate(self.variables) if v is variable)


_notes: contextvars.ContextVar[Any] = contextvars.ContextVar(
    "notes", default=None
)


class _Notes:
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
        graph: LayerGraph,
        scope: str,
        training: bool | None,
        stateless: "_Scope",
    ):
        self.training = training
        self.stateless = stateless
        self.scopes = [scope]
        self.moments: dict[int, list[Moments]] = {}
        self.seen: dict[str, list[Any]] = {}
        self.sums: list[tf.Tensor] = []
        self._graph = graph

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        token = _notes.set(self)
        try:
            yield
        finally:
            _notes.reset(token)

    @staticmethod
    def of(graph: LayerGraph) -> "_Notes | None":
        """The notes of the current replay, if that is one of `graph`."""
        notes = _notes.get()
        return notes if notes is not None and notes._graph is graph else None


class _Scope(keras.StatelessScope):
    """Reads and writes tensors in the place of one model's variables."""

    def __init__(self, variables: Sequence[Any], values: Sequence[tf.Tensor]):
        # Set here and not by the parent, which casts to a half dtype when the
        # caller is itself a mixed-precision layer.
        super().__init__(collect_losses=True)
        self._copies = {id(v): c for v, c in zip(variables, values)}
        for variable, value in zip(variables, values):
            self.state_mapping[id(variable)] = value

    def get_current_value(self, variable: Any) -> tf.Tensor | None:
        value = super().get_current_value(variable)
        if value is None and variable._value is None:
            raise _created_inside(variable.path)
        if value is None and variable.trainable:
            raise ValueError(
                f"The tower reads {variable.path!r}, a trainable variable of "
                "no model that it was given. Expected all models that a tower "
                "uses: pass them as a list or dict, as in "
                "build_towers([model, other], ..., tower_fn=f)."
            )
        return value

    def add_update(self, update: tuple[Any, tf.Tensor]) -> None:
        variable, value = update
        copy = self._copies.get(id(variable))
        if copy is None:
            raise ValueError(
                f"The tower updates {variable.path!r}, which is no variable "
                "of the model, so its new value would be lost. Expected "
                "state that a layer owns: give a random op "
                "`seed=keras.random.SeedGenerator(...)` kept as an attribute "
                "of a layer, and keep a metric as an attribute of a layer."
            )
        if variable.trainable and copy.dtype.is_floating:
            # What is read after an assignment differentiates to the variable,
            # not into the value that was assigned.
            zero = copy - tf.stop_gradient(copy)
            value = tf.stop_gradient(value) + zero
        self.state_mapping[id(variable)] = value


def _brought(arguments: Any) -> Any:
    """Tensors on the current device, from where they were made.

    A tower takes an identity of what it is given; what the tower does not
    need itself should not go by way of it.
    """

    def bring(value: Any) -> Any:
        if not isinstance(value, tf.Tensor):
            return value
        notes = get_notes(value)
        while value.op.type == "Identity":
            value = value.op.inputs[0]
        value = tf.identity(value)
        set_notes(value, notes)
        return value

    return tf.nest.map_structure(bring, arguments)


def _found(by_path: dict[str, keras.Layer], name: str) -> keras.Layer:
    """The layer with this path, or the only one with this name."""
    if name in by_path:
        return by_path[name]
    named = {p: layer for p, layer in by_path.items() if layer.name == name}
    if len({id(layer) for layer in named.values()}) == 1:
        return next(iter(named.values()))
    raise _no_layer("layer_devices", name, list(named) or list(by_path))


def _no_layer(argument: str, name: str, paths: list[str]) -> ValueError:
    near = difflib.get_close_matches(name, paths, n=3) or sorted(paths)[:10]
    if all(path.endswith(f"/{name}") for path in paths):
        return ValueError(
            f"`{argument}` names {name!r}, which could be any of "
            f"{', '.join(sorted(paths))}. Give the path."
        )
    return ValueError(
        f"`{argument}` names {name!r}, but the model has no such layer. The "
        f"nearest are {', '.join(near)}."
    )


def _is_stateful(layer: Any) -> bool:
    """Whether a layer keeps a state for each row, from batch to batch."""
    return (
        isinstance(layer, keras.layers.RNN)
        and layer.stateful
        and layer.states is not None
    )


def _has_moments(layer: Any) -> bool:
    return isinstance(layer, keras.layers.BatchNormalization) and hasattr(
        layer, "_moments"
    )


def is_pooled(layer: Any) -> bool:
    """Whether a layer keeps a moving mean and variance of its batches."""
    return _has_moments(layer) and not getattr(layer, "renorm", False)


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
      counts: [n, 1], of which the shares are taken.
    """
    shares = tf.math.divide_no_nan(counts, tf.reduce_sum(counts))
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
    whole = meeting.all_towers(pool, part[tf.newaxis])
    return *tf.unstack(whole), said


def _created_inside(name: str) -> ValueError:
    return ValueError(
        f"The variable {name!r} is created inside a tower, where it would be "
        "made once per tower and lost. Expected all variables to exist: make "
        "layers and variables outside, and call each model once on real data "
        "before it is given to towers."
    )


def _refuse_variable(_: Callable[..., Any], **kwargs: Any) -> tf.Variable:
    raise _created_inside(kwargs.get("name") or "Variable")


def raw(variable: Any) -> tf.Variable:
    """The TensorFlow variable, without the casts of mixed precision."""
    return getattr(variable, "_value", variable)


def move_variable(variable: Any, device: str) -> bool:
    """Moves a Keras variable's value to `device`; False if it is there."""
    old = raw(variable)
    if same_device(old.device, device):
        return False
    with tf.device(device):
        new = tf.Variable(
            old.read_value(),
            trainable=old.trainable,
            dtype=old.dtype,
            name=old.name.split(":")[0],
        )
    new._unique_id = old._unique_id  # the optimizer knows it by this
    variable._value = new
    return True


def same_device(one: str, other: str) -> bool:
    """Whether two names of this process's devices mean the same one."""
    a, b = (tf.DeviceSpec.from_string(name) for name in (one, other))
    return (a.job or "localhost", a.task or 0, a.device_type) == (
        b.job or "localhost",
        b.task or 0,
        b.device_type,
    ) and (a.device_index or 0) == (b.device_index or 0)


def get_mask(tensor: Any) -> tf.Tensor | None:
    """The Keras mask that a layer attached to its output."""
    return getattr(tensor, "_keras_mask", None)


def get_notes(outputs: Any) -> list[dict[str, tf.Tensor | None]]:
    """What Keras attached to each flat output: its mask and its logits.

    Losses on probabilities take the logits, if those are known, because
    probabilities underflow.
    """

    def logits(output: Any) -> tf.Tensor | None:
        if _activation(output):
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


def _activation(output: Any) -> str | None:
    if not isinstance(output, tf.Tensor) or hasattr(output, "numpy"):
        return None  # eager tensors do not know where they come from
    kind = output.op.type
    return kind if kind in ("Softmax", "Sigmoid") else None


def carried(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, for another thread, in the Keras call that this one is in.

    Its phase, dtype policy and scopes are copies.
    """
    here = dict(vars(global_state.GLOBAL_STATE_TRACKER))
    thread = threading.get_ident()

    def call(*args: Any) -> Any:
        if threading.get_ident() == thread:
            return function(*args)
        copies = {name: copy.copy(value) for name, value in here.items()}
        vars(global_state.GLOBAL_STATE_TRACKER).update(copies)
        return function(*args)

    return call


def _own_losses(model: keras.Model) -> list[tf.Tensor]:
    """`model.losses` less its weight regularisers, which come last."""
    regularised = sum(
        v.regularizer is not None for v in model.trainable_weights
    )
    losses = list(model.losses)
    return losses[: len(losses) - regularised]


def _layers(model: Any) -> list[keras.Layer]:
    return _unique(
        layer
        for m in tf.nest.flatten(model)
        if isinstance(m, keras.Model)
        for layer in m._flatten_layers()
    )


def _metric_variables(model: keras.Model) -> list[Any]:
    """Of the metrics that the model's layers keep, not of `compile`."""
    return [
        v
        for layer in _layers(model)
        if not isinstance(layer, keras.Model)
        for v in layer.metrics_variables
    ]


def _unique(items: Any) -> list[Any]:
    return list({id(item): item for item in items}.values())


def _as_tensor(value: Any) -> Any:
    """A dense tensor; None stays, for outputs that a model leaves out."""
    if value is None:
        return None
    if isinstance(value, (tf.RaggedTensor, tf.SparseTensor)):
        raise TypeError(
            "Outputs of towers must be dense tensors; got a "
            f"{type(value).__name__}. Make it dense in the model."
        )
    tensor = tf.convert_to_tensor(value)
    set_notes(tensor, [{"mask": get_mask(value)}])
    return tensor
