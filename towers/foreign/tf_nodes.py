"""tf_nodes: what TensorFlow calls nodes and tensors of graphs, and notes of them.

TensorFlow has no public list of these. `tf_nodes_test.py` fails when one of them
changes.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import tensorflow as tf

# Ops by which the parts of a function that is cut talk to each other.
SENDS = ("_Send", "_HostSend")
RECEIVES = ("_Recv", "_HostRecv")
# Ops by which a function takes and returns.
ARGUMENTS = ("_Arg", "_DeviceArg")
RESULTS = ("_Retval", "_DeviceRetval")

# Attributes of nodes: the gradient that an op has in the place of its own; the
# ops that it is to be beside; what a function's argument is called; and of
# which shapes and dtypes the variables behind it are.
GRADIENT = "_gradient_op_type"
BESIDE = "_class"
CALLED = "_user_specified_name"
HANDLE_SHAPES, HANDLE_DTYPES = "_handle_shapes", "_handle_dtypes"
# An attribute of functions: that calls of one stay calls.
NOT_INLINED = "_noinline"
# Ours, of nodes: that a tower has made it of where it is among the towers.
OWN = "_towers_own"
# Likewise: that a random op is one that somebody has asked for, see `tf_random`.
SEEN = "_towers_drawn"

# What TensorFlow makes of several ops, each of one argument, in a row.
IN_A_ROW = "_UnaryOpsComposition"

_FUSED_CONVOLUTION = "_FusedConv2D"
# Attributes of the convolution that is fused there with what follows on it.
_OF_CONVOLUTION = (
    *("T", "strides", "padding", "explicit_paddings"),
    *("data_format", "dilations", "use_cudnn_on_gpu"),
)
_ONEDNN = re.compile("^_Mkl(Native)?")


def op_of_kernel(kernel: str) -> str:
    """A kernel of oneDNN by the name that its op has without that."""
    op = _ONEDNN.sub("", kernel)
    if op.startswith("Fused") and not hasattr(tf.raw_ops, op):
        return f"_{op}"
    return op


def take_apart(node: Any) -> None:
    """Makes of a fused convolution the convolution, whose result has its shape.

    With oneDNN it is executed in bfloat16, which its op does not list, so a graph
    with one cannot be imported.
    """
    if node.op == _FUSED_CONVOLUTION:
        node.op = _FUSED_CONVOLUTION.removeprefix("_Fused")
        del node.input[2:]  # what is added, and waited for
        for name in set(node.attr) - set(_OF_CONVOLUTION):
            del node.attr[name]


def library(*graphs: Any) -> dict[str, Any]:
    """The functions that come with `GraphDef`s, by their names."""
    return {f.signature.name: f for g in graphs for f in g.library.function}


def all_nodes(graph: Any) -> Iterator[Any]:
    """The nodes of a `GraphDef`, and of the functions that come with it."""
    yield from graph.node
    for function in graph.library.function:
        yield from function.node_def


def source(tensor: str) -> str:
    """The node that a tensor is of, as "a" of "a", "a:1", "a:output:1" and "^a"."""
    return tensor.removeprefix("^").split(":")[0]


def port(tensor: str) -> int:
    """Which result of its node a tensor is."""
    return int(tensor.rpartition(":")[2]) if ":" in tensor else 0


def full(tensor: str) -> str:
    """A tensor with its port: "a:0"; one that is waited for, "^a", as it is."""
    return tensor if ":" in tensor or tensor[:1] == "^" else f"{tensor}:0"


def rendezvous(node: Any) -> tuple[bytes, ...]:
    """What a send and its receive have in common: both ends, and a name."""
    ends = ("send_device", "recv_device", "tensor_name")
    return tuple(node.attr[name].s for name in ends)


def ancestor_nodes(
    nodes: Mapping[str, Any], tensors: Iterable[str]
) -> dict[tuple[str, int], Any]:
    """What tensors are made of and wait for: nodes by (name, port).

    Of an `IdentityN` that is what it has at the port; see `tf_ancestry`.

    Args:
      nodes: of a graph or a function, by name; what is none is an argument, and
        None is found of it.
      tensors: of them, as `source` takes them.
    """
    by_place: dict[tuple[str, int], Any] = {}
    ahead = list(tensors)
    while ahead:
        tensor = ahead.pop()
        place = source(tensor), port(tensor)
        if place in by_place:
            continue
        by_place[place] = node = nodes.get(place[0])
        if node is not None and node.op == "IdentityN":
            ahead.append(node.input[place[1]])
            ahead += [x for x in node.input if x.startswith("^")]
        elif node is not None:
            ahead += node.input
    return by_place
