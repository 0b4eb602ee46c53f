"""Merge what towers say of batch-norm statistics, seeds and other state."""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from towers import hooks, layer_graph
from towers.gather import row_shares, true_concat
from towers.replicate import drop
from towers.split import Shards


def merge_state(
    graph: layer_graph.LayerGraph,
    values: Sequence[tf.Tensor],
    devices: Sequence[str],
    states: Sequence[dict[int, tf.Tensor]],
    moments: Sequence[dict[int, list[hooks.Moments]]],
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
      moments: per tower, what each batch norm saw, by `moving_mean`; from
        one tower only, if that speaks for all.
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

    for i in moments[0]:
        layer = layers[i]
        j = graph.index_of(layer.moving_variance)
        calls = zip(*[tower[i] for tower in moments if tower.get(i)])
        mean, variance = values[i], values[j]
        with tf.device(devices[i]), tf.name_scope("merge_moments"):
            for call in calls:
                seen = _pooled(call, rows, may_be_empty)
                mean = _moved(mean, seen[0], layer.momentum)
                variance = _moved(variance, seen[1], layer.momentum)
        merged[i], merged[j] = mean, variance
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


def _pooled(
    call: Sequence[hooks.Moments],
    rows: tf.Tensor,
    may_be_empty: Sequence[bool],
) -> tuple[tf.Tensor, tf.Tensor]:
    """Mean and variance of all shards together, from those of each."""
    if len(call) == 1:
        return call[0].mean, call[0].variance
    dtype = call[0].mean.dtype

    def stacked(values: Sequence[Any]) -> tf.Tensor:
        return tf.stack(
            [
                drop(tf.cast(x, dtype), rows[t] > 0) if empty else x
                for t, (x, empty) in enumerate(zip(values, may_be_empty))
            ]
        )

    counts = tf.cast(rows, dtype)
    if call[0].count is not None:
        counts = stacked([m.count for m in call])
    return hooks.pooled(
        stacked([m.mean for m in call]),
        stacked([m.variance for m in call]),
        counts[:, tf.newaxis],
    )


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
