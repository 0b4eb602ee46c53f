"""copies: a part of the graph is built for some towers, copied for the rest.

Building a tower op by op is most of what tracing costs, and towers of one kind
of shard come out the same. Whether they do is not assumed: each is built, and
compared with the one before, op by op. Once two of them differ in nothing but
names, devices and what they were given, the next ones are copies. Where that is
known beforehand, as TensorFlow makes the same gradients for the same ops, one is
enough.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from towers.engine import boundary
from towers.engine.host import device_here, host_of
from towers.engine.parts import (
    Part,
    are_alike,
    bare_node,
    fingerprint,
    needed_ops,
    places_in,
    stands_alone,
)
from towers.foreign.tf_gradients import own_gradient, recorded


class Maker:
    """Makes one part for each tower: built, or a copy of another tower's.

    There are two policies, by what is known of a kind of part beforehand.
    *Compared*: nothing is. Parts are built until two come out alike; the next
    ones are copies. *Determined*: what is made depends on the kind and the inputs
    only. The first that was built of those alone, on its device, is copied.
    """

    def __init__(self) -> None:
        self._last: dict[Any, Part] = {}
        self._originals: dict[Any, Part] = {}  # what the next are copies of
        self._alike: list[Part] = []
        self.copied = 0  # so many parts

    def make(
        self,
        function: Callable[[], Any],
        inputs: Sequence[tf.Tensor],
        device: str,
        scope: str,
        kind: Any = (),
        determined: bool = False,
    ) -> Part:
        """The part that `function()` builds of `inputs`.

        Args:
          function: builds the part, under the device; returns a nest.
          inputs: the tensors that are another tower's for another tower.
          device: in full.
          scope: the name scope of the tower.
          kind: parts of different kinds are never compared.
          determined: the policy; else parts are compared.
        """
        graph = tf.compat.v1.get_default_graph()
        kind = (id(graph), kind, *((x.dtype, str(x.shape)) for x in inputs))
        if kind in self._originals:
            self.copied += 1
            return _copy(self._originals[kind], inputs, device, scope)
        before = len(graph.get_operations())
        results = function()
        made = graph.get_operations()[before:]
        part = Part(inputs, needed_ops(made, results), results, device, scope)
        last = self._last.get(kind)
        if last is not None and are_alike(last, part):
            self._originals[kind] = part
            self._alike += [last, part]
        elif determined and stands_alone(part):
            self._originals[kind] = part
        self._last[kind] = part
        return part

    def is_proven(self, part: Part) -> bool:
        """Whether a compared part is known to be as others of its kind."""
        return part.copied or any(part is x for x in self._alike)

    def fingerprint(self, part: Part) -> tuple[Any, ...]:
        """What tells a part from others of its kind: nothing, if proven."""
        return () if self.is_proven(part) else fingerprint(part)


def _copy(
    part: Part, inputs: Sequence[tf.Tensor], device: str, scope: str
) -> Part:
    """The part for other inputs, on another device."""
    graph = tf.compat.v1.get_default_graph()
    own = re.compile(f"(^|/){re.escape(part.scope)}")

    def renamed(name: str) -> str:
        return own.sub(lambda match: f"{match[1]}{scope}", name)

    places = places_in(part)
    names: dict[str, str] = {}
    same: dict[bytes, str] = {}
    given: dict[str, tf.Tensor] = {}
    copy = tf.compat.v1.GraphDef(versions=graph.graph_def_versions)
    for op in part.ops:
        node = bare_node(op)
        if op.device != part.device:
            node.device = host_of(device)
        for tensor in op.inputs:
            place = places.get(tensor.name, ("outside",))
            if place[0] == "op":
                name = f"{names[tensor.op.name]}:{tensor.value_index}"
            else:
                name = tensor.name
                given[name] = inputs[place[1]] if place[1:] else tensor
            node.input.append(name)
        node.input.extend(f"^{names[x.name]}" for x in op.control_inputs)
        name = renamed(op.name)
        names[op.name] = same.setdefault(
            node.SerializeToString(deterministic=True), name
        )
        if names[op.name] == name:  # else the same is there, once is enough
            node.name = name
            copy.node.append(node)
    with tf.device(device):
        ops = tf.graph_util.import_graph_def(
            copy, given, list(names.values()), name=""
        )

    def of_copy(tensor: tf.Tensor | None) -> tf.Tensor | None:
        if tensor is None:
            return None
        place = places.get(tensor.name, ("outside",))
        if place[0] != "op":
            return inputs[place[1]] if place[1:] else tensor
        result = ops[place[1]].outputs[place[2]]
        result.set_shape(tensor.shape)
        return result

    results = tf.nest.map_structure(
        of_copy, part.results, expand_composites=True
    )
    return Part(inputs, ops, results, device, scope, True)


def made_alike(
    makers: tuple[Maker, Maker],
    scope: str,
    function: Callable[..., Any],
    argument: Any,
) -> tuple[Any, Any]:
    """`function(argument)`, and the function that gives its gradients.

    What either makes may be copied from another tower. Forward passes are
    compared; backward passes are determined by forward passes that are alike,
    and compared where those are not known to be.

    Args:
      makers: one for the forward passes of all towers, one for the backward.
      scope: the tower's name scope.
      function: builds the tower.
      argument: a nest of tensors on its device.
    """
    given = boundary.leaves(argument)
    device, graph = device_here(), given[0].graph
    # A sparse tensor knows its rows, which no tensor that it is made of shows.
    known = tuple(
        str(tf.type_spec_from_value(x))
        for x in tf.nest.flatten(argument)
        if not (x is None or isinstance(x, tf.Tensor))
    )
    forth = makers[0].make(
        lambda: function(argument), given, device, scope, known
    )

    def differentiate(
        results: Sequence[tf.Tensor],
        tensors: Sequence[tf.Tensor],
        upstream: Sequence[Any],
    ) -> Any:
        def gradients() -> Any:
            return boundary.differentiated(results, tensors, upstream)

        above = boundary.leaves(upstream)
        if recorded():
            # For a gradient of gradients: no tape saw a copy being made.
            return (
                _again(gradients, [*tensors, *above])
                if forth.copied
                else gradients()
            )
        if tf.compat.v1.get_default_graph() is not graph:
            return gradients()
        seen = [x for op in forth.ops for x in op.outputs]
        names = [x.name for x in above]
        kind = (
            known,
            makers[0].fingerprint(forth),
            *(type(g).__name__ for g in upstream),
            *(names.index(name) for name in names),  # one may be there twice
        )
        back = makers[1].make(
            gradients,
            [*seen, *given, *tensors, *above],
            device,
            scope,
            kind,
            determined=makers[0].is_proven(forth),
        )
        return back.results

    return forth.results, differentiate


def _again(
    gradients: Callable[[], Any], tensors: Sequence[tf.Tensor]
) -> list[Any]:
    """Gradients that are differentiated as the graph says, not as a tape saw.

    Args:
      gradients: makes them.
      tensors: what they depend on.
    """
    made = gradients()
    flat = boundary.leaves(made)
    results = [x for x in flat if x.dtype.is_floating]

    @own_gradient
    def run(*_: tf.Tensor) -> Any:
        def backward(*upstream: Any) -> list[Any]:
            return _again(
                lambda: boundary.differentiated(results, tensors, upstream),
                [*tensors, *boundary.leaves(upstream)],
            )

        return [tf.identity(x) for x in results], backward

    given = iter(run(*tensors))
    return tf.nest.map_structure(
        lambda x: next(given) if x is not None and x.dtype.is_floating else x,
        made,
        expand_composites=True,
    )
