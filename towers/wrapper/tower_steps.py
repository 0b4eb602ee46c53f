"""tower_steps: Keras's own training steps, or the template's, beside the outputs.

What carries no device of its own, the loss and the metrics, stays where the
outputs are gathered.
"""

import contextlib
import functools
import inspect
from collections.abc import Iterator
from typing import Any

import keras
import tensorflow as tf

from towers.engine.graphs import as_graphs
from towers.foreign import keras_compile, keras_layers, tf_autograph
from towers.foreign.keras_saving import TemplateProxy, overridden
from towers.foreign.keras_self import compiled_as
from towers.foreign.patches import patched
from towers.keras_model import checks
from towers.placement.device_names import same_device
from towers.placement.placement import Placement
from towers.verbs.arrivals import own_rows
from towers.wrapper import loss_choice
from towers.wrapper.loss_on_towers import loss_on_towers
from towers.wrapper.own_steps import layers_in_towers
from towers.wrapper.tower_calls import TowerCalls

# What a template, or a subclass of TowerSteps, may do in its own way.
OWN_STEPS = (
    "train_step",
    "test_step",
    "predict_step",
    "compute_loss",
    "compute_metrics",
)


class TowerSteps(TemplateProxy):
    """What `fit`, `evaluate` and `predict` do with one batch."""

    placement: Placement
    merge: Any
    loss_on_towers: Any
    whole: tuple[Any, ...]
    tower_calls: TowerCalls
    is_in_step = False
    loss_belongs_there = False  # as "auto" has it, for what was compiled last

    def _own(self, name: str) -> Any:
        """The template's own step, for this model, or None."""
        mine = overridden(self, (name,), TowerSteps)
        if mine or not overridden(self.template, (name,)):
            return None
        step = super().bound(getattr(type(self.template), name))
        return tf_autograph.converted(step)

    def bound(self, own: Any) -> Any:
        """As above; what a method calls runs in towers, outside of a step too."""
        method = super().bound(own)
        if not inspect.ismethod(method):
            return method

        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self._at_outputs(own=True):
                return method(*args, **kwargs)

        return call

    def train_step(self, data: Any) -> Any:
        with self._at_outputs():
            if not self.loses_on_towers(data):
                return self._stepped("train_step", data)
            with tf.GradientTape() as tape:
                loss = self._loss_on_towers(data, training=True)
                if self.optimizer is not None:
                    loss = self.optimizer.scale_loss(loss)
            variables = self.trainable_variables
            if variables:
                gradients = tape.gradient(loss, variables)
                self.optimizer.apply_gradients(zip(gradients, variables))
            return self.get_metrics_result()

    def test_step(self, data: Any) -> Any:
        with self._at_outputs():
            if not self.loses_on_towers(data):
                return self._stepped("test_step", data)
            self._loss_on_towers(data, training=False)
            return self.get_metrics_result()

    def predict_step(self, data: Any) -> Any:
        with self._at_outputs():
            return self._stepped("predict_step", data)

    @contextlib.contextmanager
    def _at_outputs(self, own: bool = False) -> Iterator[None]:
        """Where a step is taken; layers that one of its own calls are towers."""
        if self.is_in_step:
            yield
            return
        opened = contextlib.ExitStack()
        with opened:
            opened.enter_context(patched((self, "is_in_step", True)))
            opened.enter_context(tf.device(self.placement.output_device))
            opened.enter_context(compiled_as(self))
            if own or self.own_steps():
                opened.enter_context(layers_in_towers(self))
            yield

    def own_steps(self) -> list[str]:
        """What the template, or a subclass of this one, does in its own way."""
        return [
            *overridden(self.template, OWN_STEPS),
            *overridden(self, OWN_STEPS, TowerSteps),
        ]

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        own = self._own("compute_loss")
        if own is None:
            self._build_compiled(*args, **kwargs)
        return (own or super().compute_loss)(*args, **kwargs)

    def compute_metrics(self, *args: Any, **kwargs: Any) -> Any:
        own = self._own("compute_metrics")
        return (own or super().compute_metrics)(*args, **kwargs)

    def reset_metrics(self) -> None:
        own = self._own("reset_metrics")
        (own or super().reset_metrics)()

    def get_metrics_result(self) -> Any:
        own = self._own("get_metrics_result")
        return (own or super().get_metrics_result)()

    def _stepped(self, name: str, data: Any) -> Any:
        """Takes a step, the template's own if it has one."""
        own = self._own(name)
        if own is None:
            if name == "predict_step":
                return super().predict_step(data)
            with self._counted_where_read(data):
                return getattr(super(), name)(data)
        result = own(data)
        if not self.tower_calls.ran:
            raise ValueError(
                f"The template {type(self.template).__name__} has a {name} of its "
                "own that calls neither the model, as `self(...)`, nor any of "
                "its layers, so nothing of it would run in towers. Expected "
                "such a call; or write the step with towers.build_towers and "
                "its `tower_fn`."
            )
        return result

    def _counted_where_read(
        self, data: Any
    ) -> contextlib.AbstractContextManager[Any]:
        """While open, the mean loss counts rows where these are.

        Keras's step counts those of the inputs beside the outputs, where all of
        them would go for that. If towers have read them, it needs none.
        """
        rows = own_rows()
        if rows is None:
            return self._shapes_at_inputs(data)
        tracker = keras_compile.Compiled.of(self).tracker
        update = tracker.update_state

        def counted(values: Any, sample_weight: Any = None) -> Any:
            return update(values, sample_weight=rows)

        return patched((tracker, "update_state", counted))

    def _shapes_at_inputs(
        self, data: Any
    ) -> contextlib.AbstractContextManager[Any]:
        """While open, shapes of inputs are asked for where these are split."""
        outputs = str(self.placement.output_device)
        inputs = self.placement.input_device
        if tf.executing_eagerly() or same_device(outputs, inputs):
            return contextlib.nullcontext()
        x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
        leaves = {id(leaf) for leaf in tf.nest.flatten(x, True)}

        def beside(op: tf.Operation) -> str:
            is_asked = op.type == "Shape" and id(op.inputs[0]) in leaves
            return inputs if is_asked and not op.device else op.device

        return tf.compat.v1.device(beside)

    def _build_compiled(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        **_: Any,
    ) -> None:
        """Makes what losses and metrics need, of outputs as they are.

        Of what the model says it makes, Keras may choose other metrics. Where it
        cannot be made, the step does it, or says what is wrong.
        """
        own = ("compute_loss", "compute_metrics")
        if (
            self.merge == "concat"
            and not overridden(self, own, TowerSteps)
            and not overridden(self.template, own)
        ):
            with contextlib.suppress(Exception):
                keras_compile.Compiled.of(self).build(y, y_pred, sample_weight)

    def loses_on_towers(self, data: Any) -> bool:
        """Whether the loss of a batch is computed on the towers."""
        if self.loss_on_towers != "auto":
            return bool(self.loss_on_towers)
        x, y, _ = keras.utils.unpack_x_y_sample_weight(data)
        if (
            y is None
            or self.own_steps()
            or not keras_layers.is_built(self.template)
            or not self.loss_belongs_there
            or not loss_choice.tells_its_outputs(self.template)
        ):
            return False
        outputs: Any = None
        with contextlib.suppress(Exception):  # of a model that cannot tell
            outputs = checks.output_spec(self.template, x)
        return outputs is not None and loss_choice.have_feature_axes(outputs)

    def _loss_on_towers(self, data: Any, training: bool) -> tf.Tensor:
        x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
        checks.check_given(self.template, x)
        checks.ensure_built(self.template, x, self.whole)
        self.tower_calls.placed.place_new(self)

        is_told = keras_compile.is_told_phase(self.template)
        phase = training if is_told else None

        def loss(data: Any) -> tf.Tensor:
            return loss_on_towers(self, data, phase)

        if tf.executing_eagerly() and keras_layers.scope_here() is None:
            # Towers at once hand out parameters, whose gradients, which are zeros,
            # would make sparse ones dense.
            with as_graphs():
                return tf.function(loss, autograph=False)(data)
        return loss(data)
