"""memory: in which tower and layer memory was lacking, and what would help."""

import contextlib
import math
import re
from collections.abc import Iterator

import tensorflow as tf

from towers.foreign.tf_errors import in_words
from towers.placement.device_names import short
from towers.placement.placement import Placement, check_placement
from towers.placement.scopes import is_backward, layer_of, tower_of

# How TensorFlow's allocators, its kernels and XLA say it. Other things that are
# exhausted, as a message that is too long, are no matter of towers.
_LACKS = re.compile(
    r"OOM when allocating|out of memory|failed to allocate", re.IGNORECASE
)
_NODE = re.compile(r"\{\{node ([^}]+)\}\}")
_DEVICE = re.compile(r"on (/job:\S+) by allocator")
_TENSOR = re.compile(r"shape\s*\[([\d,]*)\] and type (\w+)")
_TOLD = re.compile(r"Tower \d+ ran out of memory")


@contextlib.contextmanager
def memory_errors(placement: Placement | None = None) -> Iterator[None]:
    """While open, an error of too little memory says which tower it was in.

    It stays a `tf.errors.ResourceExhaustedError`. In front of what TensorFlow says
    are the tower, its device, the layer, what it asked for, and what would help.
    An error that is of no tower stays as it is. `TowerModel` and eager calls of
    `build_towers` do this themselves; it is for functions and Sessions of your
    own, `with` this around a step or as a decorator below which
    `tf.function` stands.

    >>> placement = towers.Placement(["/CPU:0", "/CPU:1"])
    >>> model = keras.Sequential([keras.Input([3]), keras.layers.Dense(2)])
    >>> @towers.memory_errors(placement)
    ... @tf.function
    ... def step(x):
    ...     return towers.build_towers(model, x, placement).outputs
    >>> step(tf.ones([5, 3])).shape
    TensorShape([5, 2])

    Args:
      placement: that of the towers, which tells devices where TensorFlow does
        not.

    Raises:
      TypeError: `placement` is no `Placement`.
      tf.errors.ResourceExhaustedError: memory was lacking.
    """
    if placement is not None:
        check_placement(placement)
    try:
        yield
    except tf.errors.ResourceExhaustedError as error:
        advice = _advice(error.message, placement)
        if advice is None:
            raise
        raise in_words(error, f"{advice}\n\n") from None


def _advice(message: str, placement: Placement | None) -> str | None:
    """What is to be said; None if it is said already, or of no tower."""
    node = _NODE.search(message)
    place = tower_of(node[1]) if node else None
    if (
        node is None
        or place is None
        or _TOLD.search(message)
        or not _LACKS.search(message)
    ):
        return None
    tower, name = place
    home = None
    if placement is not None and tower < len(placement.devices):
        home = placement.devices[tower]
    at = _DEVICE.search(message)
    device = short(at[1]) if at else home
    layer = layer_of(name)
    where = f" on {device}" if device else ""
    what = f"in the layer {layer!r}" if layer else f"in {name!r}"
    way = ", in its backward pass" if is_backward(node[1]) else ""
    if layer and home and device and device != short(home):
        what += f", which is pinned there and not on the tower's {short(home)}"
    pinned = repr(layer or "a layer")
    return (
        f"Tower {tower} ran out of memory{where}, {what}{way}{_size(message)}. "
        "What helps: a smaller batch, or a smaller share of it for this tower "
        "(`weights` of the placement); computing anew in the backward pass what "
        "the forward pass would keep (keras.remat, tf.recompute_grad); layers "
        f"on other devices (`layer_devices={{{pinned}: ...}}`, "
        "towers.spread_layers); and variables and their slots on others "
        "(`parameter_device`)."
    )


def _size(message: str) -> str:
    """For which tensor memory was lacking."""
    match = _TENSOR.search(message)
    if match is None:
        return ""
    shape = [int(size) for size in match[1].split(",") if size]
    try:
        dtype = tf.as_dtype(match[2])
    except TypeError:
        return f", for a tensor of shape {shape}"
    count = math.prod(shape) * dtype.size
    return f", for {count:,} bytes ({dtype.name}{shape})"
