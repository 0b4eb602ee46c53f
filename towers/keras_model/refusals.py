"""refusals: in which layer an op is that its device cannot run, and what helps."""

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

from towers.foreign.tf_errors import in_words
from towers.keras_model.memory import memory_errors
from towers.placement.placement import Placement
from towers.placement.scopes import layer_of, tower_of

# What the placer says of strict placement, and the runtime of a missing kernel.
_REFUSED = re.compile(
    r"Cannot assign a device for operation (?:\{\{node )?([^\s:}]+)"
    r"|No OpKernel was registered to support Op .* used by \{\{node ([^}]+)\}\}"
)

# What TensorFlow says of outputs that cannot be joined.
_UNJOINED = re.compile(
    r"ConcatOp : Dimension (\d+) in both shapes must be equal: "
    r"shape\[0\] = (\[[\d,]*\]) vs. shape\[(\d+)\] = (\[[\d,]*\])"
    r"\s*\[\[\{\{node (?:\S*/)?gather(?:_\d+)?/(?:output_(\d+))?"
)

# And of a stateful RNN, where the number of rows is not known beforehand.
_STATEFUL = re.compile(
    r"(If an RNN is stateful,[^\]]*smaller\.)\][^=]*== y[^=]*= ?\] \[(\d+)\]"
)


def check_reach(name: str, value: tf.Tensor) -> None:
    """Raises unless a variable's new value can be taken where a tower ends.

    That of the body of a loop, of a branch, or of a function cannot.

    Args:
      name: the variable's path.
      value: what it is after the tower.

    Raises:
      ValueError: says what to do.
    """
    graph = getattr(value, "graph", None)  # None of what is eager
    here: Any = tf.compat.v1.get_default_graph()
    while here is not None and here is not graph:
        here = getattr(here, "outer_graph", None)
    if here is None and graph is not None:
        raise ValueError(
            f"{name!r} is changed in a loop, a branch or a function, as those of "
            "tf.map_fn and tf.cond, and in a tower the new value ends with it. "
            "Expected it to be changed outside: of a seed, draw the numbers for "
            "all turns at once, and give each turn its own."
        )


@contextlib.contextmanager
def tower_errors(placement: Placement | None = None) -> Iterator[None]:
    """While open, errors name towers: of memory, of ops that a device refuses.

    Args:
      placement: as `memory_errors` takes it.

    Raises:
      tf.errors.ResourceExhaustedError: as of `memory_errors`.
      ValueError: towers gave outputs that cannot be joined, or a stateful RNN
        got another number of rows than it keeps states for.
      tf.errors.InvalidArgumentError: as TensorFlow's, with layer and cure in
        front of what that says.
    """
    try:
        with memory_errors(placement):
            yield
    except tf.errors.InvalidArgumentError as error:
        refused = _unjoined(error.message) or _of_other_rows(error.message)
        if refused is not None:
            raise refused from None
        advice = _advice(error.message)
        if advice is None:
            raise
        raise in_words(error, f"{advice}\n\n") from None


def _advice(message: str) -> str | None:
    """What is to be said; None if it is said already, or of no layer."""
    match = _REFUSED.search(message)
    tower = tower_of(match[1] or match[2]) if match else None
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


def _unjoined(message: str) -> ValueError | None:
    """What is to be said of outputs that cannot be joined; None if they can."""
    match = _UNJOINED.search(message)
    if match is None:
        return None
    axis, first, tower, other, output = match.groups()
    which = "an output" if output is None else f"output {output}"
    return ValueError(
        f"`merge` is 'concat' for {which}, but tower 0 has shape {first} there, "
        f"and tower {tower} {other}: the model takes the size of axis {axis} "
        "from the rows that it is given. Expected the same size in all towers: "
        "ask all of them for it, as in towers.all_towers(tf.reduce_max, "
        "lengths), or pad to one that is fixed; or use 'none'."
    )


def _of_other_rows(message: str) -> ValueError | None:
    """What is to be said of a stateful RNN and its rows; None if it is not."""
    match = _STATEFUL.search(message)
    if match is None:
        return None
    return ValueError(f"{match[1]} - Received batch size: {match[2]}")
