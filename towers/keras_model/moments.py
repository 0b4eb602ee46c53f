"""moments: what batch norms saw, of all towers together."""

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from towers.engine import all_towers
from towers.foreign.keras_layers import has_moments
from towers.keras_model import merge_rules
from towers.verbs.rows import Rows


@dataclasses.dataclass(frozen=True)
class Moments:
    """What one call of a batch-norm layer saw in one tower.

    Attributes:
      mean, variance: [channels], over the tower's shard.
      count: scalar, the unmasked positions; None without a mask, when the
        tower's rows say as much.
    """

    mean: tf.Tensor
    variance: tf.Tensor
    count: tf.Tensor | None


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


def pooled(
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


def met(seen: Moments, size: tf.Tensor) -> tuple[Any, Any, list[Moments]]:
    """Moments of the whole batch, and for one tower what it says of them.

    One vector crosses to where towers meet, and one back.
    """
    channels = seen.mean.shape[0]
    count = seen.count
    if count is None:
        count = tf.cast(size // channels, seen.mean.dtype)
    said = []

    def pool(parts: tf.Tensor) -> tf.Tensor:  # [n, 2 * channels + 1]
        seen = tf.split(parts, [channels, channels, 1], 1)
        said.append(Moments(*pooled(*seen), None))
        return tf.stack([said[0].mean, said[0].variance])

    part = tf.concat([seen.mean, seen.variance, count[tf.newaxis]], 0)
    whole = all_towers.asked(pool, (part[tf.newaxis],), pure=True)
    return *tf.unstack(whole), said


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
                pin=tuple(tf.nest.flatten(graph.pins.get(id(layers[i]), ()))),
                dtype=call.mean.dtype.name,
                counted=call.count is not None,
                by_one=layers[i].synchronized,
            )
            groups.setdefault(group, []).append(((i, k), call))
    vectors = {}
    for group, members in groups.items():
        places, said = zip(*members)
        columns = [[c.mean for c in said], [c.variance for c in said]]
        # Where the layer saw them.
        pin = group.pin[tower % len(group.pin)] if group.pin else None
        with tf.device(pin) if pin else contextlib.nullcontext():
            if group.counted:
                counts = [tf.fill(tf.shape(c.mean), c.count) for c in said]
                columns.append(counts)
            whole = dataclasses.replace(group, calls=places)
            vectors[whole] = tf.stack([tf.concat(c, 0) for c in columns])
    return vectors


def besides_moments(
    graph: Any,
    state: dict[int, tf.Tensor],
    moments: dict[int, list[Moments]],
) -> dict[int, tf.Tensor]:
    """One tower's new values by variable, but of those that moments tell of."""
    layers = graph.batch_norms
    told = {
        graph.index_of(variable)
        for i in moments
        for variable in statistics(layers[i])
    }
    return {i: x for i, x in state.items() if i not in told}


def of_all_shards(
    parts: Sequence[tf.Tensor], rows: Rows
) -> tuple[tf.Tensor, tf.Tensor]:
    """Mean and variance of all shards together, from those of each."""
    if len(parts) == 1:
        return parts[0][0], parts[0][1]
    each = tf.stack(rows.masked(parts))
    counts = tf.cast(rows.counts, each.dtype)[:, tf.newaxis]
    if each.shape[1] == 3:
        counts = each[:, 2]
    return pooled(each[:, 0], each[:, 1], counts)


def moving_average(
    old: tf.Tensor, seen: tf.Tensor, momentum: float
) -> tf.Tensor:
    """The moving average that Keras's `BatchNormalization` keeps."""
    seen = tf.cast(seen, old.dtype)
    return old * momentum + seen * (1.0 - momentum)
