"""gather: the towers' outputs into one, on the output device."""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, cast

import tensorflow as tf

from towers.engine.boundary import Task, pinned_task
from towers.engine.host import host_of
from towers.placement.placement import Placement, check_placement
from towers.verbs.relays import units_of
from towers.verbs.rows import Rows
from towers.verbs.split import in_graph

MERGES = ("concat", "mean", "sum", "stack", "none")
_IN_ANY_ORDER = ("mean", "sum")


def gather_outputs(
    tower_outputs: Sequence[Any],
    placement: Placement,
    merge: Any = "concat",
    rows: Any = None,
) -> Any:
    """Merges one nest per tower, on the output device.

    The gradient is cut on the output device: each tower gets its own part. In
    eager code this builds and runs a graph.

    >>> placement = towers.Placement(["/CPU:0", "/CPU:1"])
    >>> mean = towers.gather_outputs([tf.constant(1.0), tf.constant(4.0)],
    ...                              placement, merge="mean", rows=[2, 1])
    >>> float(mean)
    2.0

    Args:
      tower_outputs: one nest of dense tensors per tower, of one structure.
      placement: says how many towers, and the output device.
      merge: a rule for all outputs, or a nest of rules for a nest of outputs.
        "concat" joins [rows_i, ...] to [sum(rows), ...]; "mean" is weighted by
        rows, and "sum" adds, tensors of one shape; "stack" gives
        [n_towers, ...]; "none" gives the list of towers' tensors.
      rows: [n_towers] integers, the rows of each tower's shard. "mean" needs
        them. A tower of 0 rows counts for nothing, whatever its outputs hold.

    Returns:
      A nest like one tower's.

    Raises:
      TypeError: `tower_outputs` is no list, or holds what is not dense, or
        `placement` is no `Placement`.
      ValueError: the number of outputs, a rule, a rank or a shape does not
        fit.
    """
    check_placement(placement)
    n = len(placement.devices)
    if isinstance(tower_outputs, (str, dict)) or not isinstance(
        tower_outputs, Sequence
    ):
        raise TypeError(
            "`tower_outputs` must be a list of one nest per tower; got a "
            f"{type(tower_outputs).__name__}."
        )
    if len(tower_outputs) != n:
        raise ValueError(
            f"`tower_outputs` must hold one nest for each of the {n} towers of "
            f"`placement`; got {len(tower_outputs)}."
        )
    check_structures(tower_outputs)
    if rows is not None:
        rows = tf.convert_to_tensor(rows)
        with tf.device(host_of(str(placement.output_device))):
            rows = tf.cast(rows, tf.int32)
        if rows.shape.rank != 1 or rows.shape[0] not in (None, n):
            raise ValueError(
                f"`rows` must be a list of {n} integers, one per tower; got "
                f"shape {rows.shape}."
            )
    towers = [tf.nest.map_structure(_tensor, x) for x in tower_outputs]

    def gather(towers: Sequence[Any], counts: Any) -> Any:
        each = None if counts is None else Rows(counts, [True] * n)
        return gather_known(towers, placement, merge, each)

    return in_graph(gather, towers, rows)


def gather_known(
    towers: Sequence[Any],
    placement: Placement,
    merge: Any,
    rows: Rows | None,
    label: str = "output",
) -> Any:
    """As `gather_outputs`, in a graph, for checked outputs.

    Where it is not known beforehand whether they can be joined, the scope of the
    op that finds out is of `label`, and says which.
    """
    rules = spread(merge, towers[0])
    columns = list(zip(*[tf.nest.flatten(tower) for tower in towers]))
    for i, (rule, column) in enumerate(zip(rules, columns)):
        _check(rule, column, rows, i)

    def merging(places: Sequence[int]) -> Callable[..., list[Any]]:
        def merge(columns: Sequence[Any], rows: Rows | None) -> list[Any]:
            merged = []
            for k, column in zip(places, columns):
                scope = f"{label}_{k}" if _is_open(column) else None
                with tf.name_scope(scope) if scope else no_scope:
                    merged.append(_merged(rules[k], column, rows))
            return merged

        return merge

    no_scope = contextlib.nullcontext()
    device = str(placement.output_device)  # worked out when it was made
    merged: dict[int, Any] = {}
    for places in _pools(rules, columns, device):
        some = [columns[k] for k in places]
        means = any(rules[k] == "mean" for k in places)
        needed = rows and (rows if means or any(rows.may_be_empty) else None)
        results = pooled(merging(places), some, needed, device)
        merged.update(zip(places, results))
    others = [k for k in range(len(columns)) if k not in merged]
    some = [columns[k] for k in others]
    merged.update(zip(others, gathered(merging(others), some, rows, device)))
    return _pack(towers[0], [merged[k] for k in range(len(columns))])


