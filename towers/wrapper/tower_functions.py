"""tower_functions: what Keras calls with batches, made for steps that are placed.

Keras makes one function each to train, test and predict. Here it is given arrays
where batches are split, is made again when variables have moved, takes a step again
if a worker is lost, reads a batch ahead or starts quickly, if that is asked.
"""

import functools
import types
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from towers.engine.unoptimized import unoptimized
from towers.foreign import keras_layers
from towers.foreign.keras_saving import TemplateProxy, overridden
from towers.foreign.patches import patched
from towers.keras_model.parameters import place_metrics, place_slots
from towers.placement.device_names import HOST_HERE, absent, process_of
from towers.placement.placement import Placement
from towers.wrapper.fed_steps import FedSteps

# What Keras calls, by their attributes, and what each does with a batch.
_STEPS = {
    "train_function": "train_step",
    "test_function": "test_step",
    "predict_function": "predict_step",
}
_ALL = tuple(_STEPS)
# Of an optimizer, (variable, value); of a variable, (value).
_UNASSIGNED = tuple(
    (kind, "assign", lambda *_: None)
    for kind in (keras.Optimizer, keras.Variable)
)


class TowerFunctions:
    """The functions that `fit`, `evaluate` and `predict` call.

    Each is an attribute of the model, where Keras looks for it.

    Args:
      model: a `TowerModel`.
    """

    def __init__(self, model: Any):
        self._model = model

    def make(self, name: str, force: bool) -> Any:
        """The function of this name, made if there is none, or by `force`."""
        model = self._model
        if name == "train_function":
            model.tower_recovery.catch_up()
            _check_devices(model.placement, model.template)
        if name != "predict_function":
            _check_steps(model)
        self.renew()
        if name == "train_function":
            self.build_slots()
        if name != "predict_function" and place_metrics(model, model.placement):
            self._renew_template()  # which counts in the same
            force = True
        present = getattr(model, name)
        return self._make(name) if force or present is None else present

    def renew(self) -> None:
        """Makes functions again that read variables which have moved since.

        None that Keras has is dropped: a callback may be the one who asks, and
        `fit` goes on with what it has.
        """
        if not self._model.tower_calls.any_moved():
            return
        for name in _STEPS:
            if getattr(self._model, name) is not None:
                self._make(name)

    def _renew_template(self) -> None:
        """Makes what the template has, as `renew` does."""
        template = self._model.template
        for name in _STEPS:
            if getattr(template, name) is not None:
                setattr(template, name, None)
                getattr(template, f"make_{name}")()

    def build_slots(self) -> None:
        """Makes slots eagerly, and not while the step is traced.

        What an optimizer assigns there is lost, as in plain Keras: that makes them
        while it traces a step for the first time, which is never run. Not of one
        that Keras gave to a template which has others of its own.
        """
        model = self._model
        if (
            model.optimizer
            and not model.optimizer.built
            and not overridden(model.template, ("compile",))
            and keras_layers.is_built(model.template)
            and model.trainable_variables
        ):
            is_run = model.run_eagerly or tf.config.functions_run_eagerly()
            with patched(*(() if is_run else _UNASSIGNED)):
                model.optimizer.build(model.trainable_variables)
            place_slots(model, model.placement)

    def _make(self, name: str) -> Callable[[Any], Any]:
        """Makes the function of a name: who takes steps, and all `_AROUND` it."""
        model = self._model
        maker = _repeated if model.tower_recovery.takes_steps else _keras_s
        function = maker(model, name)
        for kind, names, asked_by in _AROUND:
            if name in names and (asked_by is None or getattr(model, asked_by)):
                function = kind(model, name, function)
        setattr(model, name, function)
        return function


def _keras_s(model: Any, name: str) -> Callable[[Any], Any]:
    """Keras's own function, or that of the template's class."""
    getattr(TemplateProxy, f"make_{name}")(model, force=True)
    return getattr(model, name)


def _repeated(model: Any, name: str) -> Callable[[Any], Any]:
    """A step that is taken again when a worker is lost, or brought here."""
    if name != "predict_function":
        model.tower_recovery.check_compiled()
    step = model.tower_recovery.repeated(getattr(model, _STEPS[name]))
    return step.predict if name == "predict_function" else step


