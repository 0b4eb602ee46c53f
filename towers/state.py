"""Merge what towers say of batch-norm statistics, seeds and other state."""

import contextlib
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from towers import hooks, layer_graph
from towers.gather import row_shares, true_concat
from towers.replicate import drop
from towers.split import Shards

# Moments that travel together: the device of their variables, that of their
# layer if it is pinned, their dtype, whether they come with counts, and whether
# one tower speaks for all.
Group = tuple[str, str, str, bool, bool]


def merge_state(
    graph: layer_graph.LayerGraph,
    values: Sequence[tf.Tensor],
    devices: Sequence[str],
    states: Sequence[dict[int, tf.Tensor]],
    moments: Sequence[dict[Group, tf.Tensor]],
    layout: dict[Group, list[tuple[int, int]]],
    rows: tf.Tensor,
    may_be_empty: Sequence[bool],
) -> dict[int, tf.Tensor]:
    """The new value of each variable that a step changes, on its device.

    Batch-norm statistics are those of the whole batch; a seed advances once;
    what a stateful RNN keeps for each row is joined;
    metrics add up what each tower added; other floats are means by rows, and
    integers what the last tower with rows says.

    Args:
      graph: names the variables.
      values: each variable's value before the step.
      devices: each variable's device.
      states: per tower, new values by variable.
      moments: per tower, what its batch norms saw, `packed`; from one tower
        only, if that speaks for all.
      layout: what is in there.
      rows: int32 [n_towers].
      may_be_empty: per tower, whether it can have no rows.

    Returns:
      Merged values by variable.
    """
    merged: dict[int, tf.Tensor] = {}
    layers = graph.batch_norms()
    known: dict[Any, list[tf.Tensor]] = {}

    def shares(i: int, dtype: tf.DType) -> list[tf.Tensor]:
        """Each tower's part of the rows, on the device of a variable."""
        if (devices[i], dtype) not in known:
            known[devices[i], dtype] = tf.unstack(row_shares(rows, dtype))
        return known[devices[i], dtype]

    seen: dict[tuple[int, int], tuple[tf.Tensor, tf.Tensor]] = {}
    for group, calls in layout.items():
        sizes = [graph.variables[i].shape[0] for i, _ in calls]
        with tf.device(group[0]), tf.name_scope("merge_moments"):
            pooled = _pooled(
                [tower[group] for tower in moments if group in tower],
                rows,
                may_be_empty,
            )
            seen.update(zip(calls, zip(*[tf.split(x, sizes) for x in pooled])))
    for i, k in sorted(seen):  # of one layer, in the order of its calls
        layer = layers[i]
        j = graph.index_of(layer.moving_variance)
        with tf.device(devices[i]), tf.name_scope("merge_moments"):
            for m, x in zip((i, j), seen[i, k]):
                merged[m] = _moved(merged.get(m, values[m]), x, layer.momentum)
    last = max(t for t, empty in enumerate(may_be_empty) if not empty or t == 0)
    metrics = {id(v) for v in graph.metric_variables}
    told = {i for state in states for i in state} - set(merged)
    for i in told & set(graph.row_states):
        with tf.device(devices[i]), tf.name_scope("merge_state"):
            said = [state[i] for state in states]
            merged[i] = true_concat(said, rows, may_be_empty)
    for i in sorted(told - set(merged)):
        said = [state.get(i, values[i]) for state in states]
        with tf.device(devices[i]), tf.name_scope("merge_state"):
            adds_up = id(graph.variables[i]) in metrics
            kept = (
                [
                    drop(x - values[i], rows[t] > 0) if empty else x - values[i]
                    for t, (x, empty) in enumerate(zip(said, may_be_empty))
                ]
                if adds_up or values[i].dtype.is_floating
                else []
            )
            if graph.is_seed(i):
                merged[i] = said[0]
            elif adds_up:
                merged[i] = values[i] + tf.add_n(kept)
            elif kept and len(said) > 1:
                by_rows = shares(i, values[i].dtype)
                changes = [share * x for share, x in zip(by_rows, kept)]
                merged[i] = values[i] + tf.add_n(changes)
            else:
                merged[i] = said[last]
    return merged


