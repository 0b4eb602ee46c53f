"""tensor_shapes: how large the tensors of a function were when it ran."""

from collections.abc import Iterable, Sequence
from typing import Any

import tensorflow as tf

from towers.foreign import tf_nodes
from towers.foreign.tf_nodes import source
from towers.report.graph_defs import in_loops, pruned
from towers.report.recording import Elements, Ran

Tensors = Sequence[tf.Tensor]
_WRITES = (
    "AssignVariable",
    "AssignAddVariable",
    "AssignSubVariable",
    "ResourceApply",
    "ResourceScatter",
    "ResourceSparseApply",
)


def shapes_of(
    ran: Ran, batches: Sequence[Elements], names: Iterable[str]
) -> dict[str, tuple[int, ...]]:
    """The shapes of a function's tensors in its calls, where they are known.

    TensorFlow infers most of them from those of the arguments. For the rest,
    the function is computed once more, without what it assigns.

    Args:
      ran: the function.
      batches: what iterators gave meanwhile.
      names: of tensors of `ran.graph`, as "a/b:0".

    Returns:
      Shapes by name. One is missing where it differed between calls, where
      it depends on an iterator that was made before, or in a loop.
    """
    names = set(names)
    shapes = [
        _shapes(ran.graph, call, element, names)
        for call in _unlike(ran.calls)
        for element in _elements(ran.graph, batches)
    ]
    return {
        name: shapes[0][name]
        for name in names
        if all(name in each for each in shapes)
        and len({each[name] for each in shapes}) == 1
    }


def _shapes(
    original: Any, call: Tensors, element: Tensors | None, names: set[str]
) -> dict[str, tuple[int, ...]]:
    """Shapes in one call, of tensors outside loops."""
    looping = in_loops(original.node)
    graph, feeds = _with_arguments(original, call, element, static=True)
    if not looping:
        graph = pruned(graph, names)  # Python makes ops slowly
    inferred = _imported(graph)
    if inferred is None:
        return {}
    shapes = {}
    steady = _are_steady(original, inferred)
    for name in names:
        shape = inferred.get_tensor_by_name(name).shape
        if shape.is_fully_defined() and (steady or source(name) not in looping):
            shapes[name] = tuple(shape)
    rest = [n for n in names - set(shapes) if source(n) not in looping]
    if rest:
        graph, feeds = _with_arguments(original, call, element, static=False)
        shapes.update(zip(rest, _computed(graph, feeds, rest)))
    return shapes


def _imported(graph: Any) -> tf.Graph | None:
    """The graph, or none if it has nodes that only executors take."""
    with tf.Graph().as_default() as imported:
        try:
            tf.compat.v1.import_graph_def(graph, name="")
        except ValueError:
            return None
    return imported


def _are_steady(original: Any, inferred: tf.Graph) -> bool:
    """Whether what loops carry has the same shape after a step as before."""
    for node in original.node:
        if node.op != "NextIteration":
            continue
        after = inferred.get_tensor_by_name(f"{node.name}:0").shape
        for merge in original.node:
            if merge.op == "Merge" and node.name in map(source, merge.input):
                before = inferred.get_tensor_by_name(f"{merge.name}:0").shape
                if not (
                    after.is_fully_defined()
                    and before.is_fully_defined()
                    and after == before
                ):
                    return False
    return True


def known_shapes(
    graph: tf.Graph, names: Iterable[str]
) -> dict[str, tuple[int, ...]]:
    """The shapes of a graph's tensors that are known before it runs."""
    shapes = {}
    ops = {op.name: op for op in graph.get_operations()}
    for name in names:
        if source(name) in ops:
            shape = graph.get_tensor_by_name(name).shape
            if shape.is_fully_defined():
                shapes[name] = tuple(shape)
    return shapes


