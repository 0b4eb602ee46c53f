"""keras_optimizer: an optimizer that works beside the variables it updates.

Keras has no public word for its internals that this file touches:
`_all_reduce_sum_gradients`, `_distribution_strategy`, `_accumulated_gradients`,
`_variables`, `_backend_reset_gradient_accumulators`, `_clip_gradients`,
`_backend_apply_gradients` and `_stateful_handle_finite_grads`.
`keras_updates_test.py` fails when one of them changes.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf

from towers.foreign.keras_layers import device_of, mark_device, raw
from towers.foreign.keras_numbers import held_optimizers, numbers_known
from towers.foreign.keras_updates import (
    applied_by_device,
    clipped,
    finite,
    trained,
    unscaled,
    update_step,
)

# Ops that run functions, in which each op has a device of its own.
_BRANCHES = ("If", "StatelessIf")  # which go beside their condition
_CALLS = (
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
    held = held_optimizers(optimizer)[1:]
    for one in held:
        pin_optimizer(one)

    def beside(which: Callable[..., Any], function: Callable) -> Callable:
        @functools.wraps(function)
        def pinned(*args: Any, **kwargs: Any) -> Any:
            with which(*args, **kwargs):
                return function(*args, **kwargs)

        pinned._towers_pinned = True  # type: ignore[attr-defined]
        return pinned

    @contextlib.contextmanager
    def of_all(grads: Any, trainable_variables: Any = None) -> Iterator[None]:
        variables = [v for one in held or [optimizer] for v in trained(one)]
        devices = [device_of(v) for v in trainable_variables or variables]
        devices = list(dict.fromkeys(devices))
        with tf.device(devices[0]) if len(devices) == 1 else _spread():
            if not optimizer.built:  # there are no numbers yet
                yield
                return
            with numbers_known(optimizer):
                yield

    def of_reference(reference_variable: Any, *_: Any, **__: Any) -> Any:
        return tf.device(raw(reference_variable).device)

    def meant_as(function: Callable) -> Callable:
        @functools.wraps(function)
        def add(reference_variable: Any, *args: Any, **kwargs: Any) -> Any:
            slot = function(reference_variable, *args, **kwargs)
            if device_of(reference_variable) != raw(reference_variable).device:
                mark_device(slot, device_of(reference_variable))
            return slot

        return add

    for name, which in (
        ("apply", of_all),
        ("add_variable_from_reference", of_reference),
    ):
        function = getattr(optimizer, name)
        if which is of_reference:
            function = meant_as(function)
        object.__setattr__(optimizer, name, beside(which, function))
    for name, instead in (
        ("update_step", update_step),
        ("_backend_apply_gradients", applied_by_device),
        ("_clip_gradients", clipped),
        ("check_finite", finite),
        ("_stateful_handle_finite_grads", unscaled),
    ):
        function = getattr(optimizer, name, None)
        if function is not None:  # the last are a LossScaleOptimizer's
            function = functools.partial(instead, optimizer, function)
            object.__setattr__(optimizer, name, function)

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
        if op.device or not op.inputs:
            return op.device
        if op.type in _BRANCHES:
            return device_of(op.inputs[0])
        if op.type in _CALLS:
            return op.device
        return device_of(max(op.inputs, key=size))

    return tf.compat.v1.device(beside_largest)


def optimizer_variables(optimizer: Any) -> list[tuple[Any, Any]]:
    """(variable, the model's variable that it is a slot of, or None)."""
    pairs = [
        pair
        for one in held_optimizers(optimizer)[1:]
        for pair in optimizer_variables(one)
    ]
    own = trained(optimizer)
    owners = {
        id(slot): variable
        for name, slots in vars(optimizer).items()
        # All that there are may be as many as there are to train.
        if name != "_variables"
        and isinstance(slots, list)
        and len(slots) == len(own)
        for slot, variable in zip(slots, own)
    }
    owned = {id(v) for v, _ in pairs}
    return pairs + [
        (v, owners.get(id(v)))
        for v in optimizer.variables
        if id(v) not in owned
    ]
