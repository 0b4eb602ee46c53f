"""parcels: many small values of one device, in one tensor for each tower.

What crosses between devices is dear by the piece: over gRPC each tensor costs
the sender as much as copying 100 kB. So what is small is joined where it lives,
and taken apart where it is used; its gradients come back in the same way.
"""

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf

from towers.foreign.tf_gradients import own_gradient, own_gradient_of_each
from towers.verbs.relays import at_relay
from towers.verbs.replicate import FULL
from towers.verbs.rows import total

# What is larger goes by itself, as soon as it is ready: joining is a copy on
# either side, which costs more than the message from about here.
SMALL = 64 * 1024  # bytes


def is_small(value: tf.Tensor, dtype: tf.DType | None = None) -> bool:
    """Whether a value is better sent together with others.

    Args:
      value: of any dtype.
      dtype: that in which it is sent, if it is another.
    """
    size = (dtype or value.dtype).size
    is_fixed = value.shape.is_fully_defined() and value.dtype != tf.string
    return is_fixed and value.shape.num_elements() * size <= SMALL


def in_parcels(values: Sequence[tf.Tensor]) -> dict[tuple[int, ...], tf.Tensor]:
    """Values in few tensors, by the places of what is in each.

    Small ones of a dtype are joined, flat; others are as they are.
    """
    groups: dict[Any, list[int]] = {}
    for k, value in enumerate(values):
        groups.setdefault(value.dtype if is_small(value) else k, []).append(k)
    return {
        tuple(places): (
            _joined([values[k] for k in places])
            if len(places) > 1
            else values[places[0]]
        )
        for places in groups.values()
    }


def out_of_parcels(
    parcels: Mapping[tuple[int, ...], tf.Tensor],
    shapes: Sequence[tf.TensorShape],
) -> list[tf.Tensor]:
    """What was put `in_parcels`.

    Args:
      parcels: as from there, or sums of such.
      shapes: of all values.
    """
    values: dict[int, tf.Tensor] = {}
    for places, parcel in parcels.items():
        if len(places) == 1:
            values[places[0]] = parcel
            continue
        specs = [tf.TensorSpec(shapes[k], parcel.dtype) for k in places]
        parts = _parts(parcel, specs)
        values.update(zip(places, map(_shaped, parts, specs)))
    return [values[k] for k in range(len(shapes))]


def parcelled(
    columns: Sequence[Sequence[tf.Tensor]],
    device: str,
    targets: Sequence[str],
    ways: Sequence[str],
) -> list[list[tf.Tensor]]:
    """Values without a gradient, sent together.

    Args:
      columns: of each value, what each tower gets.
      device: where they are.
      targets: per tower, where they go.
      ways: per tower, where they cross to, see `Relays`.

    Returns:
      The same, on the towers' devices.
    """
    parcels: dict[Any, tf.Tensor] = {}
    towers = []
    for values, target, way in zip(zip(*columns), targets, ways):
        names = tuple(value.name for value in values)
        if names not in parcels:
            with tf.device(device):
                parcels[names] = _joined(values) if values[1:] else values[0]
        parcel = parcels[names]
        if way != target:
            if (names, way) not in parcels:
                parcels[names, way] = at_relay(way, parcel)
            parcel = parcels[names, way]
        with tf.device(target):
            towers.append(
                [*map(_shaped, _parts(parcel, values), values)]
                if values[1:]
                else [parcel]
            )
    return [list(column) for column in zip(*towers)]


def replicate_together(
    values: Sequence[tf.Tensor],
    device: str,
    targets: Sequence[str],
    kept: Sequence[tf.Tensor | None],
    trained: bool = True,
    half: tf.DType | None = None,
) -> list[list[tf.Tensor]]:
    """As `replicate` of each, with one tensor per tower and direction.

    A value that no tower has a gradient of has none, and sparse ones stay so
    and travel by themselves.

    Args:
      values: floats of one dtype and of known shapes, read on `device`.
      device: where the variables live.
      targets: per tower, where they are used.
      kept: as for `replicate`.
      trained: whether anyone asks which of the values have a gradient. To know
        takes an op for each value and tower.
      half: as for `replicate`.

    Returns:
      For each value its copies, one per tower, on `targets`.
    """
    n = len(kept)
    way_back = _WayBack(values, kept, half)

    @own_gradient
    def joined(*values: tf.Tensor) -> Any:
        def backward(*upstream: Any) -> list[Any]:
            with tf.device(device):
                return way_back.sums(upstream)

        parcel = _joined(values)
        parcel = parcel if half is None else tf.cast(parcel, half)
        return [parcel] * n, backward

    with tf.device(device):
        parcels = joined(*values)
    opened = _opened if trained else _opened_at_once
    towers = [opened(way_back, i, parcels[i], targets[i]) for i in range(n)]
    way_back.heard.clear()  # a forward accumulator has asked for gradients
    return [list(column) for column in zip(*towers)]


@dataclasses.dataclass(frozen=True)
class _TowerGradients:
    """The gradients that one tower has of the values.

    Attributes:
      places: of which values there are dense ones.
      gradients: those, joined.
      sparse: the others that there are, by place.
    """

    places: tuple[int, ...]
    gradients: tf.Tensor
    sparse: dict[int, tf.IndexedSlices]