def _with_arrays_placed(
    model: Any, name: str, function: Callable[[Any], Any]
) -> Callable[[Any], Any]:
    """The function, with arrays taken to where batches are split.

    They would become tensors on the device of the step, or the default one.
    """

    @functools.wraps(function)
    def fed(data: Any) -> Any:
        return function(_at_inputs(data, model.placement.input_device))

    return fed


def _at_inputs(data: Any, device: str) -> Any:
    """Batches whose arrays are tensors on `device`.

    Args:
      data: what Keras gives a step: a generator or a list of batches of arrays,
        or an iterator over a dataset, which stays as it is.
      device: where batches are split.
    """

    def tensor(value: Any) -> Any:
        return tf.constant(value) if isinstance(value, np.ndarray) else value

    def batch(arrays: Any) -> Any:
        with tf.device(device):
            return tf.nest.map_structure(tensor, arrays)

    if isinstance(data, list):
        return [batch(arrays) for arrays in data]
    if isinstance(data, types.GeneratorType):
        return (batch(arrays) for arrays in data)
    return data


def _beside_outputs(
    model: Any, name: str, function: Callable[[Any], Any]
) -> Callable[[Any], Any]:
    """The function, with what has no device on the output device.

    Or on this process, if that is of another one: TensorFlow would wait for
    what a step returns with Python locked, and the step for a generator.
    """
    outputs = str(model.placement.output_device)
    device = HOST_HERE if process_of(outputs) else outputs

    @functools.wraps(function)
    def placed(data: Any) -> Any:
        with tf.device(device):
            return function(data)

    return placed


def _reading_ahead(
    model: Any, name: str, function: Callable[[Any], Any]
) -> Callable[[Any], Any]:
    """The step with batches that were read ahead; the function with others."""
    return model.read_ahead.function(getattr(model, _STEPS[name]), function)


def _fed(
    model: Any, name: str, function: Callable[[Any], Any]
) -> Callable[[Any], Any]:
    """The step with what towers have read; the function with other batches."""
    steps = FedSteps(model, _STEPS[name], function)
    return steps.predict if name == "predict_function" else steps


def _as_built(
    model: Any, name: str, function: Callable[[Any], Any]
) -> Callable[[Any], Any]:
    """The function, which TensorFlow does not rewrite before its first call."""

    @functools.wraps(function)
    def started(data: Any) -> Any:
        with unoptimized():
            return function(data)

    return started


# Kinds of functions, each made around the one before it, for those of these names,
# where an argument of the model asks for it.
_AROUND: tuple[tuple[Callable[..., Any], tuple[str, ...], str | None], ...] = (
    (_with_arrays_placed, _ALL, None),
    (_beside_outputs, ("train_function",), None),
    (_reading_ahead, ("train_function", "test_function"), "prefetch"),
    (_fed, _ALL, None),
    (_as_built, _ALL, "quick_start"),
)


def _check_steps(model: Any) -> None:
    """Raises where losses are to be on towers, but steps are not Keras's own."""
    own = model.own_steps() if model.loss_on_towers is True else []
    if own:
        raise ValueError(
            f"{type(model).__name__} of {type(model.template).__name__} has "
            f"its own {', '.join(own)}, which would need the gathered "
            "outputs. Expected Keras's own with `loss_on_towers=True`; "
            "leave that out."
        )


def _check_devices(placement: Placement, template: Any) -> None:
    """Raises where training would not be on the placement's devices."""
    missing = absent(
        [
            *placement.devices,
            placement.input_device,
            str(placement.output_device),
            *placement.pinned_devices,
            *map(keras_layers.device_of, template.variables),
        ]
    )
    if missing:
        raise RuntimeError(
            f"The model is placed on {', '.join(missing)}, but TensorFlow "
            'sees no such device here (`available="any"` let it through), '
            "so it would train somewhere else. Expected devices that are "
            "here; make a TowerModel of the `template` with those. "
            "placement_plan, export and predictions work without them."
        )
