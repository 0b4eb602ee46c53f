"""state: what towers say of batch-norm statistics, seeds and more, merged."""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from towers.engine.dependence import constant_difference
from towers.engine.host import host_of, on_host
from towers.foreign import keras_layers
from towers.keras_model import layer_graph, merge_rules
from towers.keras_model.kinds import Kind
from towers.keras_model.moments import (
    Group,
    moving_average,
    of_all_shards,
    statistics,
)
from towers.verbs.relays import units_of
from towers.verbs.rows import Rows, drop


@dataclasses.dataclass(frozen=True)
class Before:
    """What all towers of a step start from.

    Attributes:
      graph: names the variables.
      values: each variable's value before the step.
      devices: each variable's device.
      rows: how many each tower has.
      copies: per tower, what it has of those values.
    """

    graph: layer_graph.LayerGraph
    values: Sequence[tf.Tensor]
    devices: Sequence[str]
    rows: Rows
    copies: Sequence[Sequence[tf.Tensor]]

    @functools.cached_property
    def kept(self) -> Callable[[str], list[Any]]:
        """`rows.kept`, computed once for each device."""
        return functools.cache(self.rows.kept)

    @functools.cached_property
    def shares(self) -> Callable[[str, tf.DType], list[tf.Tensor]]:
        """Each tower's part of the rows, by device and dtype."""

        def shares(device: str, dtype: tf.DType) -> list[tf.Tensor]:
            with tf.device(device):
                return tf.unstack(self.rows.shares(dtype))

        return functools.cache(shares)