class _WayBack:
    """Gradients of what went in parcels, on their way to where it came from.

    A tape makes zeros of gradients that there are none of, and takes no sparse
    ones for a part of a tensor. So which there are is told past the tape.

    Attributes:
      heard: per tower, the places of values that have a gradient.
      by_tower: the gradients of each tower that has one.
    """

    def __init__(
        self,
        values: Sequence[tf.Tensor],
        kept: Sequence[Any],
        half: tf.DType | None = None,
    ):
        self.heard: dict[int, set[int]] = collections.defaultdict(set)
        self.by_tower: dict[int, _TowerGradients] = {}
        self.values = values
        self._kept, self._half = kept, half

    def for_tape(
        self, tower: int, upstream: Sequence[Any], parcel: tf.Tensor
    ) -> tf.Tensor:
        """The parcel's gradient, for a tape; what there is of it is noted."""
        heard = sorted(self.heard.pop(tower, range(len(self.values))))
        sparse = {
            k: upstream[k]
            for k in heard
            if isinstance(upstream[k], tf.IndexedSlices)
        }
        places = tuple(k for k in heard if k not in sparse)
        dense = [upstream[k] for k in places]
        if len({x.dtype for x in dense}) > 1:  # what is summed there is full
            dense = [self._full(x) for x in dense]
        joined = _joined(dense, parcel.dtype)
        self.by_tower[tower] = _TowerGradients(places, joined, sparse)
        if len(places) == len(self.values):
            return joined
        return tf.zeros(parcel.shape, parcel.dtype)  # nobody reads it

    def _full(self, gradient: Any) -> Any:
        """A gradient as it is summed."""
        return gradient if self._half is None else tf.cast(gradient, FULL)

    def sums(self, upstream: Sequence[tf.Tensor]) -> list[Any]:
        """The gradient of each value, or None."""
        everything = tuple(range(len(self.values)))
        by_tower = self.by_tower or {
            i: _TowerGradients(everything, parcel, {})
            for i, parcel in enumerate(upstream)
        }
        self.by_tower = {}
        terms: list[list[Any]] = [[] for _ in self.values]
        alike: dict[tuple[int, ...], list[Any]] = {}
        for i, own in by_tower.items():
            whole = own.places == everything
            parcel = upstream[i] if whole else own.gradients
            pair = self._full(parcel), self._kept[i]
            alike.setdefault(own.places, []).append(pair)
            for k, gradient in own.sparse.items():
                terms[k].append((self._full(gradient), self._kept[i]))
        for places, pairs in alike.items():
            if not places:
                continue
            values = [self.values[k] for k in places]
            parts = _parts(total(*zip(*pairs)), values)
            for k, part, value in zip(places, parts, values):
                terms[k].append((_shaped(part, value), None))
        return [total(*zip(*each)) if each else None for each in terms]


def _opened(
    way_back: _WayBack, tower: int, parcel: tf.Tensor, target: str
) -> list[tf.Tensor]:
    """The values in a parcel, on the tower's device."""
    values = way_back.values

    @own_gradient
    def taken_apart(parcel: tf.Tensor) -> Any:
        def backward(*upstream: Any) -> tf.Tensor:
            with tf.device(target):
                return way_back.for_tape(tower, upstream, parcel)

        return _parts(parcel, values), backward

    def shaped(parts: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        return [_shaped(*pair) for pair in zip(parts, values)]

    def heard(k: int, upstream: Any) -> Any:
        way_back.heard[tower].add(k)
        if isinstance(upstream, tf.IndexedSlices):
            return upstream
        with tf.device(target):
            return _flat(upstream)

    with tf.device(target):
        return own_gradient_of_each(shaped, heard, taken_apart(parcel))


def _opened_at_once(
    way_back: _WayBack, tower: int, parcel: tf.Tensor, target: str
) -> list[tf.Tensor]:
    """As `_opened`, where no gradient may count as zeros."""

    @own_gradient
    def taken_apart(parcel: tf.Tensor) -> Any:
        def backward(*upstream: Any) -> tf.Tensor:
            with tf.device(target):
                return way_back.for_tape(tower, upstream, parcel)

        parts = _parts(parcel, way_back.values)
        return [
            _shaped(*pair) for pair in zip(parts, way_back.values)
        ], backward

    with tf.device(target):
        return taken_apart(parcel)


def _joined(
    values: Sequence[tf.Tensor], dtype: tf.DType | None = None
) -> tf.Tensor:
    flat = [_flat(value) for value in values]
    return tf.concat(flat, 0) if flat else tf.zeros([0], dtype)


def _flat(value: tf.Tensor) -> tf.Tensor:
    return value if value.shape.rank == 1 else tf.reshape(value, [-1])


def _parts(parcel: tf.Tensor, values: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    return tf.split(parcel, [math.prod(value.shape) for value in values])


def _shaped(part: tf.Tensor, value: tf.Tensor) -> tf.Tensor:
    if value.shape.rank == 1:
        return part
    return tf.reshape(part, value.shape)