def _pools(
    rules: Sequence[str], columns: Sequence[Any], device: str
) -> list[list[int]]:
    """The places of what may be merged on other machines first, by where it is."""
    pools: dict[tuple[str, ...], list[int]] = {}
    for k, (rule, column) in enumerate(zip(rules, columns)):
        if rule not in _IN_ANY_ORDER or column[0] is None:
            continue
        where = tuple(x.device for x in column)
        if len(units_of(where, device)) < len(where):
            pools.setdefault(where, []).append(k)
    return list(pools.values())


def pooled(
    merge: Callable[[Any, Any], list[Any]],
    columns: Sequence[Sequence[tf.Tensor]],
    rows: Rows | None,
    device: str,
) -> list[Any]:
    """As `gathered`, of what may be merged in any order.

    What several towers of another machine say becomes one there, and crosses
    once; so does its gradient.

    Args:
      merge: of columns and rows, gives one tensor for each column; of such
        tensors, and the rows of the towers of each, it makes that of all.
      columns: of tensors, one per tower.
      rows: how many each tower has.
      device: where all are wanted.
    """
    units = units_of([x.device for x in columns[0]], device)
    if len(units) == len(columns[0]):
        return gathered(merge, columns, rows, device)

    def part(unit: Sequence[int]) -> list[Any]:
        first, *others = unit
        if not others:
            return [column[first] for column in columns]
        return gathered(
            lambda some, rows: merge(some, rows and rows.of(unit)),
            [[column[i] for i in unit] for column in columns],
            rows,
            columns[0][first].device,
        )

    parts = zip(*map(part, units))
    return gathered(
        lambda some, rows: merge(some, rows and rows.together(units)),
        list(map(list, parts)),
        rows,
        device,
    )


def gathered(
    merge: Callable[[Any, Any], Any],
    columns: Any,
    rows: Rows | None,
    device: str,
) -> Any:
    """`merge(columns, rows)`, forward and backward on `device`."""

    def merge_there(argument: dict[str, Any]) -> Any:
        there = rows and dataclasses.replace(rows, counts=argument["rows"])
        return merge(argument["columns"], there)

    argument = {"columns": columns, "rows": rows and rows.counts}
    with tf.name_scope("gather"):
        return pinned_task(Task(merge_there, device, argument))


def check_structures(tower_outputs: Sequence[Any]) -> None:
    """Raises a `ValueError` unless towers return nests of one structure."""
    for i, other in enumerate(tower_outputs):
        try:
            tf.nest.assert_same_structure(tower_outputs[0], other)
            nones = [
                [x is None for x in tf.nest.flatten(outputs)]
                for outputs in (tower_outputs[0], other)
            ]
            if nones[0] != nones[1]:
                raise ValueError("None is not in the same places.")
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"All towers must return outputs of one structure; tower {i} "
                f"differs from tower 0: {error}"
            ) from error


def spread(merge: Any, structure: Any) -> list[str]:
    """One rule per flat output, from a rule or a nest of rules.

    Raises:
      ValueError: a rule is unknown, or the nests do not fit.
    """
    if isinstance(merge, str):
        check_rule(merge)
        return [merge] * len(tf.nest.flatten(structure))
    if isinstance(merge, dict) and isinstance(structure, dict):
        fits = set(merge) == set(structure)
        pairs = [(merge[k], structure[k]) for k in sorted(structure) if fits]
    else:
        both = isinstance(merge, (list, tuple)) and isinstance(
            structure, (list, tuple)
        )
        fits = both and len(merge) == len(structure)
        pairs = list(zip(merge, structure)) if fits else []
    if not fits:
        outputs = tf.nest.map_structure(lambda _: "...", structure)
        raise ValueError(
            f"`merge` must be one rule or a nest of rules like the outputs "
            f"{outputs!r}; got {merge!r}."
        )
    return [rule for m, s in pairs for rule in spread(m, s)]


