"""keras_updates: what an optimizer does with all gradients, device by device.

Keras's optimizers clip, decay, average and count for all variables at once, on
one device. Here each part happens where its variables are, and what crosses are
an optimizer's numbers, and what each device has to say of a common norm.

Each function takes an optimizer, and a method of it, in whose place it is put.

Keras has no public word for its internals that this file touches:
`_trainable_variables`, `_accumulated_gradients`, `_model_variables_moving_average`,
`_iterations`, `_backend_apply_gradients`, `_backend_update_step`,
`_clip_gradients`, and, of a LossScaleOptimizer, `_stateful_handle_finite_grads` and
`_overwrite_variable_with_gradient`. `keras_updates_test.py` fails when one of them
changes.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from towers.foreign.keras_layers import device_of
from towers.foreign.keras_numbers import Numbers, numbers_known
from towers.foreign.patches import patched


def trained(optimizer: Any) -> list[Any]:
    return list(getattr(optimizer, "_trainable_variables", []))


def update_step(
    optimizer: Any,
    update: Callable[..., Any],
    gradient: Any,
    variable: Any,
    learning_rate: Any,
) -> Any:
    """The update of a variable, on its device."""
    device = device_of(variable)
    with tf.device(device), numbers_known(optimizer) as numbers:
        with numbers.at(device):
            return update(gradient, variable, numbers.here(learning_rate))


def applied_by_device(
    optimizer: Any,
    apply: Callable[..., Any],
    gradients: Sequence[Any],
    variables: Sequence[Any],
) -> None:
    """All that Keras does with gradients, for those of each device by itself.

    So conditions, decay and averages are where the variables are, and need
    nothing from elsewhere but the optimizer's numbers.
    """
    averaged = trained(optimizer) if optimizer.use_ema else []
    devices = list(dict.fromkeys(map(device_of, [*variables, *averaged])))
    with numbers_known(optimizer) as numbers:
        if tf.executing_eagerly() or len(devices) < 2:
            apply(gradients, variables)
            return
        if _goes_its_own_way(optimizer):
            numbers.send(devices)
            apply(gradients, variables)
            return
        clip = _clip_by_all(optimizer, numbers, gradients, variables)
        numbers.send(devices)
        counted: list[Any] = []
        steps = optimizer._iterations, "assign_add", counted.append
        for device in devices:
            some = [
                (g, v)
                for g, v in zip(gradients, variables)
                if device_of(v) == device
            ]
            with (
                tf.device(device),
                numbers.at(device),
                _only(optimizer, device),
                patched((optimizer, "_clip_gradients", clip), steps),
            ):
                apply([g for g, _ in some], [v for _, v in some])
        for step in counted[:1]:  # of Keras up to 3.7, which counts here
            optimizer._iterations.assign_add(step)


def _clip_by_all(
    optimizer: Any,
    numbers: Numbers,
    gradients: Sequence[Any],
    variables: Sequence[Any],
) -> Callable[..., Any]:
    """The clipping of one device's gradients; a common norm is sent there."""
    steps = optimizer.gradient_accumulation_steps
    if steps and _is_by_all(optimizer):
        accumulators = optimizer._accumulated_gradients
        added = []
        for gradient, variable in zip(gradients, variables):
            with tf.device(device_of(variable)):
                before = accumulators[optimizer._get_variable_index(variable)]
                added.append((gradient + before) / steps)
        gradients = added
    scale = _clip_scale(optimizer, gradients)
    if scale is None:
        return optimizer._clip_gradients
    here = numbers.add(scale, device_of(optimizer._iterations))
    return lambda some: [_scaled(gradient, here()) for gradient in some]


def _goes_its_own_way(optimizer: Any) -> bool:
    """Whether the optimizer's class has another way to update all variables."""
    names = ("_backend_apply_gradients", "_backend_update_step")
    return any(
        getattr(type(optimizer), name) is not getattr(keras.Optimizer, name)
        for name in names
    )


