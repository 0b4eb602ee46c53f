"""tower_functions: what Keras calls with batches, made for steps that are placed.

Keras makes one function each to train, test and predict. Here it is given arrays
where batches are split, is made again when variables have moved, reads a batch
ahead or starts quickly, if that is asked.
"""

import functools
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from towers.engine.unoptimized import unoptimized
from towers.foreign import keras_compile, keras_layers
from towers.keras_model.parameters import place_metrics, place_slots
from towers.placement.device_names import HOST_HERE, absent, process_of
from towers.placement.placement import Placement
from towers.wrapper.fed_steps import FedSteps
from towers.wrapper.prefetch import Prefetch
from towers.wrapper.recovery import Recovering

# By the function, the step that it takes with a batch which may be read ahead.
_STEPS = {
    "train_function": "train_step",
    "test_function": "test_step",
    "predict_function": None,
}


class TowerFunctions(Recovering):
    """The functions that `fit`, `evaluate` and `predict` call."""

    quick_start: bool
    prefetch: bool
    read_ahead: Prefetch

    def make_train_function(self, force: bool = False) -> None:
        self.catch_up()
        _check_devices(self.placement, self.template)
        self._check_steps()
        self.renew_functions()
        self.build_slots()
        force = place_metrics(self, self.placement) or force
        self._make_placed("train_function", force)

    def make_test_function(self, force: bool = False) -> Any:
        self._check_steps()
        self.renew_functions()
        force = place_metrics(self, self.placement) or force
        return self._make_placed("test_function", force)

    def make_predict_function(self, force: bool = False) -> Any:
        self.renew_functions()
        return self._make_placed("predict_function", force)

    def renew_functions(self) -> None:
        """Makes functions again that read variables which have moved since.

        None that Keras has is dropped: a callback may be the one who asks, and
        `fit` goes on with what it has.
        """
        if not self.tower_calls.any_moved():
            return
        for name in _STEPS:
            if getattr(self, name) is not None:
                self._make_placed(name, force=True)

    def _make_placed(self, name: str, force: bool) -> Any:
        """The function of this name: Keras's, called as this model is placed."""
        if not force and getattr(self, name) is not None:
            return getattr(self, name)
        getattr(super(), f"make_{name}")(force=True)
        function = _fed(getattr(self, name), lambda: self.placement)
        if name == "train_function":
            function = _beside_outputs(function, self.placement)
        step = _STEPS[name]
        if self.prefetch and step is not None:
            function = self.read_ahead.function(getattr(self, step), function)
        steps = FedSteps(self, step or "predict_step", function)
        function = steps.predict if step is None else steps
        if self.quick_start:
            function = _as_built(function)
        setattr(self, name, function)
        return function

    def build_slots(self) -> None:
        """Makes slots eagerly, and not while the step is traced.

        Not of one that Keras gave to a template which has others of its own.
        """
        if (
            self.optimizer
            and not self.optimizer.built
            and not keras_compile.overridden(self.template, ("compile",))
            and keras_layers.is_built(self.template)
            and self.trainable_variables
        ):
            self.optimizer.build(self.trainable_variables)
            place_slots(self, self.placement)


def _fed(
    function: Callable[[Any], Any], placement_now: Callable[[], Placement]
) -> Callable[[Any], Any]:
    """The function, with arrays taken to where batches are split.

    They would become tensors on the device of the step, or the default one.
    """

    @functools.wraps(function)
    def fed(data: Any) -> Any:
        return function(_at_inputs(data, placement_now().input_device))

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
    function: Callable[[Any], Any], placement: Placement
) -> Callable[[Any], Any]:
    """The function, with what has no device on the output device.

    Or on this process, if that is of another one: TensorFlow would wait for
    what a step returns with Python locked, and the step for a generator.
    """
    outputs = str(placement.output_device)
    device = HOST_HERE if process_of(outputs) else outputs

    @functools.wraps(function)
    def placed(data: Any) -> Any:
        with tf.device(device):
            return function(data)

    return placed


def _as_built(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The function, which TensorFlow does not rewrite before its first call."""

    @functools.wraps(function)
    def started(data: Any) -> Any:
        with unoptimized():
            return function(data)

    return started


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
