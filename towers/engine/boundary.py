"""boundary: what a tower takes and hands out, and the gradient in between."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import tensorflow as tf

from towers.engine.host import device_here
from towers.foreign.tf_ancestry import around
from towers.foreign.tf_gradients import (
    followed,
    own_gradient,
    own_gradient_of_each,
)

# What has a device, but not that of what it hands out.
_FROM_ELSEWHERE = ("Placeholder", "ReadVariableOp")


@dataclasses.dataclass(frozen=True)
class Task:
    """What is computed on one device, as by a tower.

    Attributes:
      function: pure, from a nest of tensors to a nest.
      device: its name.
      argument: a nest of tensors.
      elsewhere: the devices of those tensors, by their place in the flat nest,
        that are not taken to `device`.
      scope: the name scope, where it may be a copy of another's, or is called.
    """

    function: Callable[..., Any]
    device: str
    argument: Any
    elsewhere: Mapping[int, str] = dataclasses.field(default_factory=dict)
    scope: str = ""


@dataclasses.dataclass(frozen=True)
class Held:
    """A variable of TensorFlow's that a layer reads past the tower's arguments.

    Attributes:
      variable: it.
      layer: what holds it.
      frozen: whether nobody wants its gradient.
    """

    variable: tf.Variable
    layer: str
    frozen: bool


def tensors_of(nest: Any) -> list[tf.Tensor]:
    """The tensors of a nest, those inside ragged and sparse ones too."""
    flat = tf.nest.flatten(nest, expand_composites=True)
    return [x for x in flat if x is not None]


def distinct(tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    """With copies of what is there twice, as each gets a gradient."""
    ids: set[int] = set()
    distinct = []
    for tensor in tensors:
        again = id(tensor) in ids and tensor.dtype.is_floating
        ids.add(id(tensor))
        distinct.append(tf.identity(tensor) if again else tensor)
    return distinct


def argument_here(task: Task, tensors: Sequence[tf.Tensor]) -> Any:
    """The task's argument, with identities there for tensors from elsewhere.

    A loop places what it hands from step to step beside where that came from:
    it must come from this device, or every step asks the other.

    Args:
      task: the tower's.
      tensors: those to take in the place of the argument's, as many.
    """
    here = []
    with tf.device(task.device):
        tower = device_here()
    for i, tensor in enumerate(tensors):
        if i not in task.elsewhere and _is_made_on(tower, tensor):
            here.append(tensor)
            continue
        with tf.device(task.elsewhere.get(i, task.device)):
            here.append(tf.identity(tensor))
    copies = iter(here)
    return tf.nest.map_structure(
        lambda x: None if x is None else next(copies),
        task.argument,
        expand_composites=True,
    )


def _is_made_on(device: str, tensor: tf.Tensor) -> bool:
    """Whether an op on a device made this, in this graph."""
    op = tensor.op
    return (
        op.device == device != ""
        and op.type not in _FROM_ELSEWHERE
        and op.graph is tf.compat.v1.get_default_graph()
    )


def replaced(nest: Any, results: Any) -> Any:
    """`nest`, with its differentiable tensors replaced by `results`."""
    return tf.nest.map_structure(
        lambda x: next(results) if has_gradient(x) else x,
        nest,
        expand_composites=True,
    )


def has_gradient(x: tf.Tensor | None) -> bool:
    """Whether a gradient of this can reach what it was made of."""
    return x is not None and x.dtype.is_floating and x.op.type != "StopGradient"


def differentiated(
    results: Sequence[tf.Tensor],
    tensors: Sequence[tf.Tensor],
    upstream: Sequence[Any],
) -> list[Any]:
    """Gradients of `results` by `tensors`, each op beside that which it is of.

    Args:
      results: tensors.
      tensors: what they were computed from.
      upstream: the gradient of each result, or None.
    """
    pairs = [
        (y, g)
        for y, g in zip(results, upstream)
        if y.dtype.is_floating and g is not None
    ]
    if not pairs:
        return [None] * len(tensors)
    return tf.compat.v1.gradients(
        [y for y, _ in pairs],
        list(tensors),
        grad_ys=[g for _, g in pairs],
        colocate_gradients_with_ops=True,
        stop_gradients=list(tensors),  # one may be made from another, outside
    )


def lost(
    ops: Sequence[tf.Operation],
    arguments: Sequence[tf.Tensor],
    held: Sequence[Held] = (),
) -> list[tf.Tensor]:
    """What a tower takes past its arguments, though a tape follows it.

    Args:
      ops: what the tower made.
      arguments: its.
      held: variables, which are not meant.
    """
    handles = {id(x.variable.handle) for x in held}
    own = {op.name for op in ops}
    names = {x.name for x in arguments}
    outside = {
        x.name: x
        for op in ops
        for x in op.inputs
        if x.op.name not in own and x.name not in names and not _stops(op)
    }
    taken = [list(_captured(x)) for x in outside.values()]
    return [
        one[0]
        for one in taken
        if followed(one) and not handles & {id(x) for x in one}
    ]


def _stops(op: tf.Operation) -> bool:
    """Whether no gradient goes past an op, by its own or the next ones."""
    if op.type != "ReadVariableOp":
        return op.type == "StopGradient"
    takers = op.outputs[0].consumers()
    return all(taker.type == "StopGradient" for taker in takers)


def _captured(tensor: tf.Tensor) -> Iterator[tf.Tensor]:
    """A tensor, and what it stands for in the functions around its own."""
    inner: tf.Tensor | None = tensor
    while inner is not None:
        yield inner
        outer = [] if hasattr(inner, "numpy") else around(inner)
        inner = next(iter(outer), None)


def check_nothing_lost(
    variables: Sequence[tf.Variable],
    tensors: Sequence[tf.Tensor],
    held: Sequence[Held] = (),
) -> None:
    """Raises if a gradient would not reach what a tower read by itself."""
    by_id = {id(x.variable): x for x in held}
    variables = [
        v for v in variables if id(v) not in by_id or not by_id[id(v)].frozen
    ]
    for v in variables:
        if id(v) in by_id:
            raise ValueError(
                f"The layer {by_id[id(v)].layer!r} is trainable and reads the "
                f"variable {v.name!r} where it is, past the tower, as layers do "
                "that hold a SavedModel (`TFSMLayer`) or a `tf.Module`, so its "
                "gradient would be lost. Expected such a layer to be frozen: "
                "set its `trainable = False`. What is to be trained must be a "
                "Keras weight, made by `add_weight` and read in `call`."
            )
    if variables:
        raise ValueError(
            "The tower reads the trainable variables "
            f"{[v.name for v in variables]}, which belong to no model "
            "that it was given, so their gradient would be lost. Make "
            "them weights of a layer, or pass their model too; or let a layer "
            "that is frozen, with `trainable = False`, keep as an attribute what "
            "has them."
        )
    if tensors:
        raise ValueError(
            f"The tower takes {[x.name for x in tensors]} from outside, which "
            "a tape follows, so the gradient would be lost. Pass them with "
            "the inputs, named in `whole` if they are no batch; or take them "
            "through tf.stop_gradient."
        )


def pinned_task(
    task: Task,
    make: Callable[..., Any] | None = None,
    held: Sequence[Held] = (),
) -> Any:
    """A task, forward and backward on its device, in a graph."""
    nests: list[Any] = []
    heard = _Followed()
    tensors = distinct(tensors_of(task.argument))

    def run(*tensors: tf.Tensor) -> Any:
        graph = tf.compat.v1.get_default_graph()
        before = len(graph.get_operations())
        here = argument_here(task, tensors)
        result, differentiate = (make or built)(task.function, here)
        nests.append(result)
        unreached = lost(graph.get_operations()[before:], tensors, held)
        # What has no gradient need not be asked for one, with zeros.
        results = [x for x in tensors_of(result) if has_gradient(x)]

        def backward(*upstream: Any, variables: Any = ()) -> list[Any]:
            check_nothing_lost(variables, unreached, held)
            with tf.device(task.device):
                return differentiate(results, tensors, heard.of(upstream))

        return results, backward

    with tf.device(task.device):
        passed = own_gradient(run, task.elsewhere)(*tensors)
        results = iter(heard.noted(passed))
    return replaced(nests[0], results)


class _Followed:
    """Which results have a gradient: a tape makes zeros of those that have none.

    They would cross to the tower, and be differentiated there. A model that ends
    in a softmax has such a result: Keras's loss takes what is before it.
    """

    def __init__(self) -> None:
        self._places: set[int] = set()

    def noted(self, results: Sequence[tf.Tensor]) -> Sequence[tf.Tensor]:
        """The results, whose gradients are noted on their way."""
        if len(results) < 2:
            return results
        noted = own_gradient_of_each(lambda same: same, self._note, results)
        self._places.clear()  # a forward accumulator has asked for gradients
        return noted

    def of(self, upstream: Sequence[Any]) -> list[Any]:
        """Gradients, with None for those that a tape has made."""
        places = self._places or set(range(len(upstream)))
        self._places = set()
        return [g if k in places else None for k, g in enumerate(upstream)]

    def _note(self, k: int, upstream: Any) -> Any:
        self._places.add(k)
        return upstream


def built(function: Callable[..., Any], argument: Any) -> tuple[Any, Any]:
    """`function(argument)`, and the function that gives its gradients."""
    return function(argument), differentiated
