"""moments: what batch norms saw, of all towers together."""

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from towers.engine import all_towers
from towers.foreign.keras_layers import has_moments
from towers.keras_model import merge_rules
from towers.placement.layer_devices import devices_of
from towers.verbs.relays import units_of
from towers.verbs.rows import Rows, drop


@dataclasses.dataclass(frozen=True)
class Moments:
    """What one call of a batch-norm layer saw in one tower.

    Attributes:
      mean, variance: [channels], over the tower's shard.
      count: the unmasked positions, a scalar, or [channels] where channels have
        masks of their own; None without a mask, when the tower's rows say as
        much.
      of_all: whether they are those of the whole batch already.
    """

    mean: tf.Tensor
    variance: tf.Tensor
    count: tf.Tensor | None
    of_all: bool = False


def moments_of(
    layer: Any, inputs: tf.Tensor, mask: tf.Tensor | None, statistics: Any
) -> Moments:
    """What a batch norm saw, by what Keras says of it.

    Args:
      layer: the batch norm.
      inputs: [rows, ..., channels], or channels on the layer's axis.
      mask: as `inputs`, without the last axis; None for none.
      statistics: mean and variance, [channels]; Keras squeezes them if masked.
    """
    if mask is None:
        return Moments(statistics[0], statistics[1], None)
    mean, variance = (tf.reshape(x, [-1]) for x in statistics)
    counted = tf.cast(mask, mean.dtype)
    axis = layer.axis % inputs.shape.rank
    if axis == inputs.shape.rank - 1:
        return Moments(mean, variance, tf.reduce_sum(counted))
    others = [i for i in range(inputs.shape.rank - 1) if i != axis]
    width = tf.cast(tf.shape(inputs)[-1], mean.dtype)
    return Moments(mean, variance, tf.reduce_sum(counted, others) * width)


def is_pooled(layer: Any) -> bool:
    """Whether a layer keeps a moving mean and variance of its batches.

    Unless somebody has declared another rule for them.
    """
    return has_moments(layer) and not any(
        merge_rules.declared(v) for v in statistics(layer)
    )


def statistics(layer: Any) -> list[Any]:
    """The variables that a batch norm moves by the moments of its batches."""
    names = ["moving_mean", "moving_variance"]
    if getattr(layer, "renorm", False):
        names += ["moving_stddev", "renorm_mean", "renorm_stddev"]
    return [getattr(layer, name, None) for name in names]


