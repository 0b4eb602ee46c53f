"""tf_ancestry: ways back along a graph, from a tensor to what it is made of."""

from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import tensorflow as tf

# Ops whose k-th result is their k-th argument. Custom gradients send results and
# arguments through one `IdentityN`.
COPIES = ("Identity", "IdentityN")


def identity(tensor: tf.Tensor) -> tuple[int, str]:
    """What tells a tensor from those of all graphs."""
    return id(tensor.graph), tensor.name


def parents(tensor: tf.Tensor) -> list[tf.Tensor]:
    """What a tensor is made of by its op; of a copy that which it is of."""
    op = tensor.op
    if op.type in COPIES:
        return [op.inputs[tensor.value_index]]
    return list(op.inputs)


def around(tensor: tf.Tensor) -> list[Any]:
    """What a tensor stands for, in the graph around the function it is of.

    It may be eager; there is none of what the function made itself.
    """
    captures = getattr(tensor.graph, "captures", ())
    return [outer for outer, inner in captures if inner is tensor]


def identities(tensor: tf.Tensor) -> Iterator[tf.Tensor]:
    """A tensor, and those that it is just passed on from, back to the first.

    No custom gradient is passed. A tower takes an identity of what it is given,
    and a layer that is pinned to a device takes it from there.
    """
    yield tensor
    while tensor.op.type == "Identity":
        (tensor,) = parents(tensor)
        yield tensor


def ancestors(
    tensor: tf.Tensor,
    parents: Callable[[tf.Tensor], Iterable[tf.Tensor]] = parents,
    stops: Collection[tf.Tensor] = (),
) -> Iterator[tf.Tensor]:
    """A tensor and all that it is made of, each once.

    Args:
      tensor: of a graph.
      parents: gives what a tensor is made of; nothing ends the way.
      stops: those that are left out, and what only they are made of.
    """
    names = {identity(x) for x in stops}
    ahead = [tensor]
    while ahead:
        one = ahead.pop()
        name = identity(one)
        if name not in names:
            names.add(name)
            yield one
            ahead += parents(one)
