"""refusals: in which layer an op is that its device cannot run, and what helps."""

import contextlib
import re
from collections.abc import Iterator

import tensorflow as tf

from towers.placement.scopes import layer_of, tower_of

# What the placer says of strict placement, and the runtime of a missing kernel.
_REFUSED = re.compile(
    r"Cannot assign a device for operation (?:\{\{node )?([^\s:}]+)"
    r"|No OpKernel was registered to support Op .* used by \{\{node ([^}]+)\}\}"
)


@contextlib.contextmanager
def refusals_named() -> Iterator[None]:
    """While open, an op that its device refuses is told by its layer.

    Raises:
      tf.errors.InvalidArgumentError: as TensorFlow's, with layer and cure in
        front of what that says.
    """
    try:
        yield
    except tf.errors.InvalidArgumentError as error:
        told = _told(error.message)
        if told is None:
            raise
        raise type(error)(
            error.node_def, error.op, f"{told}\n\n{error.message}"
        ).with_traceback(error.__traceback__) from None


def _told(message: str) -> str | None:
    """What is to be said; None if it is said already, or of no layer."""
    found = _REFUSED.search(message)
    tower = tower_of(found[1] or found[2]) if found else None
    layer = layer_of(tower[1]) if tower else ""
    if tower is None or not layer or "`layer_devices={" in message:
        return None
    return (
        f"The layer {layer!r} has an op that the device of tower {tower[0]} "
        "has no kernel for. Expected a device that has: give the placement "
        f'`layer_devices={{"{layer}": "/CPU:0"}}`, or where there is a kernel; '
        "or let TensorFlow move such ops, by "
        "tf.config.set_soft_device_placement(True)."
    )
