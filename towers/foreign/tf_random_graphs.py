"""tf_random_graphs: where in a graph something is drawn, and by what.

Bodies of loops and branches are graphs of the private
`control_flow_v2_func_graphs`, and a loop's op keeps its graphs. `_set_attr` notes on
an op whose it is. `tf_random_graphs_test.py` fails when one of them changes.
"""

from collections.abc import (
    Callable,
    Collection,
    Container,
    Iterable,
    Iterator,
)
from typing import Any

import tensorflow as tf
from tensorflow.python.ops import control_flow_v2_func_graphs as bodies

from towers.foreign import tf_calls, tf_nodes
from towers.foreign.tf_ancestry import ancestors, around, identity, parents
from towers.foreign.tf_nodes import OWN, SEEN

_LOOPS = ("StatelessWhile", "While")
_OF_SHAPE = ("Shape", "ShapeN", "Size")  # whose results are of no values
# Parts of types of ops: those that draw, and those that call functions, of
# which the last are traced where they are called.
_RANDOM = ("Random", "Normal", "Multinomial", "SampleDistorted")
_CALLS = ("Call", "While", "If", "Case")
# Of a `tf.random.Generator`, whose state is a variable.
_OF_GENERATORS = (
    "Rng",
    "StatefulRandom",
    "StatefulStandardNormal",
    "StatefulTruncatedNormal",
    "StatefulUniform",
)
_BODIES = (
    bodies.CondBranchFuncGraph,
    bodies.WhileBodyFuncGraph,
    bodies.WhileCondFuncGraph,
)


def mark(tensor: tf.Tensor) -> None:
    """Notes on an op that what it makes is its tower's own."""
    tensor.op._set_attr(OWN, tf.compat.v1.AttrValue(b=True))


def mark_seen(tensor: tf.Tensor) -> None:
    """Notes on a random op that who draws was asked."""
    tensor.op._set_attr(SEEN, tf.compat.v1.AttrValue(b=True))


def is_made_in(root: Any) -> bool:
    """Whether what is made here is of a graph, or of loops and branches in it.

    What a `tf.function` makes is kept, and may be another tower's too.
    """
    graph = tf.compat.v1.get_default_graph()
    while graph is not root:
        if not isinstance(graph, _BODIES):
            return False
        graph = graph.outer_graph
    return True


def loops_around(graph: Any) -> Iterator[tuple[tf.Operation, Any]]:
    """The loops that a graph is in the bodies of: each op, and its condition."""
    while isinstance(graph, _BODIES):
        outer = graph.outer_graph
        for op in outer.get_operations():
            if op.type in _LOOPS and op._body_graph is graph:
                yield op, op._cond_graph
        graph = outer


def sources(
    tensor: tf.Tensor,
    ends: Container[tuple[int, str]] = (),
    past_calls: bool = True,
) -> Iterator[tf.Tensor]:
    """A tensor and what it is made of, also outside of loops and branches.

    Args:
      tensor: in a graph.
      ends: by a graph's id and a name, those that are not looked behind.
      past_calls: whether results of branches and functions are, of which nobody
        knows what they take.
    """

    def behind(tensor: tf.Tensor) -> list[tf.Tensor]:
        kind = tensor.op.type
        is_call = any(x in kind for x in _CALLS) and kind not in _LOOPS
        is_end = identity(tensor) in ends or kind in _OF_SHAPE
        return [] if is_end or (is_call and not past_calls) else taken(tensor)

    return ancestors(tensor, behind)


def taken(tensor: tf.Tensor) -> list[tf.Tensor]:
    """What the op of a tensor takes; of what is from outside, that."""
    if tensor.op.type in _LOOPS:
        return [tensor.op.inputs[tensor.value_index]]
    if tensor.op.type != "Placeholder":
        return parents(tensor)
    return [x for x in around(tensor) if not hasattr(x, "numpy")]


def draws_unseen(op: tf.Operation) -> bool:
    """Whether an op draws statelessly, or calls what does, and nobody asked."""
    return _has(op.type, op.node_def, _is_unseen)