def pooled_moments(
    means: tf.Tensor, variances: tf.Tensor, counts: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """Mean and variance, [channels], of all shards, from those of each.

    The law of total variance: the mean of the variances plus the variance of
    the means, weighted by how much each tower saw (Chan, Golub and LeVeque,
    "Updating formulae and a pairwise algorithm for computing sample
    variances", 1979).

    Args:
      means, variances: [n, channels].
      counts: [n, channels] or [n, 1], of which the shares are taken.
    """
    shares = tf.math.divide_no_nan(counts, tf.reduce_sum(counts, 0))
    mean = tf.reduce_sum(shares * means, 0)
    between = tf.math.squared_difference(means, mean)
    return mean, tf.reduce_sum(shares * (variances + between), 0)


def moments_of_all(
    own: Moments, size: tf.Tensor, name: str
) -> tuple[Any, Any, list[Moments]]:
    """Moments of the whole batch, and for one tower what it says of them.

    One vector crosses to where towers meet, and one back; of gradients as much.

    Args:
      own: the tower's.
      size: how many numbers it has seen.
      name: the layer's, for errors.

    Raises:
      NeedsOthers: the tower is built by itself.
      ValueError: it is in a loop or a custom gradient, where no other tower is.
    """
    channels = own.mean.shape[0]
    count = own.count
    if count is None:
        count = tf.cast(size // channels, own.mean.dtype)
    counts = tf.reshape(count, [-1])
    sizes = [channels, channels, counts.shape[0]]
    results = []

    def pool(parts: tf.Tensor) -> tf.Tensor:  # [n, sum of sizes]
        each = tf.split(parts, sizes, 1)
        results.append(Moments(*pooled_moments(*each), None, of_all=True))
        return tf.stack([results[0].mean, results[0].variance])

    part = tf.concat([own.mean, own.variance, counts], 0)
    whole = all_towers.met(
        *(pool, (part[tf.newaxis],), name),
        "trains on the statistics of the whole batch (synchronized=True)",
        "a model without such layers, frozen ones apart",
    )
    return *tf.unstack(whole), results


@dataclasses.dataclass(frozen=True, order=True)
class Group:
    """Moments that travel together, in one tensor.

    Attributes:
      device: that of the variables that they move.
      pin: that of their layer, or one per tower; none if it runs on the tower.
      dtype: its name.
      counted: whether each comes with the positions that were counted.
      by_one: whether one tower speaks for all.
      calls: which are in there, as the index of `moving_mean` and the number
        of the layer's call.
    """

    device: str
    pin: tuple[str, ...]
    dtype: str
    counted: bool
    by_one: bool
    calls: tuple[tuple[int, int], ...] = ()


def packed(
    graph: Any,
    devices: Sequence[str],
    moments: dict[int, list[Moments]],
    tower: int,
) -> dict[Group, tf.Tensor]:
    """One tower's moments, in one tensor for each device that they go to.

    Args:
      graph: names the layers.
      devices: each variable's device.
      moments: what each call of a batch norm saw, by its `moving_mean`.
      tower: which one.

    Returns:
      By group: a tensor [2, channels of all calls] of means and variances, or
      [3, channels] with the counts below.
    """
    layers = graph.batch_norms
    groups: dict[Group, list[tuple[tuple[int, int], Moments]]] = {}
    for i, calls in moments.items():
        for k, call in enumerate(calls):
            group = Group(
                device=devices[i],
                pin=() if call.of_all else _pin(graph, layers[i]),
                dtype=call.mean.dtype.name,
                counted=call.count is not None,
                by_one=call.of_all,
            )
            groups.setdefault(group, []).append(((i, k), call))
    vectors = {}
    for group, members in groups.items():
        places, each = zip(*members)
        columns = [[c.mean for c in each], [c.variance for c in each]]
        # Where the layer saw them, or where towers met.
        here = group.pin[tower % len(group.pin)] if group.pin else None
        here = each[0].mean.device if group.by_one else here
        with tf.device(here) if here else contextlib.nullcontext():
            if group.counted:
                counts = [tf.broadcast_to(c.count, c.mean.shape) for c in each]
                columns.append(counts)
            whole = dataclasses.replace(group, calls=places)
            vectors[whole] = tf.stack([tf.concat(c, 0) for c in columns])
    return vectors


def _pin(graph: Any, layer: Any) -> tuple[str, ...]:
    return tuple(devices_of(graph.pins.get(id(layer), ())))


def besides_moments(
    graph: Any,
    state: dict[int, tf.Tensor],
    moments: dict[int, list[Moments]],
) -> dict[int, tf.Tensor]:
    """One tower's new values by variable, but of those that moments tell of."""
    layers = graph.batch_norms
    places = {
        graph.index_of(variable)
        for i in moments
        for variable in statistics(layers[i])
    }
    return {i: x for i, x in state.items() if i not in places}


def of_all_shards(
    parts: Sequence[tf.Tensor], rows: Rows, home: str
) -> tuple[tf.Tensor, tf.Tensor]:
    """Mean and variance of all shards together, from those of each.

    Those of several towers of another machine are pooled there, and cross once.

    Args:
      parts: per tower, `packed`, on its device; or of one that speaks for all.
      rows: how many each tower has.
      home: the device where they are wanted.
    """
    if len(parts) == 1:
        return parts[0][0], parts[0][1]
    units = units_of([part.device for part in parts], home)
    if len(units) == len(parts):
        each = tf.stack(rows.masked(parts))
        counts = tf.cast(rows.counts, each.dtype)[:, tf.newaxis]
        if each.shape[1] == 3:
            counts = each[:, 2]
        return pooled_moments(each[:, 0], each[:, 1], counts)
    counted = []
    for first, *others in units:
        if not others:
            counted.append(_counted(parts[first], rows, first))
            continue
        with tf.device(parts[first].device):
            each = tf.stack(
                [_counted(parts[i], rows, i) for i in (first, *others)]
            )
            pool = pooled_moments(each[:, 0], each[:, 1], each[:, 2])
            counted.append(tf.stack([*pool, tf.reduce_sum(each[:, 2], 0)]))
    each = tf.stack(counted)
    return pooled_moments(each[:, 0], each[:, 1], each[:, 2])


def _counted(part: tf.Tensor, rows: Rows, tower: int) -> tf.Tensor:
    """[3, channels]: what a tower says, zeros without rows, and of how much."""
    if rows.may_be_empty[tower]:
        part = drop(part, rows.counts[tower] > 0)
    if part.shape[0] == 3:
        return part
    count = tf.cast(rows.counts[tower], part.dtype)
    return tf.concat([part, tf.fill([1, part.shape[1]], count)], 0)


def moving_average(
    old: tf.Tensor, new: tf.Tensor, momentum: float
) -> tf.Tensor:
    """The moving average that Keras's `BatchNormalization` keeps."""
    new = tf.cast(new, old.dtype)
    return old * momentum + new * (1.0 - momentum)
