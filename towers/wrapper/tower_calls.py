"""tower_calls: the template, and layers of it, called in towers."""

import dataclasses
import inspect
from typing import Any

import keras
import tensorflow as tf

from towers.builder import build
from towers.engine.calls import How
from towers.engine.graphs import as_graphs
from towers.foreign import keras_layers
from towers.foreign.keras_self import plain_values
from towers.keras_model import checks
from towers.keras_model.model_calls import ModelCall, call_signature, model_call
from towers.keras_model.parameters import Placed
from towers.keras_model.refusals import tower_errors
from towers.keras_model.request import Request
from towers.keras_model.scope_values import ScopeValues
from towers.tower_graph import TowerGraph


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
        self._read: dict[str, Any] = {}  # what functions were built with
        self.ran = False
        self.keeps_rows: dict[Any, bool] = {}
        self.placed = Placed()

    def of_template(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> ModelCall:
        """A call of the template with these arguments."""
        model = self._model
        if len(args) == 1:
            checks.check_given(model.template, args[0])
        signature = call_signature(model.template)
        if (
            kwargs.get("mask", ()) is None
            and "mask" not in signature.parameters
        ):
            kwargs.pop("mask")  # of a subclass, whose `call` has one
        return model_call(args, kwargs, model.whole, signature)

    def run(self, layer: keras.Layer, call: ModelCall) -> Any:
        """Calls the template, or a layer of it: updates, losses and all.

        Returns:
          The gathered outputs.
        """
        self.ran = True
        _check_context(layer, keras_layers.context_values(layer))
        if tf.executing_eagerly():
            self._model.tower_functions.renew()
            if self._read != plain_values(self._model.template):
                self._functions.clear()
            scope = ScopeValues()
            function, effects = self._function(layer, call, scope)
            with tower_errors(self._model.placement), as_graphs():
                outputs, notes, losses, updates = function(
                    call.batch, scope.values
                )
            self._read = plain_values(self._model.template)
            for variable, value in zip(effects.updated, updates):
                variable.assign(value)
        else:
            effects = _Effects()
            graph = self._graph(layer, call, effects)
            graph.apply_updates()
            outputs, losses = graph.outputs, graph.losses
            notes = keras_layers.get_notes(outputs)
        keras_layers.set_notes(outputs, notes)
        for adder, loss in zip(effects.adders, losses):
            adder.add_loss(loss)
        return outputs

    def output_spec(self, *args: Any, **kwargs: Any) -> Any:
        """What the template makes of such a call, in symbols."""
        template = self._model.template
        if not keras_layers.is_built(template):
            with keras_layers.out_of(self._model):
                template(*args, **kwargs)
            self.placed.place_new(self._model)
        taken = inspect.signature(template.call).parameters
        context = keras_layers.context_arguments(template)
        for name in {"training", *context} - {*taken}:
            kwargs.pop(name, None)
        return template.compute_output_spec(*args, **kwargs)

    def any_moved(self) -> bool:
        """Places what is new; whether functions read what has moved since."""
        moved = self.placed.renewed(self._model)
        if moved:
            self._functions.clear()
        return moved

    def forget(self) -> None:
        """Drops functions that were made for another placement."""
        self._functions.clear()

    def _function(
        self, layer: keras.Layer, call: ModelCall, scope: ScopeValues
    ) -> tuple[Any, "_Effects"]:
        """Steps of this kind as a `tf.function`, and what else they do."""
        effects = _Effects()

        def step(batch: Any, values: Any) -> Any:
            again = dataclasses.replace(call, batch=batch)
            with scope.again(values):
                graph = self._graph(layer, again, effects)
            notes = keras_layers.get_notes(graph.outputs)
            losses = graph.losses[: graph.n_input_losses]
            if scope.is_open:  # it is to have values of its own graph
                effects.updated[:] = [variable for variable, _ in graph.updates]
                updates = [value for _, value in graph.updates]
            else:
                graph.apply_updates()
                updates = []
            return graph.outputs, notes, losses, updates

        function = tf.function(step, autograph=False, reduce_retracing=True)
        try:
            context = tuple(keras_layers.context_values(layer).items())
            model = self._model
            frozen = tuple(x.trainable for x in keras_layers.all_layers(layer))
            how = (model.jit_towers, model.synchronized, scope.key, context)
            key = (id(layer), call.kind, how, frozen)
            return self._functions.setdefault(key, (function, effects))
        except TypeError:  # an argument has no hash
            return function, effects

    def _graph(
        self, layer: keras.Layer, call: ModelCall, effects: "_Effects"
    ) -> TowerGraph:
        model = self._model
        with keras_layers.out_of(model):  # paths are the plain model's
            checks.ensure_called(layer, call)
        self.placed.place_new(model)
        request = Request(
            model.placement,
            call.training,
            "concat" if call.inside else model.merge,
            call,
            part_of=model.template if call.inside else None,
            how=How.COMPILED if model.jit_towers else How.BUILT,
            synchronized=model.synchronized,
        )
        graph = build(layer, call.shared(), request)
        effects.adders[:] = graph.adders
        return graph


@dataclasses.dataclass(frozen=True)
class _Effects:
    """The side effects of a call, which its function cannot return.

    Attributes:
      adders: the layers that added the losses.
      updated: the variables that get new values, if those are handed out.
    """

    adders: list[keras.Layer] = dataclasses.field(default_factory=list)
    updated: list[Any] = dataclasses.field(default_factory=list)


def _check_context(layer: keras.Layer, context: dict[str, Any]) -> None:
    """Raises if what the layers around pass on has rows, which no tower gets."""
    for name, value in context.items():
        if name in keras_layers.context_arguments(layer):
            continue  # in the call, too, and shared by rows
        shapes = [getattr(x, "shape", ()) for x in tf.nest.flatten(value)]
        if any(tf.TensorShape(shape).rank != 0 for shape in shapes):
            raise ValueError(
                f"The layers inside {layer.name!r} would get {name!r} from the "
                "call that it is in, a tensor that may have rows, but no "
                "tower gets its rows of that. Expected "
                f"{layer.name}._register_call_context_args({name!r}), before the "
                "model is given to towers, or a value without axes."
            )