@contextlib.contextmanager
def _only(optimizer: Any, device: str) -> Iterator[None]:
    """While open, an optimizer knows the variables of one device only.

    But it knows their places in its lists as ever.
    """

    def here(values: Any) -> list[Any]:
        return [
            value if device_of(variable) == device else None
            for value, variable in zip(values, trained(optimizer))
        ]

    patches: list[Any] = []
    if optimizer.gradient_accumulation_steps:
        name = "_accumulated_gradients"
        patches.append((optimizer, name, here(getattr(optimizer, name))))
    if optimizer.use_ema:
        for name in ("_model_variables_moving_average", "_trainable_variables"):
            pairs = zip(trained(optimizer), getattr(optimizer, name))
            some = [x for v, x in pairs if device_of(v) == device]
            patches.append((optimizer, name, some))
    with patched(*patches):
        yield


def finite(
    optimizer: Any, finite: Callable[..., Any], gradients: Sequence[Any]
) -> Any:
    """Whether all gradients are finite: each device tells of its own."""
    groups = _by_device(gradients)
    if tf.executing_eagerly() or len(groups) < 2:
        return finite(gradients)
    flags = []
    for device, some in groups.items():
        with tf.device(device or None):
            flags.append(finite(some))
    with tf.device(device_of(optimizer._iterations)):
        return tf.reduce_all(tf.stack(flags))


def unscaled(
    optimizer: Any,
    handle: Callable[..., Any],
    gradients: Sequence[Any],
    variables: Any = None,
) -> Any:
    """Steps with gradients that are divided by the loss's scale where they are."""
    variables = list(variables or trained(optimizer))
    devices = [device_of(variable) for variable in variables]
    if tf.executing_eagerly() or len(set(devices)) < 2:
        return handle(gradients, variables)
    overwrites = getattr(
        optimizer, "_overwrite_variable_with_gradient", lambda _: False
    )
    inner, quotients = optimizer.inner_optimizer, []
    with numbers_known(optimizer) as numbers:
        numbers.send(dict.fromkeys(devices))
        for gradient, variable, device in zip(gradients, variables, devices):
            if gradient is not None and not overwrites(variable):
                with tf.device(device), numbers.at(device):
                    scale = optimizer.dynamic_scale
                    gradient = keras.ops.divide(gradient, scale)
            quotients.append(gradient)
        apply = functools.partial(inner.apply, quotients, variables)
        # In the place of what Keras divides itself, which nobody uses then.
        with patched((inner, "apply", lambda *_, **__: apply())):
            return handle(gradients, variables)


def _by_device(gradients: Sequence[Any]) -> dict[str, list[Any]]:
    groups: dict[str, list[Any]] = {}
    for gradient in gradients:
        if gradient is not None:
            groups.setdefault(gradient.device, []).append(gradient)
    return groups


def clipped(
    optimizer: Any, clip: Callable[..., Any], gradients: Sequence[Any]
) -> Any:
    """Clipped gradients: each device tells its part of a common norm."""
    scale = _clip_scale(optimizer, gradients)
    if scale is None:
        return clip(gradients)
    return [_scaled(gradient, scale) for gradient in gradients]


def _is_by_all(optimizer: Any) -> bool:
    return bool(optimizer.global_clipnorm) and not optimizer.clipnorm


def _clip_scale(optimizer: Any, gradients: Sequence[Any]) -> tf.Tensor | None:
    """What gradients on several devices are multiplied by, for their norm.

    What Keras computes (R. Pascanu et al., "On the difficulty of training
    recurrent neural networks", 2013), where each gradient's norm would cross.
    """
    groups, parts = _by_device(gradients), []
    if tf.executing_eagerly() or not _is_by_all(optimizer) or len(groups) < 2:
        return None
    dtype = keras.backend.result_type(
        *(g.dtype.name for some in groups.values() for g in some)
    )
    for device, some in groups.items():
        with tf.device(device or None):
            squares = [keras.ops.sum(keras.ops.square(g)) for g in some]
            parts.append(tf.add_n([tf.cast(x, dtype) for x in squares]))
    most = optimizer.global_clipnorm
    with tf.device(device_of(optimizer._iterations)):
        norm = tf.sqrt(tf.add_n(parts))
        scale = most * tf.minimum(1.0 / norm, 1.0 / most)
        return scale + (norm - norm)  # not finite if the norm is not


def _scaled(gradient: Any, scale: tf.Tensor) -> Any:
    return (
        None if gradient is None else gradient * tf.cast(scale, gradient.dtype)
    )
