"""held: variables of TensorFlow's that layers keep beside Keras's weights.

A `TFSMLayer` keeps those of a SavedModel, a layer of a user's own those of a
`tf.Module`. The functions that read them know no others: they stay where they are,
and no tower can have copies.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from towers.engine.boundary import Held
from towers.foreign import tf_calls
from towers.foreign.keras_layers import is_keras_own

_ENDED = (keras.Layer, keras.Variable, keras.metrics.Metric)
# What changes a variable: `AssignVariableOp`, `ResourceScatterUpdate`, ...
_CHANGES = (
    "Assign",
    "ResourceScatter",
    "ResourceApply",
    "ResourceStridedSlice",
)


def held_variables(layers: Sequence[keras.Layer]) -> list[Held]:
    """The variables that layers keep so, and whether all who do are frozen."""
    by_id: dict[int, Held] = {}
    for layer in layers:
        own = is_keras_own(type(layer))
        if own and not isinstance(layer, keras.layers.TFSMLayer):
            continue
        for variable in _kept(layer, set()):
            others = by_id.get(id(variable))
            frozen = not layer.trainable and (others is None or others.frozen)
            by_id[id(variable)] = Held(variable, layer.name, frozen)
    return list(by_id.values())


def _kept(value: Any, ids: set[int]) -> Iterator[tf.Variable]:
    """The variables of a layer, or of what it keeps, without its layers'."""
    ids.add(id(value))
    for child in _children(value):
        if isinstance(child, tf.Variable):
            yield child
        elif not isinstance(child, _ENDED) and id(child) not in ids:
            yield from _kept(child, ids)


def _children(value: Any) -> list[Any]:
    if isinstance(value, keras.Layer):
        return [*vars(value).values()]
    if isinstance(value, Mapping):
        return [*value.values()]
    if isinstance(value, (list, tuple)):
        return [*value]
    with contextlib.suppress(AttributeError):  # of what TensorFlow can't track
        return [*tf.train.TrackableView.children(value).values()]
    return []


def check_changes_nothing(ops: Sequence[tf.Operation]) -> None:
    """Raises if one of a tower's ops changes a variable.

    Raises:
      ValueError: one does, or a function that it calls.
    """
    for op in ops:
        handles = [x for x in op.inputs if x.dtype == tf.resource]
        if handles and _changes(op):
            raise ValueError(
                f"The op {op.name!r} changes a variable of TensorFlow's, "
                "which each tower would do anew. Expected state that Keras knows "
                "of: a weight that the layer makes by `add_weight`, and assigns "
                "in `call`; or a SavedModel's endpoint, or a `tf.Module`, that "
                "changes nothing. One tower may do so."
            )


def _changes(op: tf.Operation) -> bool:
    """Whether an op, or a function that it calls, changes a variable."""
    names = []
    for attribute in op.op_def.attr:
        if attribute.type in ("func", "list(func)"):
            value = op.get_attr(attribute.name)
            each = value if isinstance(value, list) else [value]
            names += [function.name for function in each]
    return op.type.startswith(_CHANGES) or any(
        _function_changes(name, set()) for name in names
    )


def _function_changes(name: str, names: set[str]) -> bool:
    definition = None if name in names else tf_calls.definition(name)
    names.add(name)
    if definition is None:
        return False
    called = []
    for node in definition.node_def:
        if node.op.startswith(_CHANGES):
            return True
        for value in node.attr.values():
            called += [f.name for f in (value.func, *value.list.func) if f.name]
    return any(_function_changes(other, names) for other in called)
