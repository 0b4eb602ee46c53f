"""tf_random: what all of TensorFlow's random functions come to.

Those with a state ask the private `random_seed.get_seed` for the seeds of their op.
`tf.random.stateless_*`, `tf.nn.experimental.stateless_dropout` and with them all of
`keras.random` call the generated functions of `gen_stateless_random_ops_v2` (with
a key and a counter) and `gen_stateless_random_ops` (with a seed), by these names
in the module `stateless_random_ops`. How much of a shape is known, the public
`tf.get_static_value` does not say of one that `tf.shape` gives; the private
`tensor_util.constant_value_as_shape` does. Bodies of loops and branches are graphs of
the private `control_flow_v2_func_graphs`, and a loop's op keeps its graphs.
`tf_random_test.py` fails when one of them changes.
"""

import contextlib
import inspect
import random
import types
from collections.abc import (
    Callable,
    Collection,
    Container,
    Iterable,
    Iterator,
)
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.python.framework import random_seed, tensor_util
from tensorflow.python.ops import control_flow_v2_func_graphs as bodies
from tensorflow.python.ops import stateless_random_ops

from towers.foreign import tf_calls
from towers.foreign.patches import Shared
from towers.foreign.tf_nodes import OWN, SEEN

Function = Callable[..., Any]

_V2, _V1 = "gen_stateless_random_ops_v2", "gen_stateless_random_ops"
# Of a module, the functions that draw; of each, by what it is seeded.
_STATELESS = {
    _V2: {
        "stateless_random_uniform_v2": "key",
        "stateless_random_normal_v2": "key",
        "stateless_truncated_normal_v2": "key",
        "stateless_random_uniform_int_v2": "key",
        "stateless_random_uniform_full_int_v2": "key",
        "stateless_random_gamma_v3": "key",
        "stateless_shuffle": "key",
    },
    _V1: {
        "stateless_multinomial": "seed",
        "stateless_parameterized_truncated_normal": "seed",
        "stateless_random_binomial": "seed",
        "stateless_random_gamma_v2": "seed",
        "stateless_random_poisson": "seed",
    },
}
# How those with a counter count: so many numbers of up to 32 bits come from so many
# blocks. A truncated normal reserves for each number what it may reject.
_COUNTED = {
    "stateless_random_uniform_v2": (4, 1),
    "stateless_random_normal_v2": (4, 1),
    "stateless_random_uniform_int_v2": (4, 1),
    "stateless_random_uniform_full_int_v2": (4, 1),
    "stateless_truncated_normal_v2": (4, 256),
    "stateless_random_gamma_v3": (1, 256),
}
_PHILOX = (1, 3)  # what counts so; 3 chooses it
# Of others, those whose rows are the same whatever is drawn for other rows.
_BY_ROW = (
    "stateless_multinomial",
    "stateless_random_binomial",
    "stateless_random_gamma_v2",
    "stateless_random_poisson",
)
_PARAMETERS = ("alpha", "counts", "lam", "logits", "probs")
MOST = 2**31 - 1  # seeds of an op are taken modulo this
_LOOPS = ("StatelessWhile", "While")
_OF_SHAPE = ("Shape", "ShapeN", "Size")  # whose results are of no values
# Parts of types of ops: those that draw, and those that call functions, of
# which the last are traced where they are called.
_RANDOM = ("Random", "Normal", "Multinomial")
_CALLS = ("Call", "While", "If", "Case")
_BODIES = (
    bodies.CondBranchFuncGraph,
    bodies.WhileBodyFuncGraph,
    bodies.WhileCondFuncGraph,
)


def asks(seeds: Function, drawn: Function) -> Any:
    """While open, who draws asks first.

    It may be open several times, in several threads: there is one for all.

    Args:
      seeds: `f(get_seed, op_seed)` to the two seeds of an op with a state.
      drawn: `f(name, by, original, arguments)` to what a stateless function of
        that name draws, which is seeded by the argument `by`.
    """
    return _ASKING.opened(seeds, drawn)


