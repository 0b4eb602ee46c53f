"""overwritten: copies of values that gradients overwrite, by the maximum."""

from collections.abc import Collection, Sequence
from typing import Any

import tensorflow as tf

from towers.foreign.tf_gradients import own_gradient
from towers.verbs.parcels import in_parcels, out_of_parcels
from towers.verbs.relays import Kept, units_of


def replicate_overwritten(
    values: Sequence[tf.Tensor], device: str, places: Sequence[str], kept: Kept
) -> list[list[tf.Tensor]]:
    """As `replicate` of each, for values that their gradients overwrite.

    Keras trains scales and histories of float8 so (`overwrite_with_gradient`):
    what a layer says is their gradient is their new value. Of several it takes
    the maximum, as it does for gradients that it accumulates. That of several
    towers of another machine is found there. All cross in one tensor.

    Args:
      values: floats of one dtype, read on `device`; small ones if there are
        several.
      device: where the variables live.
      places: per tower, where it takes its copies.
      kept: as for `replicate`, by device; a tower without a gradient counts for
        nothing either. If none counts, the value overwrites itself.

    Returns:
      For each value its copies, one per tower.
    """
    # A tape gives zeros for what has no gradient, and zero may be more than what
    # others say; so it is told past the tape which towers have one, of which value.
    heard: set[tuple[int, int]] = set()
    every = {(i, k) for i in range(len(places)) for k in range(len(values))}

    def sent(
        values: Sequence[tf.Tensor], there: str, units: Sequence[Sequence[int]]
    ) -> list[tf.Tensor]:
        """All values in one tensor, for each unit of towers."""

        @own_gradient
        def joined(*values: tf.Tensor) -> Any:
            def backward(*upstream: Any) -> Any:
                pairs = set(heard) or every
                if there == device:
                    heard.clear()
                with tf.device(there):
                    columns = zip(*[_apart(x, values) for x in upstream])
                    return [
                        largest(k, column, value, pairs)
                        for k, (column, value) in enumerate(
                            zip(columns, values)
                        )
                    ]

            def largest(
                k: int, column: Any, value: tf.Tensor, pairs: Collection[Any]
            ) -> tf.Tensor | None:
                speakers = {i for i, of in pairs if of == k}
                if not speakers:
                    return None
                flags = [_speaks(u, speakers, kept(there)) for u in units]
                return _largest(column, flags, value)

            return [_together(values)] * len(units), backward

        with tf.device(there):
            return joined(*values)

    def taken(parcel: tf.Tensor, there: str) -> list[tf.Tensor]:
        """The values, from what was sent."""

        def apart(parcel: tf.Tensor) -> Any:
            def backward(*upstream: Any) -> tf.Tensor:
                with tf.device(there):
                    return _together([*map(tf.convert_to_tensor, upstream)])

            return _apart(parcel, values), backward

        with tf.device(there):
            return own_gradient(apart)(parcel)

    def noted(i: int, k: int, copy: tf.Tensor) -> tf.Tensor:
        """A tower's copy; whether that has a gradient is noted."""

        def passed(copy: tf.Tensor) -> Any:
            def backward(upstream: Any) -> tf.Tensor:
                heard.add((i, k))
                with tf.device(places[i]):
                    return tf.convert_to_tensor(upstream)

            return copy, backward

        with tf.device(places[i]):
            return own_gradient(passed)(copy)

    units, by_tower = units_of(places, device), {}
    for unit, parcel in zip(units, sent(values, device, units)):
        parcels = [parcel]
        if len(unit) > 1:
            there = places[unit[0]]
            arrived = taken(parcel, there)
            parcels = sent(arrived, there, [[i] for i in unit])
        for i, parcel in zip(unit, parcels):
            copies = taken(parcel, places[i])
            by_tower[i] = [noted(i, k, x) for k, x in enumerate(copies)]
    heard.clear()  # a forward accumulator has asked for gradients
    return [
        [by_tower[i][k] for i in range(len(places))] for k in range(len(values))
    ]


def _together(values: Sequence[tf.Tensor]) -> tf.Tensor:
    (parcel,) = in_parcels(values).values()
    return parcel


def _apart(parcel: tf.Tensor, values: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    shapes = [value.shape for value in values]
    return out_of_parcels({tuple(range(len(values))): parcel}, shapes)


def _speaks(
    unit: Sequence[int],
    speakers: Collection[int],
    kept: Sequence[tf.Tensor | None],
) -> tf.Tensor:
    """Whether any of these towers has a gradient, and rows."""
    flags = [kept[i] for i in unit if i in speakers]
    if not flags or any(flag is None for flag in flags):
        return tf.constant(bool(flags))
    return tf.reduce_any(tf.stack(flags))


def _largest(
    values: Sequence[tf.Tensor], flags: Sequence[tf.Tensor], default: tf.Tensor
) -> tf.Tensor:
    """The maximum of those values whose flag is set, or else the default."""
    result, any_set = default, tf.constant(False)
    for value, flag in zip(values, flags):
        more = tf.where(any_set, tf.maximum(result, value), value)
        result, any_set = tf.where(flag, more, result), any_set | flag
    return result
