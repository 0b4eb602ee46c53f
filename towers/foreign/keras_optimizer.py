"""keras_optimizer: an optimizer that works beside the variables it updates.

Keras has no public word for its internals that this file touches:
`_trainable_variables`, `_all_reduce_sum_gradients`, `_distribution_strategy`,
`_accumulated_gradients`, `_backend_reset_gradient_accumulators`,
`_backend_apply_gradients`, `_clip_gradients`, `_get_current_learning_rate`,
`_learning_rate`, `_iterations` and `_u_product` (of Nadam); nor has TensorFlow for
`_cached_value`, what a variable is read as. `keras_optimizer_test.py` fails when
one of them changes.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from towers.foreign.keras_layers import device_of, mean_for, raw
from towers.foreign.patches import patched

# Ops that run functions, in which each op has a device of its own.
_CALLS = (
    "If",
    "StatelessIf",
    "While",
    "StatelessWhile",
    "PartitionedCall",
    "StatefulPartitionedCall",
)


def pin_optimizer(optimizer: Any) -> None:
    """Makes an optimizer work beside the variables that it updates.

    Keras creates slots and computes updates on the default device, and sends
    all gradients through one op there. Safe to call again.
    """
    if getattr(optimizer.apply, "_towers_pinned", False):
        return
    inner = getattr(optimizer, "inner_optimizer", None)
    for one in [inner, *getattr(optimizer, "optimizers", [])]:
        if one is not None:  # of a LossScaleOptimizer or MultiOptimizer
            pin_optimizer(one)

    def beside(which: Callable[..., Any], function: Callable) -> Callable:
        @functools.wraps(function)
        def pinned(*args: Any, **kwargs: Any) -> Any:
            with which(*args, **kwargs):
                return function(*args, **kwargs)

        pinned._towers_pinned = True  # type: ignore[attr-defined]
        return pinned

    def of_all(grads: Any, trainable_variables: Any = None) -> Any:
        known = getattr(inner or optimizer, "_trainable_variables", [])
        devices = {device_of(v) for v in trainable_variables or known}
        return tf.device(devices.pop()) if len(devices) == 1 else _spread()

    def of_reference(reference_variable: Any, *_: Any, **__: Any) -> Any:
        return tf.device(device_of(reference_variable))

    def meant_as(function: Callable) -> Callable:
        @functools.wraps(function)
        def add(reference_variable: Any, *args: Any, **kwargs: Any) -> Any:
            slot = function(reference_variable, *args, **kwargs)
            if device_of(reference_variable) != raw(reference_variable).device:
                mean_for(slot, device_of(reference_variable))
            return slot

        return add

    def of_variable(gradient: Any, variable: Any, learning_rate: Any) -> Any:
        return tf.device(device_of(variable))

    def once(*_: Any) -> Any:
        return _scalars_read_once(optimizer)

    for name, which in (
        ("apply", of_all),
        ("add_variable_from_reference", of_reference),
        ("update_step", of_variable),
        ("_backend_apply_gradients", once),
    ):
        function = getattr(optimizer, name)
        if which is of_reference:
            function = meant_as(function)
        object.__setattr__(optimizer, name, beside(which, function))
    clip = functools.partial(_clipped, optimizer, optimizer._clip_gradients)
    object.__setattr__(optimizer, "_clip_gradients", clip)

    def forget() -> None:
        for gradient in optimizer._accumulated_gradients:
            if gradient is not None:
                with tf.device(device_of(gradient)):
                    gradient.assign(tf.zeros_like(gradient))

    # One made under a strategy would go on with that.
    optimizer._distribution_strategy = tf.distribute.get_strategy()
    # Keras makes one zero for all accumulators of a shape.
    object.__setattr__(
        optimizer, "_backend_reset_gradient_accumulators", forget
    )
    # Outside tf.distribute there is nothing to reduce.
    object.__setattr__(optimizer, "_all_reduce_sum_gradients", lambda g: g)


@contextlib.contextmanager
def _scalars_read_once(optimizer: Any) -> Iterator[None]:
    """While open, what an optimizer counts and goes by is one tensor each.

    Each read of a variable is a tensor of its own, and would cross by itself to
    each device that works with it, for each variable there.
    """
    if tf.executing_eagerly():
        yield
        return
    rate = optimizer._learning_rate
    numbers = [
        optimizer._iterations,
        rate if isinstance(rate, keras.Variable) else None,
        getattr(optimizer, "_u_product", None),
    ]
    with contextlib.ExitStack() as stack:
        for number in numbers:
            if number is not None:
                stack.enter_context(_read_once(raw(number)))
        if isinstance(rate, keras.optimizers.schedules.LearningRateSchedule):
            now = optimizer._get_current_learning_rate()
            stack.enter_context(
                patched((optimizer, "_get_current_learning_rate", lambda: now))
            )
        yield


@contextlib.contextmanager
def _read_once(variable: tf.Variable) -> Iterator[None]:
    """While open, reads of a variable are one tensor, until it is assigned to."""
    graph = tf.compat.v1.get_default_graph()

    def read() -> None:
        with tf.device(device_of(variable)):
            variable._cached_value = variable.read_value()

    def anew(assign: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(assign)
        def assigned(*args: Any, **kwargs: Any) -> Any:
            variable._cached_value = None
            result = assign(*args, **kwargs)
            if tf.compat.v1.get_default_graph() is graph:
                read()
            return result

        return assigned

    names = ("assign", "assign_add", "assign_sub")
    shadows = [
        (variable, name, anew(getattr(variable, name))) for name in names
    ]
    with patched((variable, "_cached_value", None), *shadows):
        read()
        yield


def _clipped(
    optimizer: Any, clip: Callable[..., Any], gradients: Sequence[Any]
) -> Any:
    """Clipped gradients: each device tells its part of the global norm.

    What Keras computes (R. Pascanu et al., "On the difficulty of training
    recurrent neural networks", 2013), where each gradient's norm would cross.
    """
    most = optimizer.global_clipnorm
    if tf.executing_eagerly() or optimizer.clipnorm or not most:
        return clip(gradients)
    squares: dict[str, list[tf.Tensor]] = {}
    for gradient in gradients:
        if gradient is not None:
            square = keras.ops.sum(keras.ops.square(gradient))
            squares.setdefault(square.device, []).append(square)
    if len(squares) < 2:
        return clip(gradients)
    parts = []
    for device, some in squares.items():
        with tf.device(device or None):
            parts.append(tf.add_n(some))
    norm = tf.sqrt(tf.add_n(parts))
    scale = most * tf.minimum(1.0 / norm, 1.0 / most)
    scale += norm - norm  # not finite if the norm is not
    return [g if g is None else g * scale for g in gradients]


def _spread() -> Any:
    """Where ops that have no device go beside the largest of their inputs.

    What an optimizer does to all gradients and variables (clipping, weight
    decay, averages) then happens where each lives, and what it makes of its
    own numbers where those are.
    """
    if tf.executing_eagerly():
        return contextlib.nullcontext()
    captured: dict[int, str] = {}

    def device_of(tensor: tf.Tensor) -> str:
        if tensor.op.type == "ReadVariableOp":
            return device_of(tensor.op.inputs[0])
        if tensor.op.type != "Placeholder":
            return tensor.device
        if id(tensor) not in captured:  # a variable's, or in a branch
            for outer, inner in getattr(tensor.graph, "captures", []):
                eager = hasattr(outer, "numpy")
                captured[id(inner)] = (
                    outer.device if eager else device_of(outer)
                )
        return captured.get(id(tensor), tensor.device)

    def size(tensor: tf.Tensor) -> tuple[float, bool]:
        if tensor.dtype == tf.resource:
            return math.inf, True
        return tensor.shape.num_elements() or 0, bool(device_of(tensor))

    def beside_largest(op: tf.Operation) -> str:
        if op.device or op.type in _CALLS or not op.inputs:
            return op.device
        return device_of(max(op.inputs, key=size))

    return tf.compat.v1.device(beside_largest)


def optimizer_variables(optimizer: Any) -> list[tuple[Any, Any]]:
    """(variable, the model's variable that it is a slot of, or None)."""
    inner = getattr(optimizer, "inner_optimizer", None)
    pairs = optimizer_variables(inner) if inner is not None else []
    trained = list(getattr(optimizer, "_trainable_variables", []))
    owners = {
        id(slot): variable
        for slots in vars(optimizer).values()
        if isinstance(slots, list) and len(slots) == len(trained)
        for slot, variable in zip(slots, trained)
    }
    done = {id(v) for v, _ in pairs}
    return pairs + [
        (v, owners.get(id(v))) for v in optimizer.variables if id(v) not in done
    ]
