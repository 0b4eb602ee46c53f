"""row_sums: whether a number adds up from the rows that it is made of.

Asked of the graph that made it, from the number back to the rows. What only
linear ops lie behind, once rows were summed, is a sum; divided by the number of
rows it is a mean. So is what is computed of several such, or of the same in all
towers. Ops of which nothing is said here are taken for anything.
"""

from collections.abc import Sequence

import tensorflow as tf

from towers.engine import (
    dependence,
    row_ops,
    row_products,
    row_reductions,
    row_shapes,
    row_slices,
)
from towers.engine.row_kinds import (
    COUNT,
    SAME,
    SEGMENTS,
    OfRows,
    RowKind,
    RowKinds,
    agreed,
    either,
)
from towers.foreign import tf_functions
from towers.foreign.tf_ancestry import COPIES, ancestors, identities, parents

_RULES = {
    **row_ops.RULES,
    **row_products.RULES,
    **row_reductions.RULES,
    **row_shapes.RULES,
    **row_slices.RULES,
}
_CALLS = ("PartitionedCall", "StatefulPartitionedCall")
_BRANCHES = ("If", "StatelessIf")
_LOOPS = ("While", "StatelessWhile")
_SUMS = ("Add", "AddV2", "Sub")


class Judge:
    """Tells how tensors of a graph are made of rows.

    Args:
      rows: tensors of the graph, [rows, ...].
      values: those of which there are some for each row, as a ragged tensor's.
      same: tensors that are the same in all towers, whatever they are made of.
      others: tensors of the tower's rows of which nothing is known.
      drawn: further tensors of rows, with the axis of those, and how many entries
        there are for each.
      splits: where each row's of the values begin.
    """

    def __init__(
        self,
        rows: Sequence[tf.Tensor],
        values: Sequence[tf.Tensor] = (),
        same: Sequence[tf.Tensor] = (),
        others: Sequence[tf.Tensor] = (),
        drawn: Sequence[tuple[tf.Tensor, int, int]] = (),
        splits: Sequence[tf.Tensor] = (),
    ):
        segments = dependence.segments(splits)
        self._kinds: dict[str, RowKind] = {
            **{x.name: None for x in others},
            **{y.name: OfRows(0) for x in rows for y in identities(x)},
            **{x.name: OfRows(0, None, counted=False) for x in values},
            **{x.name: SEGMENTS for x, _ in segments},
            **{n.name: COUNT for _, n in segments},
            **{x.name: SAME for x in same},
            **{x.name: OfRows(axis, per) for x, axis, per in drawn},
        }

    def kind(self, tensor: tf.Tensor) -> RowKind:
        """How a tensor of the graph is made of rows."""
        if hasattr(tensor, "numpy"):  # made outside of any graph
            return SAME
        return _walked(tensor, self._kinds)

    def change(self, new: tf.Tensor, old: tf.Tensor) -> RowKind:
        """How what was added to `old` is made of rows."""
        return _added(new, old.name, self._kinds)


def _added(new: tf.Tensor, old: str, kinds: dict[str, RowKind]) -> RowKind:
    """The kind of `new - old`, where `new` may be a sum that has `old` in it."""
    terms: list[tf.Tensor] = []
    tensor = new
    while tensor.name != old:
        op, sides = tensor.op, _sides(tensor)
        on = [k for k, side in enumerate(sides) if _has(side, old)]
        if not on:
            return agreed([SAME, _walked(new, kinds)])
        tensor = sides[on[0]]
        if op.type in _SUMS:
            terms.append(op.inputs[1 - on[0]])
    each = [_walked(x, kinds) for x in terms if not row_ops.is_zero(x)]
    return agreed(each) if each else SAME


def _has(tensor: tf.Tensor, old: str) -> bool:
    """Whether a sum has a tensor among what it adds."""
    return any(x.name == old for x in ancestors(tensor, _sides))


def _sides(tensor: tf.Tensor) -> list[tf.Tensor]:
    """What is added up in a tensor, as it is."""
    kind, inputs = tensor.op.type, parents(tensor)
    if kind == "Sub" or kind in row_ops.PASS:
        return inputs[:1]
    return inputs if kind in (*_SUMS, *COPIES) else []


def _walked(tensor: tf.Tensor, kinds: dict[str, RowKind]) -> RowKind:
    """The kind of a tensor, and, in `kinds`, of all that it is made of."""
    todo = [tensor]
    while todo:
        x = todo[-1]
        if x.name in kinds:
            todo.pop()
            continue
        inputs = parents(x)
        missing = [y for y in inputs if y.name not in kinds]
        if missing:
            todo += missing
            continue
        todo.pop()
        kind = _kind_of(x, [kinds[y.name] for y in inputs])
        kinds[x.name] = kind or _ones_like(x, kinds)
    return kinds[tensor.name]


def _ones_like(tensor: tf.Tensor, kinds: dict[str, RowKind]) -> RowKind:
    """Of ones, as many as there are values, by whose shape they are made."""
    op = tensor.op
    if op.type != "Fill" or op.inputs[0].op.type != "Shape":
        return None
    kind = kinds.get(op.inputs[0].op.inputs[0].name)
    values = isinstance(kind, OfRows) and not (kind.counted or kind.order)
    return kind if values and kinds[op.inputs[1].name] == SAME else None


def _kind_of(tensor: tf.Tensor, kinds: list[RowKind]) -> RowKind:
    """The kind of an op's result, from those of what it takes."""
    op = tensor.op
    if op.type in COPIES:
        return kinds[0]
    if all(kind == SAME for kind in kinds):
        return SAME
    if op.type in _CALLS:
        return _called(op, "f", kinds)[tensor.value_index]
    if op.type in _BRANCHES:
        return _branched(op, kinds)[tensor.value_index]
    if op.type in _LOOPS:
        return _looped(op, kinds)[tensor.value_index]
    rule = _RULES.get(op.type)
    if rule is None or None in kinds:
        return None
    return rule(tensor, kinds)


def _called(op: tf.Operation, attribute: str, kinds: RowKinds) -> list[RowKind]:
    """The kinds of a function's results."""
    body = tf_functions.body(op, attribute)
    if body is None or len(body.inputs) != len(kinds):
        return [None] * len(op.outputs)
    own_kinds = {x.name: kind for x, kind in zip(body.inputs, kinds)}
    return [_walked(x, own_kinds) for x in body.outputs]


def _branched(op: tf.Operation, kinds: RowKinds) -> list[RowKind]:
    if kinds[0] != SAME:
        return [None] * len(op.outputs)
    results = [
        _called(op, branch, kinds[1:])
        for branch in ("then_branch", "else_branch")
    ]
    return [either(pair) for pair in zip(*results)]


def _looped(op: tf.Operation, kinds: RowKinds) -> list[RowKind]:
    """What comes out of a loop that runs as often for any rows."""
    now = list(kinds)
    for _ in range(len(now) + 1):
        after = [either(pair) for pair in zip(now, _called(op, "body", now))]
        if after == now:
            break
        now = after
    else:
        now = [None] * len(now)
    if _called(op, "cond", now) != [SAME]:
        return [None] * len(now)
    return now
