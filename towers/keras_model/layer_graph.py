"""LayerGraph: a Keras model as a pure function, replayed layer by layer."""

from collections.abc import Container, Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from towers.engine.host import host_of
from towers.foreign import keras_layers
from towers.foreign.keras_layers import all_layers, unique
from towers.foreign.keras_saving import TemplateProxy
from towers.keras_model import pins
from towers.keras_model.kinds import Kind
from towers.keras_model.moments import is_pooled, statistics
from towers.keras_model.pieces import cuts
from towers.keras_model.pieces.joined import Joined
from towers.placement.layer_devices import is_in_pieces
from towers.placement.pieces import Pieces


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
      variables: those that a tower may read or change, in one order for all.
      kinds: what each of them is.
      trainable, seeds, row_states: the places of those that Keras trains, of
        seeds, and of what stateful RNNs keep for each row.
      norms: the batch norms, and of these by the place of their `moving_mean`
      batch_norms: those whose statistics are pooled.
      is_mixed: whether a layer computes in another dtype than its weights are.
      pins: by a layer's id its device, or those of its pieces, or one per tower.
      joined: what stands for variables that are in pieces.
      cuts: which layers are computed in pieces, and where their variables live.
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
        self.is_plain = False  # see `guards.Guards`
        self.is_portable = False  # see `keras_machine.asks_device`
        leaves = tf.nest.flatten(model)
        self.models = [m for m in leaves if isinstance(m, keras.Layer)]
        self.layer_outputs = tuple(layer_outputs)
        self.layers = all_layers(self.models)
        self.is_mixed = any(
            x.compute_dtype != x.variable_dtype for x in self.layers
        )
        _refuse_wrapped(self.layers)
        metrics, states = _beside_weights(self.layers)
        own = unique(v for m in self.models for v in m.variables)
        others = [m for m in leaves if not isinstance(m, keras.Layer)]
        metrics += [v for metric in others for v in metric.variables]
        # Keras counts metrics and states of rows among no layer's variables.
        self.variables = unique([*own, *metrics, *states])
        self._places = {id(v): i for i, v in enumerate(self.variables)}
        self.norms = [x for x in self.layers if keras_layers.has_moments(x)]
        self.batch_norms = {
            self._places[id(layer.moving_mean)]: layer
            for layer in self.norms
            if layer.built and is_pooled(layer)
        }
        trained = {id(v) for m in self.models for v in m.trainable_variables}
        self.trainable = self._of(trained)
        self.kinds = self._kinds(
            trained,
            {id(v) for v in metrics} - {id(v) for v in own},
            {id(v) for v in states},
        )
        self.seeds = self.of_kind(Kind.SEED)
        self.row_states = self.of_kind(Kind.ROWS)
        self.pinned_layers: list[tuple[Any, pins.Pin]] = []
        if layer_outputs or layer_devices or part_of is not None:
            self.pinned_layers = self._named(layer_devices or {}, part_of)
        self.cuts: cuts.Cuts = getattr(part_of, "cuts", cuts.NONE)
        if part_of is None and any(
            is_in_pieces(pin) for _, pin in self.pinned_layers
        ):
            paths = pins.layer_paths(self.models)
            self.cuts = cuts.cuts_of(paths, self.pinned_layers)
            self.cuts.check_outputs(self.layer_outputs)
        self.joined = [
            x
            for layer in self.layers
            for x in vars(layer).values()
            if isinstance(x, Joined)
        ]
        self.pins = {id(layer): pin for layer, pin in self.pinned_layers}
        homes = {  # of what one layer holds for another, that one says it
            id(v): pin
            for layer, pin in self.pinned_layers
            for v in getattr(layer, "variables", ())
            if not is_in_pieces(pin)
        }
        homes.update(self.cuts.homes)
        by_place = {
            i: homes[id(v)]
            for i, v in enumerate(self.variables)
            if id(v) in homes
        }
        self.pinned = {i: x for i, x in by_place.items() if isinstance(x, str)}
        self.spread: dict[int, Any] = {
            i: x for i, x in by_place.items() if i not in self.pinned
        }

    @property
    def is_spread(self) -> bool:
        """Whether a layer has one device per tower."""
        return any(isinstance(pin, tuple) for pin in self.pins.values())

    @property
    def is_determined(self) -> bool:
        """Whether all towers are known to come out alike, on devices of a type.

        What is Keras's own looks at what it is given, and at the device's type. Of
        a layer or a function of a user's own that is not known, nor would a pinned
        layer show that was pinned to the device of the tower that is copied.
        """
        return not self.pinned_layers and self.is_keras_own

    @property
    def is_keras_own(self) -> bool:
        """Whether all that is computed is written in Keras."""
        called = [*self.layers]
        for layer in self.layers:
            called += keras_layers.bare_operations(layer)
        return all(keras_layers.is_keras_own(x) for x in called)

    def device_of(self, layer: Any, tower: int) -> str | None:
        """Where a layer runs, if that is elsewhere than its tower."""
        pin: Any = self.pins.get(id(layer))
        place = pin[tower] if isinstance(pin, tuple) else pin
        return None if isinstance(place, Pieces) else place

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

    def _named(
        self, layer_devices: Mapping[str, pins.Pin], part_of: Any
    ) -> list[tuple[Any, pins.Pin]]:
        """The layers that have a device; raises if there is no such layer."""
        paths = pins.layer_paths(self.models)
        layers = dict(paths)
        for name in self.layer_outputs:
            if name not in layers:
                raise pins.no_layer("layer_outputs", name, [*layers])
        if part_of is None:
            return pins.pinned(paths, layer_devices)
        mine = {id(layer) for layer in [*self.layers, *layers.values()]}
        return [pair for pair in part_of.pinned_layers if id(pair[0]) in mine]

    def _of(self, ids: Container[int]) -> list[int]:
        """The places of variables with these ids."""
        return [i for i, v in enumerate(self.variables) if id(v) in ids]

    def of_kind(self, kind: Kind) -> list[int]:
        """The places of the variables of a kind."""
        return [i for i, other in enumerate(self.kinds) if other is kind]

    def _kinds(
        self,
        trained: Container[int],
        metrics: Container[int],
        states: Container[int],
    ) -> list[Kind]:
        """What each variable is, by the ids of those of some kinds."""
        moved = {
            id(v)
            for layer in self.batch_norms.values()
            for v in statistics(layer)
        }
        seeds = {id(v) for v in self.variables if keras_layers.is_seed(v)}
        of_ids = [
            (seeds, Kind.SEED),
            (states, Kind.ROWS),
            (metrics, Kind.METRIC),
            (moved, Kind.STATISTIC),
            (trained, Kind.TRAINED),
        ]

        def kind_of(variable: Any) -> Kind:
            if _is_overwritten(variable):
                return Kind.OVERWRITTEN
            kinds = (kind for ids, kind in of_ids if id(variable) in ids)
            return next(kinds, Kind.OWN)

        return [kind_of(v) for v in self.variables]

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
        return [x for x in self.norms if self.meets(x) and x.trainable]

    def variable_specs(self, rows: int | None = None) -> list[Any]:
        """Of the variables; of so many rows, or any, where they have some."""
        shapes = [
            [rows, *x.shape[1:]] if i in self.row_states else x.shape
            for i, x in enumerate(self.variables)
        ]
        return [
            tf.TensorSpec(shape, keras_layers.raw(variable).dtype)
            for shape, variable in zip(shapes, self.variables)
        ]

    def index_of(self, variable: keras.Variable) -> int:
        """The place of a variable in `self.variables`."""
        return self._places[id(variable)]


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


def _is_overwritten(variable: Any) -> bool:
    """Whether a gradient of this variable is its new value."""
    return (
        getattr(variable, "overwrite_with_gradient", False)
        and tf.as_dtype(variable.dtype).is_floating
    )


def variables_of(model: keras.Model) -> list[Any]:
    """All that a tower may read or change: metrics and states of rows too."""
    metrics, states = _beside_weights(all_layers(model))
    return unique([*model.variables, *metrics, *states])


def _beside_weights(layers: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """What layers keep beside weights: variables of metrics, and states of rows.

    Metrics are those of models and layers, not of `compile`; states are what
    stateful RNNs keep for each row.
    """
    metrics = [m for x in layers for m in keras_layers.kept_metrics(x)]
    recurrent = [x for x in layers if keras_layers.is_stateful(x)]
    return (
        [v for metric in metrics for v in metric.variables],
        [v for layer in recurrent for v in tf.nest.flatten(layer.states)],
    )
