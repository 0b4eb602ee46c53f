"""closure: what a function of all towers takes besides what they hand it.

It runs once, inside one tower, whose parameters it may read. What another
tower has otherwise, all that depends on the tower's rows, it may not: the
towers would share what belongs to one of them.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from towers.foreign.containers import leaves, named_leaves
from towers.foreign.tf_ancestry import COPIES, ancestors, parents
from towers.foreign.tf_nodes import OWN


@dataclasses.dataclass(frozen=True)
class Ownership:
    """Which tensors are one tower's own.

    Attributes:
      own: names of tensors of which each tower has another.
      same: names of tensors, made since, that are the same in all towers.
      before: how many ops the graph had before the towers.
    """

    own: set[str]
    same: set[str]
    before: int

    def origin(self, tensor: tf.Tensor, ops: set[str]) -> tf.Tensor | None:
        """What of the tower's own a tensor is made of; None if of nothing.

        Args:
          tensor: of this graph.
          ops: names of those that towers are made of.
        """

        def is_of_tower(x: tf.Tensor) -> bool:
            is_same = x.name in self.same or x.dtype == tf.resource
            return not is_same and x.op.name in ops

        def behind(x: tf.Tensor) -> list[tf.Tensor]:
            return parents(x) if is_of_tower(x) else []

        return next(
            (
                x
                for x in ancestors(tensor, behind)
                if x.name in self.own or (is_of_tower(x) and _draws(x.op))
            ),
            None,
        )


def differing(
    tensors: Sequence[Sequence[tf.Tensor]], taken: Sequence[Sequence[tf.Tensor]]
) -> list[set[str]]:
    """Per tower, names of what it has taken that is not the same in all.

    Args:
      tensors: per tower, what it is given.
      taken: per tower, the same on its device.
    """
    sources = [[_source(x) for x in each] for each in tensors]
    differ = [len(set(column)) > 1 for column in zip(*sources)]
    return [{x.name for x, d in zip(each, differ) if d} for each in taken]


def _source(tensor: tf.Tensor) -> tuple[Any, ...]:
    """Where a tensor comes from, through copies and the parts of a parcel."""
    parts: list[int] = []
    while True:
        op = tensor.op
        if op.type in COPIES:
            (tensor,) = parents(tensor)
        elif op.type == "Reshape":
            tensor = op.inputs[0]
        elif op.type == "SplitV":
            parts.append(tensor.value_index)
            tensor = op.inputs[0]
        else:
            return (tensor.name, *parts)


def _draws(op: tf.Operation) -> bool:
    """Whether an op is random, with a stream of its own."""
    if not op.op_def.is_stateful:
        return op.type.startswith("Stateless") and OWN in op.node_def.attr
    return any(attribute.name == "seed" for attribute in op.op_def.attr)


def applied(
    function: Callable[[], Any],
    values: Any,
    shared: Any,
    ownership: Ownership,
    scope: str,
    drawn: Callable[[], set[str]] = set,
) -> Any:
    """`function()` as a nest of tensors, if it takes nothing of one tower.

    Args:
      function: of what it closes over, `values` and `shared`.
      values: a nest of tensors that it may take.
      shared: a nest of what is said to be the same in all towers.
      ownership: tells what is.
      scope: where the tower called it.
      drawn: gives names of tensors that it may take after all.

    Raises:
      ValueError: it takes what depends on the rows of one tower.
    """
    graph = tf.compat.v1.get_default_graph()
    passed = [
        tf.convert_to_tensor(x)
        for x in tf.nest.flatten(shared)
        if not (x is None or isinstance(x, _NUMBERS))
    ]
    before = len(graph.get_operations())
    results = tf.nest.map_structure(tf.convert_to_tensor, function())
    ops = graph.get_operations()
    own = {op.name for op in ops[before:]}
    may = {x.name for x in tf.nest.flatten(values)} | drawn()
    taken = [x for op in ops[before:] for x in op.inputs]
    outside = {
        x.name: x
        for x in [*taken, *tf.nest.flatten(results)]
        if x.op.name not in own and x.name not in may
    }
    names = {op.name for op in ops[ownership.before : before]}
    for how, tensors in (
        ("`shared` holds", passed),
        ("the function closes over", outside.values()),
    ):
        for tensor in tensors:
            origin = ownership.origin(tensor, names)
            if origin is not None:
                raise _own(tensor, origin, scope, how)
    return results


def _own(
    tensor: tf.Tensor, origin: tf.Tensor, scope: str, how: str
) -> ValueError:
    return ValueError(
        f"all_towers was called in {scope!r}, where {how} the tensor "
        f"{tensor.name!r} of shape {tensor.shape}, which depends on the rows "
        f"of one tower, or on its random numbers (by {origin.name!r}), so all "
        "towers would get what belongs to that one. Expected it among the "
        "values, as in all_towers(function, x, more), where those of all "
        "towers are joined. What is the same in all towers, as weights are, "
        "may be closed over, or passed in `shared`."
    )


_NUMBERS = (bool, int, float, complex, str, bytes, np.ndarray, np.generic)


def tensors(function: Any, shared: Any) -> list[tf.Tensor]:
    """The tensors that a function closes over, or has in `shared`."""
    held = [
        leaf
        for _, value in [("shared", shared), *_held(function, set())]
        for leaf in leaves(value)
    ]
    return [x for x in held if isinstance(x, tf.Tensor)]


def check_alike(
    one: Any, other: Any, one_shared: Any, other_shared: Any, scope: str
) -> None:
    """Raises if two towers' functions, or `shared`, hold different numbers."""
    here, there = _constants(one, one_shared), _constants(other, other_shared)
    for name in here.keys() & there.keys():
        a, b = here[name], there[name]
        if not (np.array_equal(a, b) or repr(a) == repr(b)):
            raise ValueError(
                f"all_towers was called in {scope!r} with {name!r}, which is "
                f"{b!r} there but {a!r} in tower 0; the function runs once, "
                "for all towers. Expected what depends on the tower's rows to "
                "be counted inside, as in tf.shape(x)[0], or to be among the "
                "values."
            )


