"""tower_calls: the template, and layers of it, called in towers."""

import dataclasses
from typing import Any

import keras
import tensorflow as tf

from towers.build import build_call
from towers.engine.calls import How
from towers.foreign import keras_layers
from towers.keras_model import checks
from towers.keras_model.calls import ModelCall
from towers.keras_model.memory import memory_errors
from towers.keras_model.parameters import Placed
from towers.keras_model.refusals import refusals_named


class TowerCalls:
    """What a `TowerModel` calls in towers: its template, and layers of it.

    Attributes:
      ran: whether anything has run in towers.
      keeps_rows: what is known of layers' calls, see `layers_in_towers`.
      placed: which of the template's variables are where they belong.
    """

    def __init__(self, model: Any):
        self._model = model
        self._functions: dict[Any, Any] = {}
        self.ran = False
        self.keeps_rows: dict[Any, bool] = {}
        self.placed = Placed()

    def run(self, layer: keras.Layer, call: ModelCall) -> Any:
        """Calls the template, or a layer of it: updates, losses and all.

        Returns:
          The gathered outputs.
        """
        self.ran = True
        if tf.executing_eagerly():
            self._model.renew_functions()
            function, adders = self._function(layer, call)
            with memory_errors(self._model.placement), refusals_named():
                outputs, notes, losses = function(call.batch)
        else:
            adders = []
            outputs, notes, losses = self._step(layer, call, adders)
        keras_layers.set_notes(outputs, notes)
        for adder, loss in zip(adders, losses):
            adder.add_loss(loss)
        return outputs

    def any_moved(self) -> bool:
        """Places what is new; whether functions read what has moved since."""
        new = self.placed.place_new(self._model)
        moved = self.placed.note(self._model) or new
        if moved:
            self._functions.clear()
        return moved

    def forget(self) -> None:
        """Drops functions that were made for another placement."""
        self._functions.clear()

    def _function(self, layer: keras.Layer, call: ModelCall) -> Any:
        """Steps of this kind as a `tf.function`, and what adds their losses."""
        adders: list[keras.Layer] = []

        def step(batch: Any) -> Any:
            again = dataclasses.replace(call, batch=batch)
            return self._step(layer, again, adders)

        function = tf.function(step, autograph=False, reduce_retracing=True)
        try:
            key = (id(layer), call.kind, self._model.jit_towers)
            return self._functions.setdefault(key, (function, adders))
        except TypeError:  # an argument has no hash
            return function, adders

    def _step(
        self, layer: keras.Layer, call: ModelCall, adders: list[keras.Layer]
    ) -> Any:
        model = self._model
        with keras_layers.out_of(model):  # paths are the plain model's
            checks.ensure_called(layer, call)
        self.placed.place_new(model)
        graph = build_call(
            layer,
            call,
            model.placement,
            "concat" if call.inside else model.merge,
            part_of=model.template if call.inside else None,
            how=How.COMPILED if model.jit_towers else How.BUILT,
        )
        graph.apply_updates()
        notes = keras_layers.get_notes(graph.outputs)
        adders[:] = graph.adders  # layers cannot come out of a function
        return graph.outputs, notes, graph.losses[: len(adders)]
