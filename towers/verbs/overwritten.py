"""overwritten: copies of a value that its gradient overwrites, by the maximum."""

from collections.abc import Collection, Sequence
from typing import Any

import tensorflow as tf

from towers.foreign.tf_gradients import own_gradient
from towers.verbs.relays import Kept, units_of


def replicate_overwritten(
    value: tf.Tensor, device: str, places: Sequence[str], kept: Kept
) -> list[tf.Tensor]:
    """As `replicate`, for a value that its gradient overwrites.

    Keras trains scales and histories of float8 so (`overwrite_with_gradient`):
    what a layer says is their gradient is their new value. Of several it takes
    the maximum, as it does for gradients that it accumulates. That of several
    towers of another machine is found there.

    Args:
      value: a float, read on `device`.
      device: where the variable lives.
      places: per tower, where it takes its copy.
      kept: as for `replicate`, by device; a tower without a gradient counts for
        nothing either. If none counts, the value overwrites itself.
    """
    # A tape gives zeros for what has no gradient, and zero may be more than what
    # others say; so it is told past the tape which towers have one.
    heard: set[int] = set()

    def copies(
        value: tf.Tensor, there: str, units: Sequence[Sequence[int]]
    ) -> list[tf.Tensor]:
        """Of one value, one for each unit of towers."""

        @own_gradient
        def made(value: tf.Tensor) -> Any:
            def backward(*upstream: Any) -> Any:
                told = set(heard) or {i for unit in units for i in unit}
                if there == device:
                    heard.clear()
                with tf.device(there):
                    flags = [_speaks(unit, told, kept(there)) for unit in units]
                    return _largest(upstream, flags, value)

            return [value] * len(units), backward

        with tf.device(there):
            return made(value)

    def noted(i: int, copy: tf.Tensor, there: str) -> tf.Tensor:
        """A tower's copy; whether that has a gradient is noted."""

        def passed(copy: tf.Tensor) -> Any:
            def backward(upstream: Any) -> tf.Tensor:
                heard.add(i)
                with tf.device(there):
                    return tf.convert_to_tensor(upstream)

            return copy, backward

        with tf.device(there):
            return own_gradient(passed)(copy)

    units, made = units_of(places, device), {}
    for unit, copy in zip(units, copies(value, device, units)):
        there, each = device, [copy]
        if len(unit) > 1:
            there = places[unit[0]]
            with tf.device(there):
                copy = tf.identity(copy)
            each = copies(copy, there, [[i] for i in unit])
        made.update({i: noted(i, x, there) for i, x in zip(unit, each)})
    heard.clear()  # a forward accumulator has asked for gradients
    return [made[i] for i in range(len(places))]


def _speaks(
    unit: Sequence[int], told: Collection[int], kept: Sequence[tf.Tensor | None]
) -> tf.Tensor:
    """Whether any of these towers has a gradient, and rows."""
    flags = [kept[i] for i in unit if i in told]
    if not flags or any(flag is None for flag in flags):
        return tf.constant(bool(flags))
    return tf.reduce_any(tf.stack(flags))


def _largest(
    values: Sequence[tf.Tensor], flags: Sequence[tf.Tensor], default: tf.Tensor
) -> tf.Tensor:
    """The maximum of those values whose flag is set, or else the default."""
    result, found = default, tf.constant(False)
    for value, flag in zip(values, flags):
        more = tf.where(found, tf.maximum(result, value), value)
        result, found = tf.where(flag, more, result), found | flag
    return result