def packed(
    graph: layer_graph.LayerGraph,
    devices: Sequence[str],
    moments: dict[int, list[hooks.Moments]],
) -> tuple[dict[Group, tf.Tensor], dict[Group, list[tuple[int, int]]]]:
    """One tower's moments, in one tensor for each device that they go to.

    Args:
      graph: names the layers.
      devices: each variable's device.
      moments: what each call of a batch norm saw, by its `moving_mean`.

    Returns:
      By group: a tensor [2, channels of all calls] of means and variances, or
      [3, channels] with the counts below; and the calls that are in there, as
      the index of `moving_mean` and the number of the call.
    """
    layers = graph.batch_norms()
    groups: dict[Group, list[tuple[tuple[int, int], hooks.Moments]]] = {}
    for i, calls in moments.items():
        for k, call in enumerate(calls):
            group = (
                devices[i],
                graph.pins.get(id(layers[i]), ""),
                call.mean.dtype.name,
                call.count is not None,
                layers[i].synchronized,
            )
            groups.setdefault(group, []).append(((i, k), call))
    vectors, layout = {}, {}
    for group, members in groups.items():
        layout[group] = [place for place, _ in members]
        said = [call for _, call in members]
        columns = [[c.mean for c in said], [c.variance for c in said]]
        pin = group[1]  # where the layer saw them
        with tf.device(pin) if pin else contextlib.nullcontext():
            if group[3]:
                counts = [tf.fill(tf.shape(c.mean), c.count) for c in said]
                columns.append(counts)
            vectors[group] = tf.stack([tf.concat(c, 0) for c in columns])
    return vectors, layout


def besides_moments(
    graph: layer_graph.LayerGraph,
    state: dict[int, tf.Tensor],
    moments: dict[int, list[hooks.Moments]],
) -> dict[int, tf.Tensor]:
    """One tower's new values by variable, but of those that moments tell of."""
    layers = graph.batch_norms()
    told = {graph.index_of(layers[i].moving_variance) for i in moments}
    return {i: x for i, x in state.items() if i not in told | set(moments)}


def _pooled(
    parts: Sequence[tf.Tensor], rows: tf.Tensor, may_be_empty: Sequence[bool]
) -> tuple[tf.Tensor, tf.Tensor]:
    """Mean and variance of all shards together, from those of each."""
    if len(parts) == 1:
        return parts[0][0], parts[0][1]
    each = tf.stack(
        [
            drop(part, rows[t] > 0) if empty else part
            for t, (part, empty) in enumerate(zip(parts, may_be_empty))
        ]
    )
    counts = tf.cast(rows, each.dtype)[:, tf.newaxis]
    if each.shape[1] == 3:
        counts = each[:, 2]
    return hooks.pooled(each[:, 0], each[:, 1], counts)


def _moved(old: tf.Tensor, seen: tf.Tensor, momentum: float) -> tf.Tensor:
    """The moving average that Keras's `BatchNormalization` keeps."""
    seen = tf.cast(seen, old.dtype)
    return old * momentum + seen * (1.0 - momentum)


def of_all_rows(variable: Any, state: tf.Tensor, shards: Shards) -> tf.Tensor:
    """The state of a stateful RNN, if that is of as many rows as the batch."""
    count = state.shape[0]
    problem = (
        f"{variable.path!r} keeps a state for each of {count} rows, since its "
        "layer is stateful, but the batch has another number. Expected "
        f"batches of {count} rows; leave out a last one that is smaller."
    )
    rows = shards.ranges.true
    if all(isinstance(r, int) for r in rows) and sum(rows) != count:
        raise ValueError(problem)
    check = tf.debugging.assert_equal(
        tf.reduce_sum(shards.rows), count, message=problem
    )
    with tf.control_dependencies([] if check is None else [check]):
        return tf.identity(state)
