"""LayerGraph: a Keras model as a pure function, replayed layer by layer."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from towers.foreign import keras_layers
from towers.foreign.keras_layers import all_layers, unique
from towers.keras_model import merge_rules
from towers.keras_model.moments import is_pooled

# Towers draw from streams this far apart, so that neighbouring seeds of two
# layers do not meet: 2**32 over the golden ratio, below 2**31 after `floormod`.
_STREAM = 1_640_531_527


class LayerGraph:
    """A built model (or a nest of models) as a function of its variables.

    Args:
      model: a built `keras.Model`, or a list or dict of models and metrics.
      layer_outputs: paths of layers whose outputs are wanted.
      layer_devices: the devices of layers, by name or path, that run
        elsewhere than their tower.
      part_of: the graph that says so, of a model of which this one is a layer
        that is called by itself.

    Raises:
      ValueError: there is no such layer.
    """

    def __init__(
        self,
        model: Any,
        layer_outputs: Sequence[str] = (),
        layer_devices: Mapping[str, str] | None = None,
        part_of: "LayerGraph | None" = None,
    ):
        self.model = model
        self.is_part = part_of is not None
        self.is_hooked = False  # see `hooks.hooked`
        leaves = tf.nest.flatten(model)
        self.models = [m for m in leaves if isinstance(m, keras.Layer)]
        self.wanted = tuple(layer_outputs)
        self.variables = unique(v for m in self.models for v in m.variables)
        metrics = unique(
            v
            for m in leaves
            for v in (_metric_variables(m) if m in self.models else m.variables)
        )
        known = {id(v) for v in self.variables}
        self.metric_variables = [v for v in metrics if id(v) not in known]
        self.variables += self.metric_variables
        self.layers = unique(
            layer for m in self.models for layer in all_layers(m)
        )
        known = {id(v) for v in self.variables}
        states = unique(v for m in self.models for v in _row_states(m))
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
        self.pinned_layers = [
            (_found(by_path, name), device)
            for name, device in (layer_devices or {}).items()
        ]
        if part_of is not None:
            mine = {id(layer) for layer in self.layers}
            self.pinned_layers = [
                pair for pair in part_of.pinned_layers if id(pair[0]) in mine
            ]
        self.pins = {id(layer): device for layer, device in self.pinned_layers}
        homes = {
            id(v): device
            for layer, device in self.pinned_layers
            for v in layer.variables
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
            for child in keras_layers.children(layer):
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
            may_train and keras_layers.has_moments(x) and x.synchronized
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


def variables_of(model: keras.Model) -> list[Any]:
    """All that a tower may read or change: metrics and states of rows too."""
    return unique(
        [*model.variables, *_metric_variables(model), *_row_states(model)]
    )


def _row_states(model: keras.Layer) -> list[Any]:
    """What stateful RNNs keep for each row."""
    return [
        v
        for layer in all_layers(model)
        if keras_layers.is_stateful(layer)
        for v in tf.nest.flatten(layer.states)
    ]


def _metric_variables(model: keras.Model) -> list[Any]:
    """Of the metrics that the model and its layers keep, not of `compile`."""
    return [
        v
        for layer in all_layers(model)
        for metric in keras_layers.kept_metrics(layer)
        for v in metric.variables
    ]