def _constants(function: Any, shared: Any) -> dict[str, Any]:
    """The numbers that a function closes over, by what they are called."""
    numbers: dict[str, Any] = {}
    for name, value in [("shared", shared), *_held(function, set())]:
        for path, leaf in named_leaves(value, name):
            if isinstance(leaf, tf.TensorShape):
                leaf = str(leaf)
            if isinstance(leaf, tf.Tensor) and not hasattr(leaf, "numpy"):
                leaf = _made_of(leaf)
            if isinstance(leaf, _NUMBERS):
                numbers[path] = leaf
    return numbers


def _made_of(tensor: tf.Tensor) -> str | None:
    """The constants that a tensor is computed of; None if not of those only.

    Where shapes are known, `tf.shape` is a constant.
    """
    constants: list[str] = []
    for x in ancestors(tensor):
        if x.op.type == "Const":
            constants.append(str(tf.make_ndarray(x.op.get_attr("value"))))
        elif x.op.op_def.is_stateful or not x.op.inputs:
            return None
    return ", ".join(constants)


def _held(function: Any, ids: set[int]) -> Iterator[tuple[str, Any]]:
    """Names and values that a function keeps, those of inner ones too."""
    if id(function) in ids:
        return
    ids.add(id(function))
    held: dict[str, Any] = {}
    if isinstance(function, functools.partial):
        yield from _held(function.func, ids)
        held.update({f"argument {i}": x for i, x in enumerate(function.args)})
        held.update(function.keywords)
    function = getattr(function, "__func__", function)
    code = getattr(function, "__code__", None)
    if code is not None:
        names = code.co_varnames[: code.co_argcount]
        defaults = function.__defaults__ or ()
        held.update(zip(names[len(names) - len(defaults) :], defaults))
        held.update(function.__kwdefaults__ or {})
        for name, cell in zip(code.co_freevars, function.__closure__ or ()):
            try:
                held[name] = cell.cell_contents
            except ValueError:  # not there yet
                continue
    for name, value in held.items():
        if callable(value) and (
            hasattr(value, "__code__") or isinstance(value, functools.partial)
        ):
            yield from _held(value, ids)
        else:
            yield name, value
