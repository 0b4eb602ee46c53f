"""LayerGraph: a Keras model as a pure function, replayed layer by layer.

Keras has no public word for its internals that this file touches:
`_flatten_layers` (all nested layers), `_metrics` (those that are attributes of a
model, without those of `compile`), and `_value` and `_unique_id` (the variable
behind a Keras variable). `layer_graph_test.py` fails when one of them changes.
"""

import contextlib
import dataclasses
import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from towers import attached, hooks, merge_rules
from towers.custom_gradients import Follower

# Towers draw from streams this far apart, so that neighbouring seeds of two
# layers do not meet: 2**32 over the golden ratio, below 2**31 after `floormod`.
_STREAM = 1_640_531_527


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
    moments: dict[int, list[hooks.Moments]]
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
        self.is_hooked = False  # see `hooks.hooked`
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
            if hooks.is_stateful(layer)
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
        self.pins = {id(_found(by_path, n)): d for n, d in pins.items()}
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
        return merge_rules.is_seed(self.variables[index])

    def is_metric(self, index: int) -> bool:
        """Whether this variable is a metric's."""
        return any(self.variables[index] is v for v in self.metric_variables)

    def is_overwritten(self, index: int) -> bool:
        """Whether a gradient of this variable is its new value."""
        return (
            getattr(self.variables[index], "overwrite_with_gradient", False)
            and tf.as_dtype(self.variables[index].dtype).is_floating
        )

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

    def talks(self, training: bool | None, tower_fn: Any) -> bool:
        """Whether a tower needs the others: by declaration, or to train."""
        declared = [tower_fn, *self.layers]
        may_train = training is not False or tower_fn is not None
        return any(
            getattr(x, "needs_all_towers", False) for x in declared
        ) or any(
            may_train and hooks.has_moments(x) and x.synchronized
            for x in self.layers
        )

    def batch_norms(self) -> dict[int, keras.layers.BatchNormalization]:
        """The layers whose statistics are pooled, by `moving_mean`'s index."""
        index = {id(v): i for i, v in enumerate(self.variables)}
        return {
            index[id(layer.moving_mean)]: layer
            for layer in self.layers
            if hooks.is_pooled(layer) and layer.built
        }

    def index_of(self, variable: keras.Variable) -> int:
        """The place of a variable in `self.variables`."""
        return next(i for i, v in enumerate(self.variables) if v is variable)


def replayed(
    graph: LayerGraph,
    values: Sequence[tf.Tensor],
    inputs: Any,
    training: bool | None,
    scope: str,
    tower_fn: Callable[..., Any] | None = None,
) -> Replay:
    """Calls a model with `values` for its variables, changing none.

    To be called while `hooked`.

    Args:
      graph: names the layers and the variables.
      values: one tensor per variable of `graph.variables`.
      inputs: the nest that the model is called with.
      training: what layers that are not told otherwise go by.
      scope: an absolute name scope, with its slash.
      tower_fn: `f(model, inputs)` in the place of `model(inputs)`.
    """
    stateless = _Scope(graph.variables, values)
    notes = hooks.Notes(graph, scope, training, stateless)
    with tf.name_scope(scope), _opened(notes):
        if tower_fn is not None:
            outputs = tower_fn(graph.model, inputs)
        elif training is None:
            outputs = graph.model(inputs)
        else:
            outputs = graph.model(inputs, training=training)
        losses = [loss for m in graph.models for loss in _own_losses(m)]
        # Here, where a variable among them is the tower's copy.
        outputs = tf.nest.map_structure(_as_tensor, outputs)
    state = {}
    for i, (variable, value) in enumerate(zip(graph.variables, values)):
        new = stateless.get_current_value(variable)
        if new is not value:
            state[i] = new
    return Replay(
        outputs,
        attached.get_notes(outputs),
        [attached.activation(x) for x in tf.nest.flatten(outputs)],
        [
            {"sum" if any(loss is s for s in notes.sums) else "mean": loss}
            for loss in losses
        ],
        state,
        notes.moments,
        {k: v[0] if len(v) == 1 else v for k, v in notes.seen.items()},
    )