@dataclasses.dataclass(frozen=True)
class Column:
    """One variable in all towers.

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
            for x, empty in zip(self.values, self.before.rows.may_be_empty)
            if not empty
        ]
        return full[-1] if full else self.old

    @property
    def by_one(self) -> bool:
        """Whether there is one tower, which surely has rows."""
        return list(self.before.rows.may_be_empty) == [False]

    @functools.cached_property
    def units(self) -> list[list[int]]:
        """Towers whose values become one on their machine, and cross so."""
        return units_of([x.device for x in self.values], self.device)

    def changes(self, are_weighted: bool = False) -> list[tf.Tensor]:
        """What each tower added; nothing if it has no rows.

        Of several towers of another machine, the sum, which is made there.

        Args:
          are_weighted: whether changes count by the towers' rows.
        """
        terms = []
        for unit in self.units:
            device, old = self.device, self.old
            if len(unit) > 1:
                device = _there(self.values[unit[0]])
                old = self.before.copies[unit[0]][self.index]
            with tf.device(device):
                each = [self._change(i, old, device) for i in unit]
                if are_weighted:
                    shares = self.before.shares(device, old.dtype)
                    each = [shares[i] * x for i, x in zip(unit, each)]
                terms.append(functools.reduce(tf.add, each))
        return terms

    def _change(self, tower: int, old: tf.Tensor, device: str) -> tf.Tensor:
        change = self.values[tower] - old
        keep = self.before.kept(device)[tower]
        return change if keep is None else drop(change, keep)

    def by_machine(self, either: Callable[..., tf.Tensor]) -> "Column":
        """As if several towers of another machine were one, of all their rows.

        Args:
          either: makes one value of two.
        """
        rows = self.before.rows
        if len(self.units) == len(self.values):
            return self

        def value(unit: Sequence[int]) -> tf.Tensor:
            first, *others = [self.values[i] for i in unit]
            if not others:
                return first
            with tf.device(_there(first)):
                return rows.of(unit).chosen(either, [first, *others])

        values = list(map(value, self.units))
        with on_host(self.device):
            together = rows.together(self.units)
        before = dataclasses.replace(self.before, rows=together)
        return dataclasses.replace(self, before=before, values=values)

    def of_towers_with_rows(self) -> list[tf.Tensor]:
        """Those values, with `last` in the place of the others."""
        return [
            x if keep is None else tf.compat.v1.where(keep, x, self.last)
            for x, keep in zip(self.values, self.before.kept(self.device))
        ]


def _there(value: tf.Tensor) -> str:
    """Where values like this are merged that are on its machine.

    A GPU has no kernels for some of what is not floating.
    """
    device = value.device
    return device if value.dtype.is_floating else host_of(device)


def merge_state(
    before: Before,
    states: Sequence[dict[int, tf.Tensor]],
    rules: Mapping[int, str],
    moments: Sequence[dict[Group, tf.Tensor]],
) -> dict[int, tf.Tensor]:
    """The new value of each variable that a step changes, on its device.

    Batch-norm statistics are those of the whole batch; a seed advances once;
    what a stateful RNN keeps for each row is joined; the rest goes by the rules
    of `merge_state_by`, unless it is the same in all towers. What is added to a
    metric goes by the graph that made it.

    Args:
      before: what the towers start from.
      states: per tower, new values by variable.
      rules: by variable what the towers' graphs say: "same" if a new value
        depends on no tower's rows; of a metric also "sum" or "mean".
      moments: per tower, what its batch norms saw, `packed`; from one tower
        only, if that speaks for all.

    Returns:
      Merged values by variable.
    """
    merged = _statistics(before, moments)
    graph, rule_less = before.graph, []
    for i in sorted({i for state in states for i in state} - set(merged)):
        column = Column(
            before, i, [state.get(i, before.values[i]) for state in states]
        )
        is_alike = rules.get(i) == "same" or column.by_one
        if is_alike and graph.kinds[i] is not Kind.SEED:
            merged[i] = column.values[0]
            continue
        rule = _FROM_TOWERS[graph.kinds[i]](graph.variables[i], rules.get(i))
        if rule is None:
            rule = merge_rules.usual(column.old.dtype)
            rule_less.append(graph.variables[i])
        with tf.device(column.device), tf.name_scope("merge_state"):
            merged[i] = _BY_RULE[rule](column)
    _warn(rule_less)
    return merged


def _declared_or_judged(variable: Any, verdict: str | None) -> str | None:
    """How a variable merges; None if nobody has said, nor the graph."""
    rule = merge_rules.declared(variable)
    return verdict if rule is None and verdict in _BY_RULE else rule


def _joined(variable: Any, _: str | None) -> str:
    rule = merge_rules.declared(variable)
    if rule is not None:
        raise ValueError(
            f"merge_state_by declares {rule!r} for {variable.path!r}, the state "
            "of a stateful RNN, of which each tower has its own rows. Leave the "
            "rule out."
        )
    return "concat"


def _moved_on(*_: Any) -> str:
    return "first"  # tower 0 has the model's own seed


# How a new value of each kind of variable comes back from the towers: the name of a
# rule, by the variable and what the towers' graphs say.
_FROM_TOWERS: dict[Kind, Callable[[Any, str | None], str | None]] = {
    Kind.TRAINED: _declared_or_judged,  # its gradient is another matter
    Kind.OVERWRITTEN: _declared_or_judged,
    Kind.SEED: _moved_on,
    Kind.ROWS: _joined,
    Kind.STATISTIC: _declared_or_judged,  # unless moments have moved it
    Kind.METRIC: _declared_or_judged,
    Kind.OWN: _declared_or_judged,
}


def _added(column: Column) -> tf.Tensor:
    return column.old + functools.reduce(tf.add, column.changes())


def _averaged(column: Column) -> tf.Tensor:
    return column.old + tf.add_n(column.changes(are_weighted=True))


def _largest(column: Column) -> tf.Tensor:
    either = tf.logical_or if column.old.dtype.is_bool else tf.maximum
    return functools.reduce(
        either, column.by_machine(either).of_towers_with_rows()
    )


def _smallest(column: Column) -> tf.Tensor:
    either = tf.logical_and if column.old.dtype.is_bool else tf.minimum
    return functools.reduce(
        either, column.by_machine(either).of_towers_with_rows()
    )


def _first(column: Column) -> tf.Tensor:
    """What the first tower says; at home, if it just counts.

    A tower awaits its batch. The step that finds none, as Keras takes one at the
    end of what it does not know the length of, moves the plain model's seeds on.
    """
    more = constant_difference(
        column.values[0], column.before.copies[0][column.index]
    )
    if more is None:
        return column.values[0]
    return column.old + tf.constant(more, column.old.dtype)


_BY_RULE: dict[str, Callable[[Column], tf.Tensor]] = {
    "sum": _added,
    "mean": _averaged,
    "max": _largest,
    "min": _smallest,
    "first": _first,
    "last": lambda column: column.last,
    "concat": lambda column: column.before.rows.concat(column.values),
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
            f"variable, with one of {', '.join(map(repr, merge_rules.STATE_RULES))}; "
            "or compute it of the whole batch, by towers.all_towers in a layer "
            "with `needs_all_towers = True`.",
            UserWarning,
            stacklevel=2,
        )


def _statistics(
    before: Before, moments: Sequence[dict[Group, tf.Tensor]]
) -> dict[int, tf.Tensor]:
    """Moving statistics of batch norms, moved by moments of all rows."""
    graph = before.graph
    merged: dict[int, tf.Tensor] = {}
    by_call: dict[tuple[int, int], tuple[tf.Tensor, tf.Tensor]] = {}
    for group in sorted({group for tower in moments for group in tower}):
        sizes = [graph.variables[i].shape[0] for i, _ in group.calls]
        with tf.device(group.device), tf.name_scope("merge_moments"):
            pooled = of_all_shards(
                [tower[group] for tower in moments if group in tower],
                before.rows,
                group.device,
            )
            each = zip(*[tf.split(x, sizes) for x in pooled])
            by_call.update(zip(group.calls, each))
    layers = graph.batch_norms
    for i, k in sorted(by_call):  # of one layer, in the order of its calls
        places = [graph.index_of(v) for v in statistics(layers[i])]
        now = [merged.get(m, before.values[m]) for m in places]
        with tf.device(before.devices[i]), tf.name_scope("merge_moments"):
            if len(places) > 2:
                moved = _renormalized(layers[i], now, *by_call[i, k])
            else:
                moved = [
                    moving_average(old, x, layers[i].momentum)
                    for old, x in zip(now, by_call[i, k])
                ]
        merged.update(zip(places, moved))
    return merged


def _renormalized(
    layer: Any, now: Sequence[tf.Tensor], mean: tf.Tensor, variance: tf.Tensor
) -> list[tf.Tensor]:
    """What batch renormalisation makes of its statistics."""
    variables = statistics(layer)
    with keras.StatelessScope(state_mapping=zip(variables, now)) as scope:
        keras_layers.renormalize(layer, mean, variance)
    return [scope.get_current_value(v) for v in variables]