def _with_arguments(
    original: Any, call: Tensors, element: Tensors | None, static: bool
) -> tuple[Any, dict[str, tf.Tensor]]:
    """The function's graph, and its arguments by placeholder.

    With `static`, variables are there for their shapes only.
    """
    graph = tf.compat.v1.GraphDef(
        versions=original.versions, library=original.library
    )
    feeds: dict[str, tf.Tensor] = {}
    gone: set[str] = set()
    repeats = {n.name for n in original.node if n.op == "NextIteration"}

    def placeholder(name: str, dtype: Any, value: Any) -> None:
        node = graph.node.add(name=name, op="Placeholder")
        node.attr["dtype"].type = dtype
        if value is not None:
            feeds[f"{name}:0"] = value
            if value.dtype != tf.resource:
                node.attr["shape"].shape.CopyFrom(value.shape.as_proto())

    def argument(node: Any) -> None:
        shapes = node.attr[tf_nodes.HANDLE_SHAPES].list.shape
        if static and shapes:
            handle = graph.node.add(name=node.name, op="VarHandleOp")
            handle.attr["shape"].shape.CopyFrom(shapes[0])
            (dtype,) = node.attr[tf_nodes.HANDLE_DTYPES].list.type
            handle.attr["dtype"].type = dtype
            return
        value = call[node.attr["index"].i]
        placeholder(node.name, node.attr["T"].type, value)

    def element_of(node: Any) -> None:
        dtypes = node.attr["output_types"].list.type
        identity = graph.node.add(name=node.name, op="IdentityN")
        identity.attr["T"].list.type.extend(dtypes)
        for k, dtype in enumerate(dtypes):
            identity.input.append(f"{node.name}/{k}")
            value = element[k] if element else None
            placeholder(identity.input[k], dtype, value)

    for node in original.node:
        if node.op in tf_nodes.RESULTS or node.op.startswith(_WRITES):
            gone.add(node.name)
        elif node.op in tf_nodes.ARGUMENTS:
            argument(node)
        elif node.op == "IteratorGetNext":
            element_of(node)
        else:
            graph.node.add().CopyFrom(node)
    # What is given is there: to wait for it would be to run what stands for it.
    unawaited = gone | {source(name) for name in feeds}
    for node in graph.node:
        node.input[:] = [
            name
            for name in node.input
            if source(name) not in (unawaited if name.startswith("^") else gone)
        ]
        node.attr.pop(tf_nodes.BESIDE, None)  # may name what is gone
        if static:  # a device costs time, and says nothing of shapes
            node.device = ""
            tf_nodes.take_apart(node)
        if static and node.op == "Enter":  # of a shape that it does not tell
            for attribute in set(node.attr) - {"T"}:
                del node.attr[attribute]
            node.op = "Identity"
        if static and node.op == "Merge":
            # Of a loop the first step, see `_are_steady`.
            first = [x for x in node.input if source(x) not in repeats]
            if len(first) < len(node.input):
                node.input[:] = first
                node.attr["N"].i = len(first)
    return graph, feeds


def _unlike(calls: Sequence[Tensors]) -> list[Tensors]:
    """One of all calls whose arguments have the same shapes."""
    return list({tuple(tuple(x.shape) for x in c): c for c in calls}.values())


def _elements(graph: Any, batches: Sequence[Elements]) -> list[Tensors | None]:
    """What the graph took from an iterator, one element per list of shapes.

    None if it took nothing, or something of which nothing is known.
    """
    takers = [node for node in graph.node if node.op == "IteratorGetNext"]
    if len(takers) != 1:
        return [None]
    dtypes = [tf.as_dtype(d) for d in takers[0].attr["output_types"].list.type]
    shapes = [
        tf.TensorShape(s) for s in takers[0].attr["output_shapes"].list.shape
    ]
    alike = [b for b in batches if [d for d, _ in b.spec] == dtypes]
    same = [
        b.elements
        for b in alike
        if [s.as_list() for _, s in b.spec] == [s.as_list() for s in shapes]
    ]
    # A function may have been traced for any number of rows, and be called
    # with an iterator that knows its own.
    candidates = same or [
        b.elements
        for b in alike
        if all(s.is_compatible_with(x) for (_, s), x in zip(b.spec, shapes))
    ]
    merged = {
        shapes: e for elements in candidates for shapes, e in elements.items()
    }
    return list(merged.values()) or [None]


def _computed(
    graph: Any, feeds: dict[str, tf.Tensor], names: Sequence[str]
) -> list[tuple[int, ...]]:
    """Shapes by running the graph; none where a feed is missing."""

    def run(*values: tf.Tensor) -> list[tf.Tensor]:
        tensors = tf.compat.v1.import_graph_def(
            graph,
            input_map=dict(zip(feeds, values)),
            return_elements=list(names),
            name="",
        )
        return [tf.shape(tensor) for tensor in tensors]

    signature = [tf.TensorSpec(None, v.dtype) for v in feeds.values()]
    try:
        shapes = tf.compat.v1.wrap_function(run, signature)(*feeds.values())
    except (tf.errors.OpError, ValueError):  # or it cannot be imported
        return []
    return [tuple(shape.numpy().tolist()) for shape in shapes]