class _Instead(types.ModuleType):
    """A module with some functions in the place of its own."""

    def __init__(self, module: types.ModuleType, functions: dict[str, Any]):
        super().__init__(module.__name__)
        self._module = module
        vars(self).update(functions)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _patches(seeds: Function, drawn: Function) -> list[tuple[Any, str, Any]]:
    get_seed = random_seed.get_seed

    def instead(name: str, by: str, original: Function) -> Function:
        signature = inspect.signature(original)

        def call(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments
            return drawn(name, by, original, dict(given))

        return call

    modules = {}
    for owner, names in _STATELESS.items():
        module = getattr(stateless_random_ops, owner)
        functions = {
            name: instead(name, by, getattr(module, name))
            for name, by in names.items()
            if hasattr(module, name)  # older TensorFlow lacks some
        }
        modules[owner] = _Instead(module, functions)
    return [
        (random_seed, "get_seed", lambda op_seed: seeds(get_seed, op_seed)),
        *((stateless_random_ops, name, x) for name, x in modules.items()),
    ]


_ASKING = Shared(_patches)


def is_by_row(name: str) -> bool:
    """Whether rows of a stateless function do not depend on other rows."""
    return name in _COUNTED or name in _BY_ROW


def parameters(given: dict[str, Any]) -> dict[str, tf.Tensor]:
    """What a stateless function draws by, of its arguments."""
    return {
        name: tf.convert_to_tensor(x)
        for name, x in given.items()
        if name in _PARAMETERS
    }


def shape_of(given: dict[str, Any]) -> tf.Tensor:
    """Of what a stateless function draws, int32 or int64 [rank]."""
    if "shape" in given:
        return tf.convert_to_tensor(given["shape"])
    rows = tf.shape(given["logits"])[0]
    return tf.stack([rows, tf.cast(given["num_samples"], tf.int32)])


def sizes(given: dict[str, Any]) -> list[int | None] | None:
    """As much of that shape as is known; None if not even its rank is."""
    if "shape" not in given and "logits" not in given:
        return None  # as of what is shuffled
    shape = tensor_util.constant_value_as_shape(shape_of(given))
    return None if shape.rank is None else shape.as_list()


def counted(
    name: str, given: dict[str, Any], is_compiled: bool
) -> tuple[int, int, bool] | None:
    """How a stateless function counts; None if not by its shape alone.

    Args:
      name: the function's.
      given: its arguments.
      is_compiled: whether XLA makes the numbers. It makes a truncated normal of
        one uniform number, and two normal ones of two at a time.

    Returns:
      How many numbers come from a group of blocks, how many blocks that is, and
      whether they come in pairs.
    """
    if name not in _COUNTED:
        return None
    if tf.get_static_value(tf.convert_to_tensor(given["alg"])) not in _PHILOX:
        return None
    elements, blocks = _COUNTED[name]
    if name == "stateless_random_gamma_v3":
        rank = tf.convert_to_tensor(given["shape"]).shape[0]
        of_all = given["alpha"].shape.rank in (0, rank)
        return (elements, blocks, False) if of_all else None
    like = given.get("minval")
    dtype = tf.as_dtype(given.get("dtype") or getattr(like, "dtype", "float32"))
    if is_compiled:
        blocks = 1
    if dtype.size == 8:
        elements, blocks = elements // 2, max(blocks // 2, 1)
    in_pairs = is_compiled and name == "stateless_random_normal_v2"
    return elements, blocks, in_pairs


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
    seen, todo = set(), [tensor]
    while todo:
        tensor = todo.pop()
        name = id(tensor.graph), tensor.name
        if name in seen:
            continue
        seen.add(name)
        yield tensor
        kind = tensor.op.type
        is_call = any(x in kind for x in _CALLS) and kind not in _LOOPS
        if (
            name not in ends
            and kind not in _OF_SHAPE
            and (past_calls or not is_call)
        ):
            todo += taken(tensor)


def taken(tensor: tf.Tensor) -> list[tf.Tensor]:
    """What the op of a tensor takes; of what is from outside, that."""
    if tensor.op.type in (*_LOOPS, "IdentityN"):
        return [tensor.op.inputs[tensor.value_index]]
    if tensor.op.type != "Placeholder":
        return list(tensor.op.inputs)
    captures = getattr(tensor.graph, "captures", ())
    return [
        outer
        for outer, inner in captures
        if inner is tensor and not hasattr(outer, "numpy")
    ]


def draws_unseen(op: tf.Operation) -> bool:
    """Whether an op draws statelessly, or calls what does, and nobody asked."""
    return _is_unseen(op.type, op.node_def) or any(
        _calls_unseen(name) for name in _called(op.node_def)
    )


def _is_unseen(kind: str, node: Any) -> bool:
    return (
        kind.startswith("Stateless")
        and "Get" not in kind
        and any(word in kind for word in _RANDOM)
        and SEEN not in node.attr
    )


def _calls_unseen(name: str) -> bool:
    function = tf_calls.definition(name)
    return function is not None and any(
        _is_unseen(node.op, node) or any(map(_calls_unseen, _called(node)))
        for node in function.node_def
    )


def is_seeded(op: Any) -> bool:
    """Whether an op, or a node, has a state and seeds."""
    attributes = getattr(op, "node_def", op).attr
    return "seed2" in attributes and any(
        attributes[name].i for name in ("seed", "seed2")
    )


def missed(
    ops: Iterable[tf.Operation], given: Collection[tuple[int, int]] | None
) -> Iterator[str]:
    """Ops that draw by constant seeds, or call functions that do.

    Args:
      ops: of a tower.
      given: the seeds that are the tower's; None if no op with a state goes by
        seeds, as under XLA.
    """
    for op in ops:
        if any(word in op.type for word in _RANDOM):
            if given is not None and is_seeded(op) and _seeds(op) not in given:
                yield op.name
        elif any(word in op.type for word in _CALLS):
            names = _called(op.node_def)
            if any(_draws(x, op.type, given is not None) for x in names):
                yield op.name


def _seeds(op: tf.Operation) -> tuple[int, int]:
    return op.get_attr("seed"), op.get_attr("seed2")


def _called(node: Any) -> list[str]:
    """The functions that a node calls."""
    values = list(node.attr.values())
    return [v.func.name for v in values if v.func.name] + [
        function.name for v in values for function in v.list.func
    ]


def _draws(name: str, caller: str, by_op: bool) -> bool:
    """Whether a function draws so, and is not traced where it is called.

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
    todo = [node.input[2 if "Multinomial" in node.op else 1]]
    seen = set(todo)
    while todo:
        source = nodes.get(todo.pop().lstrip("^").split(":")[0])
        if source is None:  # an argument of the function
            return False
        new = set(source.input) - seen
        seen |= new
        todo += new
    return True


@contextlib.contextmanager
def nothing_drawn() -> Iterator[None]:
    """While open, what Python's and NumPy's generators draw is taken back."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
