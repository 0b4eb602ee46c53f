"""steps: what a model calls one after another, how large it is, what it needs."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from towers.foreign import keras_compile, keras_layers, keras_optimizer
from towers.foreign.patches import patched
from towers.foreign.tf_ancestry import parents
from towers.keras_model import signature

# These hold no memory of their own.
_VIEWS = (
    "Identity",
    "IdentityN",
    "Reshape",
    "ExpandDims",
    "Squeeze",
    "StopGradient",
    "Shape",
)


@dataclasses.dataclass(frozen=True)
class Step:
    """A layer (or an operation) that a model calls, with all that it holds.

    Attributes:
      path: as `layer_devices` has it.
      layer: what is called.
      activation_bytes: of what it computes from the model's inputs.
    """

    path: str
    layer: Any
    activation_bytes: int


@dataclasses.dataclass(frozen=True)
class Steps:
    """All that a model calls.

    Attributes:
      steps: in the order in which they are first called.
      values: what goes from one to others: where it is made, the places of
        those that take it, and its bytes.
    """

    steps: Sequence[Step]
    values: Sequence[tuple[int, frozenset[int], int]]

    def crossing(self, order: Sequence[int]) -> list[tuple[int, int]]:
        """How many values, and bytes, cross a cut before each step, and the end.

        Args:
          order: of the steps, by their places.
        """
        place = {step: k for k, step in enumerate(order)}
        cuts = [(0, 0)] * (len(order) + 1)
        for maker, takers, size in self.values:
            at = [place[maker], *(place[taker] for taker in takers)]
            for cut in range(min(at) + 1, max(at) + 1):
                cuts[cut] = cuts[cut][0] + 1, cuts[cut][1] + size
        return cuts

    def depth_first(self) -> list[int]:
        """An order in which one branch comes after the other.

        That in which they are called has the branches side by side.
        """
        takes: dict[int, set[int]] = {i: set() for i in range(len(self.steps))}
        for maker, takers, _ in self.values:
            for taker in takers:
                takes[taker].add(maker)
        order: dict[int, None] = {}
        open_ones: set[int] = set()
        stack = [*range(len(self.steps))]  # from the last
        while stack:
            i = stack[-1]
            missing = [
                k
                for k in sorted(takes[i])
                if k not in order and k not in open_ones
            ]
            open_ones.add(i)
            if i in order or not missing:
                order.setdefault(stack.pop())
            else:
                stack += reversed(missing)
        return [*order]


def steps_of(model: Any, rows: int | None) -> Steps:
    """What a built model calls, read from a graph of it that is never run.

    Args:
      model: a built `keras.Model`.
      rows: of its inputs; None for any, then no activations count.
    """
    units = dict(_units(model))
    ranges: list[tuple[int, int, int]] = []
    graphs: list[tf.Graph] = []

    def noted(i: int, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            graph = tf.compat.v1.get_default_graph()
            before = len(graph.get_operations())
            outputs = original(*args, **kwargs)
            if graph is graphs[0]:  # and not in a loop
                ranges.append((i, before, len(graph.get_operations())))
            return outputs

        return call

    specs = signature.input_specs(model, None, (), rows)

    def run(*leaves: Any) -> None:
        graphs.append(tf.compat.v1.get_default_graph())
        inputs = tf.nest.pack_sequence_as(specs, leaves, expand_composites=True)
        model(inputs, training=True)

    layers = [*units.values()]
    shadows = [
        (layer, "call", noted(i, layer.call)) for i, layer in enumerate(layers)
    ]
    flat = tf.nest.flatten(specs, expand_composites=True)
    with patched(*shadows):
        traced = tf.function(run, autograph=False).get_concrete_function(*flat)
    whole = _read(traced, [*units.items()], ranges)
    if rows is not None:
        return whole
    steps = [dataclasses.replace(s, activation_bytes=0) for s in whole.steps]
    return dataclasses.replace(whole, steps=steps)


def _units(model: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(path, layer), looking into models that only hold layers."""
    for layer in keras_layers.children(model):
        if isinstance(layer, (keras.Sequential, keras.Function)):
            yield from _units(layer, f"{prefix}{layer.name}/")
        elif not isinstance(layer, keras.layers.InputLayer):
            yield prefix + layer.name, layer
    for operation in keras_layers.bare_operations(model):
        yield prefix + operation.name, operation


def _read(
    traced: Any,
    units: Sequence[tuple[str, Any]],
    ranges: Sequence[tuple[int, int, int]],
) -> Steps:
    """The steps that a traced model takes."""
    ops = traced.graph.get_operations()
    owner: dict[str, int] = {}
    called: dict[int, int] = {}  # by unit its place among the steps
    for unit, start, end in ranges:
        place = called.setdefault(unit, len(called))
        owner.update((op.name, place) for op in ops[start:end])
    held = [0] * len(called)
    inputs = {x.name for x in traced.inputs} - {
        inner.name for _, inner in traced.graph.captures
    }
    # Of each tensor that depends on the inputs: the steps' tensors behind it.
    behind: dict[str, frozenset[str]] = {name: frozenset() for name in inputs}
    sizes: dict[str, int] = {}
    made_by: dict[str, int] = {}
    takers: dict[str, set[int]] = {}
    for op in ops:
        step: int | None = owner.get(op.name)
        for y in op.outputs:
            origins = [behind[x.name] for x in parents(y) if x.name in behind]
            if not origins:
                continue
            sources = frozenset[str]().union(*origins)
            if step is None:
                behind[y.name] = sources
                continue
            behind[y.name] = frozenset([y.name])
            made_by[y.name], sizes[y.name] = step, _size(y)
            held[step] += 0 if op.type in _VIEWS else sizes[y.name]
            for name in sources:
                if made_by[name] != step:
                    takers.setdefault(name, set()).add(step)
    return Steps(
        [Step(*units[unit], held[step]) for unit, step in called.items()],
        [(made_by[n], frozenset(t), sizes[n]) for n, t in takers.items()],
    )


def _size(tensor: tf.Tensor) -> int:
    """Bytes, with one for what is not known beforehand."""
    if tensor.shape.rank is None:
        return tensor.dtype.size or 0
    return math.prod(d or 1 for d in tensor.shape) * (tensor.dtype.size or 0)


def variable_bytes(variable: Any) -> int:
    """The size of a variable."""
    return math.prod(variable.shape) * tf.as_dtype(variable.dtype).size


def slot_bytes(model: Any, optimizer: Any = None) -> dict[int, int]:
    """By a variable's id, the bytes of the optimizer's slots for it.

    Args:
      model: built; its own optimizers count, if it is compiled.
      optimizer: another one, or its name.
    """
    sizes: dict[int, int] = {}
    optimizers = keras_compile.optimizers(model)
    for one in [keras.optimizers.get(optimizer)] if optimizer else optimizers:
        if not one.built:  # one like it, on the host, for a moment
            one = type(one).from_config(one.get_config())
            with tf.device("/CPU:0"):
                one.build(model.trainable_variables)
        for slot, variable in keras_optimizer.optimizer_variables(one):
            if variable is not None:
                size = sizes.get(id(variable), 0) + variable_bytes(slot)
                sizes[id(variable)] = size
    return sizes
