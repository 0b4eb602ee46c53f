"""Merge what towers say of batch-norm statistics, seeds and other state.

Keras has no public word for how a `BatchNormalization(renorm=True)` moves its
statistics on: this file calls `_update_renorm_statistics`. `state_test.py` fails
when that changes.
"""

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Callable, Collection, Sequence
from typing import Any

import keras
import tensorflow as tf

from towers import hooks, layer_graph, merge_rules
from towers.gather import row_shares, true_concat
from towers.replicate import drop, keep_flags
from towers.split import Shards

# Moments that travel together: the device of their variables, that of their
# layer if it is pinned, their dtype, whether they come with counts, and whether
# one tower speaks for all.
Group = tuple[str, str, str, bool, bool]


@dataclasses.dataclass(frozen=True)
class Before:
    """What all towers of a step start from.

    Attributes:
      graph: names the variables.
      values: each variable's value before the step.
      devices: each variable's device.
      rows: int32 [n_towers].
      may_be_empty: per tower, whether it can have no rows.
    """

    graph: layer_graph.LayerGraph
    values: Sequence[tf.Tensor]
    devices: Sequence[str]
    rows: tf.Tensor
    may_be_empty: Sequence[bool]

    @functools.cached_property
    def kept(self) -> Callable[[str], list[Any]]:
        """Per tower None, or whether it had rows, by device."""
        return functools.cache(
            functools.partial(keep_flags, self.rows, self.may_be_empty)
        )

    @functools.cached_property
    def shares(self) -> Callable[[str, tf.DType], list[tf.Tensor]]:
        """Each tower's part of the rows, by device and dtype."""

        def shares(device: str, dtype: tf.DType) -> list[tf.Tensor]:
            with tf.device(device):
                return tf.unstack(row_shares(self.rows, dtype))

        return functools.cache(shares)


@dataclasses.dataclass(frozen=True)
class Said:
    """What towers say of one variable.

    Attributes:
      before: the step.
      index: the variable.
      values: its new value, per tower.
    """

    before: Before
    index: int
    values: Sequence[tf.Tensor]

    @property
    def old(self) -> tf.Tensor:
        return self.before.values[self.index]

    @property
    def device(self) -> str:
        return self.before.devices[self.index]

    @property
    def last(self) -> tf.Tensor:
        """What the last tower with rows says; the old value if none has."""
        full = [
            x
            for x, empty in zip(self.values, self.before.may_be_empty)
            if not empty
        ]
        return full[-1] if full else self.old

    @property
    def by_one(self) -> bool:
        """Whether the only tower says it, and has rows."""
        return list(self.before.may_be_empty) == [False]

    def changes(self) -> list[tf.Tensor]:
        """What each tower added; nothing if it has no rows."""
        return [
            x - self.old if keep is None else drop(x - self.old, keep)
            for x, keep in zip(self.values, self.before.kept(self.device))
        ]

    def of_towers_with_rows(self) -> list[tf.Tensor]:
        """Those values, with `last` in the place of the others."""
        return [
            x if keep is None else tf.compat.v1.where(keep, x, self.last)
            for x, keep in zip(self.values, self.before.kept(self.device))
        ]


def merge_state(
    before: Before,
    states: Sequence[dict[int, tf.Tensor]],
    shared: Collection[int],
    moments: Sequence[dict[Group, tf.Tensor]],
    layout: dict[Group, list[tuple[int, int]]],
) -> dict[int, tf.Tensor]:
    """The new value of each variable that a step changes, on its device.

    Batch-norm statistics are those of the whole batch; a seed advances once;
    what a stateful RNN keeps for each row is joined; the rest goes by the rules
    of `merge_state_by`, unless it is the same in all towers.

    Args:
      before: what the towers start from.
      states: per tower, new values by variable.
      shared: variables whose new value depends on no tower's rows.
      moments: per tower, what its batch norms saw, `packed`; from one tower
        only, if that speaks for all.
      layout: what is in there.

    Returns:
      Merged values by variable.
    """
    merged = _statistics(before, moments, layout)
    graph, rule_less = before.graph, []
    for i in sorted({i for state in states for i in state} - set(merged)):
        said = Said(
            before, i, [state.get(i, before.values[i]) for state in states]
        )
        if i in shared or graph.is_seed(i) or said.by_one:
            merged[i] = said.values[0]  # tower 0 has the model's own seed
            continue
        rule = _rule(graph, i)
        if rule is None:
            rule = merge_rules.usual(said.old.dtype)
            rule_less.append(graph.variables[i])
        with tf.device(said.device), tf.name_scope("merge_state"):
            merged[i] = _BY_RULE[rule](said)
    _warn(rule_less)
    return merged