class _Scope(keras.StatelessScope):
    """Reads and writes tensors in the place of one model's variables.

    Attributes:
      follower: hears which copies of trainable variables are read.
    """

    follower: Follower | None = None

    def __init__(self, variables: Sequence[Any], values: Sequence[tf.Tensor]):
        # Set here and not by the parent, which casts to a half dtype when the
        # caller is itself a mixed-precision layer.
        super().__init__(collect_losses=True)
        self._copies = {id(v): c for v, c in zip(variables, values)}
        self.state_mapping.update(self._copies)
        self._graph = tf.compat.v1.get_default_graph()
        self._foreign: dict[int, tf.Tensor] = {}

    def as_it_is(self) -> Any:
        """Another scope, with the values that this one has now."""
        other = _Scope((), ())
        other._copies = self._copies
        other.state_mapping.update(self.state_mapping)
        return other

    def copy_of(self, variable: Any) -> tf.Tensor | None:
        """What the variable was when the tower began."""
        return self._copies.get(id(variable))

    def get_current_value(self, variable: Any) -> tf.Tensor | None:
        value = super().get_current_value(variable)
        copy = self.copy_of(variable)
        if copy is not None and copy.dtype.is_floating:
            # Where a layer is frozen, TensorFlow's variable is not.
            if self.follower is not None and raw(variable).trainable:
                self.follower.heard(copy)
        if value is None and variable._value is None:
            raise _created_inside(variable.path)
        if value is None and variable.trainable:
            raise ValueError(
                f"The tower reads {variable.path!r}, a trainable variable of "
                "no model that it was given. Expected all models that a tower "
                "uses: pass them as a list or dict, as in "
                "build_towers([model, other], ..., tower_fn=f); or freeze what "
                "is not to be trained, by `trainable = False`."
            )
        if value is None and not tf.executing_eagerly():
            value = self._read(variable)
        return value

    def _read(self, variable: Any) -> tf.Tensor:
        """The value of a frozen variable of no model that the tower has.

        The TensorFlow variable of a frozen one is trainable, so tapes would
        follow what is read of it. It is read once, outside of loops.
        """
        if not hasattr(self._graph, "captures"):
            raise ValueError(
                f"The tower reads {variable.path!r}, a frozen variable of no "
                "model that it was given; a graph of tf.compat.v1 has those of "
                "given models only. Pass its model too, as in "
                "build_towers([model, other], ..., tower_fn=f)."
            )
        if id(variable) not in self._foreign:
            handle, dtype = raw(variable).handle, raw(variable).dtype
            with self._graph.as_default(), tf.control_dependencies(None):
                value = tf.raw_ops.ReadVariableOp(resource=handle, dtype=dtype)
                value.set_shape(variable.shape)
                self._foreign[id(variable)] = tf.stop_gradient(value)
        return self._foreign[id(variable)]

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
        hooks.note_update(variable, self.state_mapping[id(variable)])
        if variable.trainable and copy.dtype.is_floating:
            # What is read after an assignment differentiates to the variable,
            # not into the value that was assigned.
            zero = copy - tf.stop_gradient(copy)
            value = tf.stop_gradient(value) + zero
        self.state_mapping[id(variable)] = value


@contextlib.contextmanager
def _opened(notes: hooks.Notes) -> Iterator[None]:
    """While open, layers are one tower's, and their variables are values."""

    def resumption() -> Any:
        scope, context = notes.stateless.as_it_is(), hooks.keras_context()
        scopes = list(notes.scopes)

        @contextlib.contextmanager
        def resumed() -> Iterator[None]:
            # What a backward pass computes again is noted already.
            again = notes.again(scope.as_it_is(), scopes)
            with context(), hooks.hooked(notes.graph), _opened(again):
                yield

        return resumed

    stateless = notes.stateless
    stateless.follower = Follower(stateless.copy_of, resumption)
    with (
        stateless,
        tf.variable_creator_scope(_refuse_variable),
        notes.taken(),
        stateless.follower.opened(),
    ):
        yield


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
    """Moves a Keras variable's value to `device`; False if it is there.

    What a `tf.distribute` strategy made, of parts on its devices, becomes an
    ordinary variable.
    """
    old = raw(variable)
    made_by_strategy = type(old).__module__.startswith(
        "tensorflow.python.distribute"
    )
    if same_device(old.device, device) and not made_by_strategy:
        return False
    with (
        old.distribute_strategy.scope()
        if made_by_strategy
        else contextlib.nullcontext()
    ):
        value = old.read_value()  # of all replicas, where each has its own
    with tf.device(device):
        new = tf.Variable(
            value,
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
    """Of the metrics that the model and its layers keep, not of `compile`."""
    return [
        v
        for layer in _layers(model)
        for metric in layer._metrics
        for v in metric.variables
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
    attached.set_notes(tensor, [{"mask": attached.get_mask(value)}])
    return tensor
