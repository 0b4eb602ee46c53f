"""forward: each tower on its own device, there and back."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tensorflow as tf

from towers.own_gradient import own_gradient


def run_towers(
    functions: Sequence[Callable[..., Any]],
    devices: Sequence[str],
    arguments: Sequence[Any],
    elsewhere: Mapping[int, str] | None = None,
) -> list[Any]:
    """Runs `functions[i](arguments[i])` on `devices[i]`, backward included.

    The backward ops of a plain tape carry no device and end on the default
    one. Here each tower is a custom gradient that differentiates itself with
    `tf.gradients`, colocated, under its own device.

    Args:
      functions: one per tower, pure, from a nest of tensors to a nest.
      devices: one device name per tower.
      arguments: one nest of tensors per tower.
      elsewhere: the devices of those tensors, by their place in the flat
        nest, that are not taken to the tower.

    Returns:
      One nest of tensors per tower.
    """
    return [
        pinned(function, device, argument, elsewhere or {})
        for function, device, argument in zip(functions, devices, arguments)
    ]


def pinned(
    function: Callable[..., Any],
    device: str,
    argument: Any,
    elsewhere: Mapping[int, str],
) -> Any:
    """`function(argument)`, forward and backward on `device`, in a graph."""
    tensors = [x for x in tf.nest.flatten(argument) if x is not None]
    made: list[Any] = []

    @own_gradient
    def run(*tensors: tf.Tensor) -> Any:
        # A loop places what it hands from step to step beside where that came
        # from: it must come from this device, or every step asks the other.
        here = []
        for i, tensor in enumerate(tensors):
            with tf.device(elsewhere.get(i, device)):
                here.append(tf.identity(tensor))
        made.append(function(_refill(argument, here)))
        # What has no gradient need not be asked for one, with zeros.
        results = [x for x in tf.nest.flatten(made[0]) if _has_gradient(x)]

        def backward(*upstream: Any, variables: Any = ()) -> list[Any]:
            if variables:
                raise ValueError(
                    "The tower reads the trainable variables "
                    f"{[v.name for v in variables]}, which belong to no model "
                    "that it was given, so their gradient would be lost. Make "
                    "them weights of a layer, or pass their model too."
                )
            with tf.device(device):
                return _gradients(results, tensors, upstream)

        return results, backward

    with tf.device(device):
        results = iter(run(*tensors))
    return tf.nest.map_structure(
        lambda x: next(results) if _has_gradient(x) else x, made[0]
    )


def _has_gradient(x: tf.Tensor | None) -> bool:
    return x is not None and x.dtype.is_floating and x.op.type != "StopGradient"


def _gradients(
    results: Sequence[tf.Tensor],
    tensors: Sequence[tf.Tensor],
    upstream: Sequence[Any],
) -> list[Any]:
    wanted = [
        (y, g)
        for y, g in zip(results, upstream)
        if y.dtype.is_floating and g is not None
    ]
    if not wanted:
        return [None] * len(tensors)
    return tf.compat.v1.gradients(
        [y for y, _ in wanted],
        list(tensors),
        grad_ys=[g for _, g in wanted],
        colocate_gradients_with_ops=True,
        stop_gradients=list(tensors),  # one may be made from another, outside
    )


def _refill(structure: Any, tensors: Sequence[tf.Tensor]) -> Any:
    """Puts tensors into a nest, leaf by leaf, where it has no None."""
    given = iter(tensors)
    return tf.nest.map_structure(
        lambda x: None if x is None else next(given), structure
    )