def check_rule(rule: Any) -> None:
    """Raises a `ValueError` unless `rule` is one of `MERGES`."""
    if rule not in MERGES:
        raise ValueError(
            f"`merge` has the unknown rule {rule!r}. Expected one of "
            f"{', '.join(MERGES)}, or a nest of them like the outputs."
        )


def _check(rule: str, column: Sequence[Any], rows: Any, i: int) -> None:
    if column[0] is None:
        return
    if rule == "concat" and any(x.shape.rank == 0 for x in column):
        raise ValueError(
            f"`merge` is 'concat' for output {i}, but that is a scalar in each "
            "tower and has no rows to join. Use 'mean', 'sum', 'stack' or "
            "'none'."
        )
    _check_shapes(rule, [x.shape for x in column], i)
    if rule == "mean" and rows is None:
        raise ValueError(
            "`merge` is 'mean', which is weighted by rows, but `rows` is not "
            "given. Pass rows=[rows of tower 0, ...], or use 'sum'."
        )
    dtype = column[0].dtype
    if rule == "sum" and not (
        dtype.is_floating or dtype.is_integer or dtype.is_complex
    ):
        raise ValueError(
            f"`merge` is 'sum' for output {i}, but that is of dtype "
            f"{dtype.name}. Use 'stack' or 'none', or cast it to a number."
        )
    if rule == "mean" and not dtype.is_floating:
        raise ValueError(
            f"`merge` is 'mean' for output {i}, but that is of dtype "
            f"{dtype.name}. Use 'sum', 'stack' or 'none', or cast it to a float."
        )


def _check_shapes(rule: str, shapes: Sequence[Any], i: int) -> None:
    """Raises where towers' tensors are known not to fit together."""
    if rule == "none":
        return
    joined = rule == "concat"
    parts = [shape[1:] if joined else shape for shape in shapes]
    for tower, shape in enumerate(parts):
        if not shape.is_compatible_with(parts[0]):
            same = "axes after the first" if joined else "shapes"
            raise ValueError(
                f"`merge` is {rule!r} for output {i}, but tower 0 has shape "
                f"{shapes[0]} there, and tower {tower} {shapes[tower]}. "
                f"Expected the same {same} in all towers: let no axis but the "
                "first have a size that depends on the rows of a shard, or "
                "use 'none'."
            )


def _is_open(column: Sequence[Any]) -> bool:
    """Whether an axis after the first has a size that is not known."""
    return any(
        x is not None and not x.shape[1:].is_fully_defined() for x in column
    )


def _merged(rule: str, column: Sequence[Any], rows: Rows | None) -> Any:
    if column[0] is None:
        return None
    if rows is not None:
        by_rows = rule in ("concat", "none")
        column = (rows.without_spare if by_rows else rows.masked)(column)
    if rule == "concat":
        return tf.concat(column, 0)
    if rule == "none":
        return list(column)
    if rule == "stack":
        return tf.stack(column)
    if rule == "sum":
        return tf.add_n(column)
    if len(column) == 1:
        return tf.identity(column[0])
    # Of a mean they are known, see `_check`.
    shares = cast(Rows, rows).shares(column[0].dtype)
    return tf.add_n([shares[i] * x for i, x in enumerate(column)])


def _tensor(value: Any) -> Any:
    return None if value is None else tf.convert_to_tensor(dense(value))


def dense(value: Any) -> Any:
    """What a tower returns, if that is no ragged or sparse tensor.

    Raises:
      TypeError: it is one.
    """
    if isinstance(value, (tf.RaggedTensor, tf.SparseTensor)):
        raise TypeError(
            "Outputs of towers must be dense tensors; got a "
            f"{type(value).__name__}. Make it dense in each tower."
        )
    return value


def _pack(structure: Any, merged: Sequence[Any]) -> Any:
    # A leaf may itself be a list ("none"), which `pack_sequence_as` allows.
    return tf.nest.pack_sequence_as(structure, list(merged))
