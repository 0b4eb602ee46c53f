"""LayerGraph: a Keras model as a pure function, replayed layer by layer."""

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from towers.engine.host import host_of
from towers.foreign import keras_layers, specs
from towers.foreign.keras_layers import all_layers, unique
from towers.foreign.keras_saving import TemplateProxy
from towers.keras_model import merge_rules, pins
from towers.keras_model.moments import is_pooled


class LayerGraph:
    """A built model (or a nest of models) as a function of its variables.

    Args:
      model: a built `keras.Model`, or a list or dict of models and metrics.
      layer_outputs: paths of layers whose outputs are wanted.
      layer_devices: the devices of layers that run elsewhere than their tower,
        as a `Placement` has it.
      part_of: the graph that says so, of a model of which this one is a layer
        that is called by itself.
      synchronized: whether all batch norms take the statistics of the whole
        batch when they train, and not only those that say so.

    Attributes:
      pins: by a layer's id its device, or one per tower.
      pinned: by a variable's place the device of a layer that is the same for
        all towers: it lives there.
      spread: by a variable's place the device, per tower, of its layer.

    Raises:
      TypeError: a model is a `TowerModel`, or holds one.
      ValueError: there is no such layer.
    """

    def __init__(
        self,
        model: Any,
        layer_outputs: Sequence[str] = (),
        layer_devices: Mapping[str, pins.Pin] | None = None,
        part_of: "LayerGraph | None" = None,
        synchronized: bool = False,
    ):
        self.model = model
        self.is_part = part_of is not None
        self.is_synchronized = synchronized
        self.is_hooked = False  # see `hooks.hooked`
        self.is_portable = False  # see `keras_machine.asks_device`
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
        _refuse_wrapped(self.layers)
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
        paths = pins.layer_paths(self.models)
        for name in self.wanted:
            if name not in dict(paths):
                raise pins.no_layer("layer_outputs", name, [*dict(paths)])
        if part_of is None:
            self.pinned_layers = pins.pinned(paths, layer_devices or {})
        else:
            mine = {
                id(layer) for layer in [*self.layers, *dict(paths).values()]
            }
            self.pinned_layers = [
                pair for pair in part_of.pinned_layers if id(pair[0]) in mine
            ]
        self.pins = {id(layer): pin for layer, pin in self.pinned_layers}
        homes = {  # of what one layer holds for another, that one says it
            id(v): pin
            for layer, pin in self.pinned_layers
            for v in getattr(layer, "variables", ())
        }
        found = {
            i: homes[id(v)]
            for i, v in enumerate(self.variables)
            if id(v) in homes
        }
        self.pinned = {i: x for i, x in found.items() if isinstance(x, str)}
        self.spread = {i: x for i, x in found.items() if i not in self.pinned}

    @property
    def is_spread(self) -> bool:
        """Whether a layer has one device per tower."""
        return not all(isinstance(pin, str) for pin in self.pins.values())

    @property
    def is_determined(self) -> bool:
        """Whether all towers are known to come out alike, on devices of a type.

        What is Keras's own looks at what it is given, and at the device's type. Of
        a layer or a function of a user's own that is not known, nor would a pinned
        layer show that was pinned to the device of the tower that is copied.
        """
        called = [*self.layers]
        for layer in self.layers:
            called += keras_layers.bare_operations(layer)
        return not self.pinned_layers and all(
            keras_layers.is_keras_own(x) for x in called
        )

    def device_of(self, layer: Any, tower: int) -> str | None:
        """Where a layer runs, if that is elsewhere than its tower."""
        pin = self.pins.get(id(layer))
        return pin if pin is None or isinstance(pin, str) else pin[tower]

    def elsewhere(self, tower: int, device: str) -> dict[int, str]:
        """Devices of variables whose copy is taken elsewhere than the tower.

        Args:
          tower: its number.
          device: its device.
        """
        pinned = {
            **self.pinned,
            **{i: devices[tower] for i, devices in self.spread.items()},
        }
        # Where the kernels of a GPU take them from.
        seeds = {i: host_of(pinned.get(i, device)) for i in self.seeds}
        return {
            **pinned,
            **{i: host for i, host in seeds.items() if host != device},
        }

    def is_seed(self, index: int) -> bool:
        """Whether this variable is the state of a `SeedGenerator`."""
        return merge_rules.is_seed(self.variables[index])

    @property
    def seeds(self) -> list[int]:
        """The variables that are seeds."""
        return [i for i in range(len(self.variables)) if self.is_seed(i)]

    def is_metric(self, index: int) -> bool:
        """Whether this variable is a metric's."""
        return any(self.variables[index] is v for v in self.metric_variables)

    def is_overwritten(self, index: int) -> bool:
        """Whether a gradient of this variable is its new value."""
        return (
            getattr(self.variables[index], "overwrite_with_gradient", False)
            and tf.as_dtype(self.variables[index].dtype).is_floating
        )

    def regularization_loss(self, index: int, home: Any) -> tf.Tensor | None:
        """A variable's weight regulariser, computed where it lives."""
        regularizer = self.variables[index].regularizer
        if regularizer is None:
            return None
        with tf.device(home.device):
            return regularizer(home.read())

    def talks(self, tower_fn: Any) -> bool:
        """Whether a layer, or the function, says that it needs all towers."""
        return any(
            getattr(x, "needs_all_towers", False)
            for x in [tower_fn, *self.layers]
        )

    def meets(self, layer: Any) -> bool:
        """Whether a batch norm takes all towers' moments, when it trains."""
        return keras_layers.has_moments(layer) and (
            self.is_synchronized or layer.synchronized
        )

    @property
    def meeting_norms(self) -> list[keras.layers.BatchNormalization]:
        """Those that do, and are not frozen."""
        return [x for x in self.layers if self.meets(x) and x.trainable]

    def batch_norms(self) -> dict[int, keras.layers.BatchNormalization]:
        """The layers whose statistics are pooled, by `moving_mean`'s index."""
        index = {id(v): i for i, v in enumerate(self.variables)}
        return {
            index[id(layer.moving_mean)]: layer
            for layer in self.layers
            if is_pooled(layer) and layer.built
        }

    def specs_of(
        self, values: Sequence[tf.Tensor], rows: int | None = None
    ) -> list[Any]:
        """Of one value per variable; of so many rows, or any, where it has some."""
        return [
            specs.of(x, rows) if i in self.row_states else specs.of(x)
            for i, x in enumerate(values)
        ]

    def index_of(self, variable: keras.Variable) -> int:
        """The place of a variable in `self.variables`."""
        return next(i for i, v in enumerate(self.variables) if v is variable)


def _refuse_wrapped(layers: Sequence[keras.Layer]) -> None:
    """Raises if one is a `TowerModel`."""
    for layer in layers:
        if isinstance(layer, TemplateProxy):
            raise TypeError(
                "`model` must be a plain Keras model, of plain layers; got a "
                f"TowerModel, {layer.name!r}, as the model or a layer of it, "
                "whose towers would be built anew in each tower. Put its "
                "`template` in its place."
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
