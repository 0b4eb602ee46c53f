"""keras_optimizer: an optimizer that works beside the variables it updates.

Keras has no public word for its internals that this file touches:
`_trainable_variables`, `_all_reduce_sum_gradients`, `_distribution_strategy`,
`_accumulated_gradients` and `_backend_reset_gradient_accumulators`.
`keras_compile_test.py` fails when one of them changes.
"""

import contextlib
import functools
import math
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from towers.foreign.keras_layers import raw

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
        devices = {raw(v).device for v in trainable_variables or known}
        return tf.device(devices.pop()) if len(devices) == 1 else _spread()

    def of_reference(reference_variable: Any, *_: Any, **__: Any) -> Any:
        return tf.device(raw(reference_variable).device)

    def of_variable(gradient: Any, variable: Any, learning_rate: Any) -> Any:
        return tf.device(raw(variable).device)

    for name, which in (
        ("apply", of_all),
        ("add_variable_from_reference", of_reference),
        ("update_step", of_variable),
    ):
        function = beside(which, getattr(optimizer, name))
        object.__setattr__(optimizer, name, function)

    def forget() -> None:
        for gradient in optimizer._accumulated_gradients:
            if gradient is not None:
                with tf.device(raw(gradient).device):
                    gradient.assign(tf.zeros_like(gradient))

    # One made under a strategy would go on with that.
    optimizer._distribution_strategy = tf.distribute.get_strategy()
    # Keras makes one zero for all accumulators of a shape.
    object.__setattr__(
        optimizer, "_backend_reset_gradient_accumulators", forget
    )
    # Outside tf.distribute there is nothing to reduce.
    object.__setattr__(optimizer, "_all_reduce_sum_gradients", lambda g: g)


def _spread() -> Any:
    """Where ops that have no device go beside the largest of their inputs.

    What an optimizer does to all gradients and variables (clipping, weight
    decay, averages) then happens where each lives.
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

    def size(tensor: tf.Tensor) -> float:
        if tensor.dtype == tf.resource:
            return math.inf
        return tensor.shape.num_elements() or 0

    def beside_largest(op: tf.Operation) -> str:
        if op.device or op.type in _CALLS or not op.inputs:
            return op.device
        largest = max(op.inputs, key=size)
        return device_of(largest) if size(largest) > 1 else ""

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