def _rule(graph: layer_graph.LayerGraph, index: int) -> str | None:
    """How a variable merges; None if nobody has said."""
    rule = merge_rules.declared(graph.variables[index])
    if index in graph.row_states:
        if rule is not None:
            raise ValueError(
                f"merge_state_by declares {rule!r} for "
                f"{graph.variables[index].path!r}, the state of a stateful RNN, "
                "of which each tower has its own rows. Leave the rule out."
            )
        return "concat"
    if rule is None and graph.is_metric(index):
        return "sum"
    return rule


def _added(said: Said) -> tf.Tensor:
    return said.old + functools.reduce(tf.add, said.changes())


def _averaged(said: Said) -> tf.Tensor:
    shares = said.before.shares(said.device, said.old.dtype)
    changes = [share * x for share, x in zip(shares, said.changes())]
    return said.old + tf.add_n(changes)


def _largest(said: Said) -> tf.Tensor:
    either = tf.logical_or if said.old.dtype.is_bool else tf.maximum
    return functools.reduce(either, said.of_towers_with_rows())


def _smallest(said: Said) -> tf.Tensor:
    either = tf.logical_and if said.old.dtype.is_bool else tf.minimum
    return functools.reduce(either, said.of_towers_with_rows())


def _joined(said: Said) -> tf.Tensor:
    return true_concat(said.values, said.before.rows, said.before.may_be_empty)


_BY_RULE: dict[str, Callable[[Said], tf.Tensor]] = {
    "sum": _added,
    "mean": _averaged,
    "max": _largest,
    "min": _smallest,
    "last": lambda said: said.last,
    "concat": _joined,
}


def _warn(variables: Sequence[Any]) -> None:
    """Tells once of state that merges by a rule that nobody has chosen."""
    names = [v.path for v in variables if merge_rules.first_warning(v)]
    if names:
        warnings.warn(
            f"The new value of {', '.join(map(repr, names))} depends on the "
            "rows that a tower sees, and it is not known what the towers' "
            "values become together. Floats are now averaged by rows; of "
            "others, the last tower's is kept. Say what is meant by "
            "towers.merge_state_by(variable, rule), where the layer makes the "
            f"variable, with one of {', '.join(map(repr, merge_rules.RULES))}; "
            "or compute it of the whole batch, by towers.all_towers.",
            UserWarning,
            stacklevel=2,
        )


def _statistics(
    before: Before,
    moments: Sequence[dict[Group, tf.Tensor]],
    layout: dict[Group, list[tuple[int, int]]],
) -> dict[int, tf.Tensor]:
    """Moving statistics of batch norms, moved by moments of all rows."""
    graph = before.graph
    merged: dict[int, tf.Tensor] = {}
    seen: dict[tuple[int, int], tuple[tf.Tensor, tf.Tensor]] = {}
    for group, calls in layout.items():
        sizes = [graph.variables[i].shape[0] for i, _ in calls]
        with tf.device(group[0]), tf.name_scope("merge_moments"):
            pooled = _pooled(
                [tower[group] for tower in moments if group in tower],
                before.rows,
                before.may_be_empty,
            )
            seen.update(zip(calls, zip(*[tf.split(x, sizes) for x in pooled])))
    layers = graph.batch_norms()
    for i, k in sorted(seen):  # of one layer, in the order of its calls
        places = [graph.index_of(v) for v in hooks.statistics(layers[i])]
        now = [merged.get(m, before.values[m]) for m in places]
        with tf.device(before.devices[i]), tf.name_scope("merge_moments"):
            if len(places) > 2:
                moved = _renormalized(layers[i], now, *seen[i, k])
            else:
                moved = [
                    _moved(old, x, layers[i].momentum)
                    for old, x in zip(now, seen[i, k])
                ]
        merged.update(zip(places, moved))
    return merged


def _renormalized(
    layer: Any, now: Sequence[tf.Tensor], mean: tf.Tensor, variance: tf.Tensor
) -> list[tf.Tensor]:
    """What batch renormalisation makes of its statistics."""
    variables = hooks.statistics(layer)
    with keras.StatelessScope(state_mapping=zip(variables, now)) as scope:
        layer._update_renorm_statistics(mean, variance)
    return [scope.get_current_value(v) for v in variables]


def packed(
    graph: Any,
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
    graph: Any,
    state: dict[int, tf.Tensor],
    moments: dict[int, list[hooks.Moments]],
) -> dict[int, tf.Tensor]:
    """One tower's new values by variable, but of those that moments tell of."""
    layers = graph.batch_norms()
    told = {
        graph.index_of(variable)
        for i in moments
        for variable in hooks.statistics(layers[i])
    }
    return {i: x for i, x in state.items() if i not in told}


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