def _is_unseen(kind: str, node: Any) -> bool:
    return (
        kind.startswith("Stateless")
        and "Get" not in kind
        and any(word in kind for word in _RANDOM)
        and SEEN not in node.attr
    )


def by_generators(ops: Iterable[tf.Operation]) -> Iterator[str]:
    """Ops that draw by a `tf.random.Generator`, or call functions that do."""
    for op in ops:
        is_call = any(word in op.type for word in _CALLS)
        if _is_of_generator(op.type) or (
            is_call and _has(op.type, op.node_def, _is_of_generator)
        ):
            yield op.name


def _is_of_generator(kind: str, _: Any = None) -> bool:
    return kind.startswith(_OF_GENERATORS)


def _has(kind: str, node: Any, is_such: Callable[[str, Any], bool]) -> bool:
    """Whether a node is such a one, or calls a function that has one."""
    return is_such(kind, node) or any(
        any(_has(inner.op, inner, is_such) for inner in function.node_def)
        for name in _called(node)
        if (function := tf_calls.definition(name)) is not None
    )


def is_seeded(op: Any) -> bool:
    """Whether an op, or a node, has a state and seeds."""
    attributes = getattr(op, "node_def", op).attr
    return "seed2" in attributes and any(
        attributes[name].i for name in ("seed", "seed2")
    )


def missed(
    ops: Iterable[tf.Operation], seeds: Collection[tuple[int, int]] | None
) -> Iterator[str]:
    """Ops that draw by constant seeds, or call functions that do.

    Args:
      ops: of a tower.
      seeds: those that are the tower's; None if no op with a state goes by
        seeds, as under XLA.
    """
    for op in ops:
        if _is_unseen(op.type, op.node_def):
            by = [x.name for x in op.op_def.input_arg].index(_seeding(op))
            origins = [*sources(op.inputs[by])]
            if all(x.op.inputs or x.op.type == "Const" for x in origins):
                yield op.name
        elif any(word in op.type for word in _RANDOM):
            if seeds is not None and is_seeded(op) and _seeds(op) not in seeds:
                yield op.name
        elif any(word in op.type for word in _CALLS):
            names = _called(op.node_def)
            if any(_draws(x, op.type, seeds is not None) for x in names):
                yield op.name


def _seeding(op: tf.Operation) -> str:
    """Which argument seeds a stateless op."""
    return (
        "key" if any(x.name == "key" for x in op.op_def.input_arg) else "seed"
    )


def _seeds(op: tf.Operation) -> tuple[int, int]:
    return op.get_attr("seed"), op.get_attr("seed2")


def _called(node: Any) -> list[str]:
    """The functions that a node calls."""
    values = list(node.attr.values())
    return [v.func.name for v in values if v.func.name] + [
        function.name for v in values for function in v.list.func
    ]


def _draws(name: str, caller: str, by_op: bool) -> bool:
    """Whether a function that was traced elsewhere draws by constant seeds.

    Args:
      name: the function's.
      caller: the type of the op that calls it.
      by_op: whether ops with a state go by seeds.
    """
    function = tf_calls.definition(name)
    if function is None:
        return False
    inside = "Call" in caller
    nodes = {node.name: node for node in function.node_def}
    for node in nodes.values():
        seeded = by_op and is_seeded(node)
        if inside and (seeded or _is_constant_draw(node, nodes)):
            return True
        kind = "Call" if inside else node.op
        if any(_draws(called, kind, by_op) for called in _called(node)):
            return True
    return False


def _is_constant_draw(node: Any, nodes: dict[str, Any]) -> bool:
    """Whether a node is stateless, and draws by a constant."""
    if not node.op.startswith("Stateless") or "Get" in node.op:
        return False
    if not any(word in node.op for word in _RANDOM):
        return False
    seed = node.input[2 if "Multinomial" in node.op else 1]
    origins = tf_nodes.ancestor_nodes(nodes, [seed]).values()
    return None not in origins  # of no argument of the function
