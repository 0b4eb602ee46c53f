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
from towers.engine.fragments import (
    Fragment,
    are_alike,
    bare_node,
    fingerprint,
    needed_ops,
    stands_alone,
)
from towers.engine.host import device_here, host_of
from towers.foreign.tf_gradients import own_gradient, recorded


class Maker:
    """Makes one part for each tower: built, or a copy of another tower's.

    There are two policies, by what is known of a kind of part beforehand.
    *Compared*: nothing is. Parts are built until two come out alike; the next
    ones are copies. *Determined*: what is made depends on the kind, the type of
    the device and the inputs only. The first that was built of those alone, on its
    device, is copied.
    """

    def __init__(self) -> None:
        self._last: dict[Any, Fragment] = {}
        self._originals: dict[Any, Fragment] = {}  # what the next are copies of
        self._patterns: dict[Any, _Pattern] = {}  # of those that were copied
        self._alike: list[Fragment] = []
        self.copied = 0  # so many parts

    def make(
        self,
        function: Callable[[], Any],
        inputs: Sequence[tf.Tensor],
        device: str,
        scope: str,
        kind: Any = (),
        determined: bool = False,
        n_in_kind: int = 0,
    ) -> Fragment:
        """The part that `function()` builds of `inputs`.

        Args:
          function: builds the part, under the device; returns a nest.
          inputs: the tensors that are another tower's for another tower.
          device: in full.
          scope: the name scope of the tower.
          kind: parts of different kinds are never compared.
          determined: the policy; else parts are compared.
          n_in_kind: so many of the first inputs have shapes that `kind` tells.
        """
        graph = tf.compat.v1.get_default_graph()
        on = tf.DeviceSpec.from_string(device).device_type
        shapes = ((x.dtype, str(x.shape)) for x in inputs[n_in_kind:])
        kind = (id(graph), on, kind, *shapes)
        if kind in self._originals:
            self.copied += 1
            original = self._originals[kind]
            if kind not in self._patterns:
                self._patterns[kind] = _Pattern(original)
            return _copy(self._patterns[kind], original, inputs, device, scope)
        before = len(graph.get_operations())
        results = function()
        ops = needed_ops(graph.get_operations()[before:], results)
        part = Fragment(inputs, ops, results, device, scope, kind)
        last = self._last.get(kind)
        if last is not None and are_alike(last, part):
            self._originals[kind] = part
            self._alike += [last, part]
        elif determined and stands_alone(part):
            self._originals[kind] = part
            self._alike.append(part)
        self._last[kind] = part
        return part

    def is_proven(self, part: Fragment) -> bool:
        """Whether a part is known to be like all others of its kind."""
        return part.copied or any(part is x for x in self._alike)

    def fingerprint(self, part: Fragment) -> tuple[Any, ...]:
        """What identifies a part: its kind alone, if that is proven."""
        return part.kind if self.is_proven(part) else fingerprint(part)


class _Pattern:
    """What a part and all copies of it have in common, read once.

    Attributes:
      origins: by the place of an op, that of the first one which is the same: one
        is enough.
    """

    def __init__(self, part: Fragment):
        own = re.compile(f"(^|/){re.escape(part.scope)}")
        first: dict[Any, int] = {}
        self._part = part
        self._nodes: list[tuple[Any, ...]] = []
        self.origins: list[int] = []
        bare = [bare_node(op) for op in part.ops]
        for k, (op, node) in enumerate(zip(part.ops, bare)):
            is_host = op.device != part.device
            taken = [self._taken(tensor) for tensor in op.inputs]
            waits = [
                self.origins[part.places[x.name]] for x in op.control_inputs
            ]
            text = node.SerializeToString(deterministic=True)
            key = text, is_host, *taken, *waits
            self.origins.append(first.setdefault(key, k))
            if self.origins[k] == k:
                name = own.sub("\\1\0", op.name)  # for the scope of a copy
                self._nodes.append((k, name, node, is_host, taken, waits))

    def _taken(self, tensor: tf.Tensor) -> tuple[Any, ...]:
        """What an op takes: an output of one, an input, or what is outside."""
        kind, *place = self._part.places.get(tensor.name, ("outside",))
        if kind == "op":
            return kind, self.origins[place[0]], place[1]
        return kind, tensor.name, *place

    def copied(
        self, inputs: Sequence[tf.Tensor], device: str, scope: str
    ) -> list[tf.Operation]:
        """The ops of a copy, one for each of the part's."""
        graph, host = tf.compat.v1.get_default_graph(), host_of(device)
        copy = tf.compat.v1.GraphDef(versions=graph.graph_def_versions)
        names: dict[int, str] = {}
        input_map: dict[str, tf.Tensor] = {}
        for k, name, node, is_host, taken, waits in self._nodes:
            names[k] = name.replace("\0", scope)
            new = copy.node.add()
            new.CopyFrom(node)
            new.name = names[k]
            if is_host:
                new.device = host
            for kind, source, *place in taken:
                if kind == "op":
                    source = f"{names[source]}:{place[0]}"
                elif source not in input_map:
                    input_map[source] = (
                        inputs[place[0]]
                        if place
                        else graph.get_tensor_by_name(source)
                    )
                new.input.append(source)
            new.input.extend(f"^{names[i]}" for i in waits)
        with tf.device(device):
            return tf.graph_util.import_graph_def(
                copy, input_map, [names[i] for i in self.origins], name=""
            )


def _copy(
    pattern: _Pattern,
    part: Fragment,
    inputs: Sequence[tf.Tensor],
    device: str,
    scope: str,
) -> Fragment:
    """The part for other inputs, on another device."""
    ops = pattern.copied(inputs, device, scope)

    def of_copy(tensor: tf.Tensor | None) -> tf.Tensor | None:
        if tensor is None:
            return None
        place = part.places.get(tensor.name, ("outside",))
        if place[0] != "op":
            return inputs[place[1]] if place[1:] else tensor
        result = ops[place[1]].outputs[place[2]]
        result.set_shape(tensor.shape)
        return result

    results = tf.nest.map_structure(
        of_copy, part.results, expand_composites=True
    )
    return Fragment(inputs, ops, results, device, scope, part.kind, True)


def made_alike(
    makers: tuple[Maker, Maker],
    scope: str,
    determined: bool,
    function: Callable[..., Any],
    argument: Any,
) -> tuple[Any, Any]:
    """`function(argument)`, and the function that gives its gradients.

    What either makes may be copied from another tower. Forward passes are
    compared, or known to be determined; backward passes are determined by forward
    passes that are alike, and compared where those are not known to be.

    Args:
      makers: one for the forward passes of all towers, one for the backward.
      scope: the tower's name scope.
      determined: the policy for forward passes.
      function: builds the tower.
      argument: a nest of tensors on its device.
    """
    leaves = boundary.tensors_of(argument)
    device, graph = device_here(), leaves[0].graph
    # A sparse tensor knows its rows, which no tensor that it is made of shows.
    types = tuple(
        str(tf.type_spec_from_value(x))
        for x in tf.nest.flatten(argument)
        if not (x is None or isinstance(x, tf.Tensor))
    )
    forth = makers[0].make(
        lambda: function(argument), leaves, device, scope, types, determined
    )

    def differentiate(
        results: Sequence[tf.Tensor],
        tensors: Sequence[tf.Tensor],
        upstream: Sequence[Any],
    ) -> Any:
        def gradients() -> Any:
            return boundary.differentiated(results, tensors, upstream)

        above = boundary.tensors_of(upstream)
        if tf.compat.v1.get_default_graph() is not graph:
            return gradients()  # of a function, which is differentiated by ops
        if recorded():
            # For a gradient of gradients: no tape saw a copy being made.
            return (
                _again(gradients, [*tensors, *above])
                if forth.copied
                else gradients()
            )
        proven = makers[0].is_proven(forth)
        inner = [x for op in forth.ops for x in op.outputs]
        # Of what is there twice, the last counts: on the tower, and from above.
        sources = [*inner, *tensors, *leaves]
        names = [x.name for x in above]
        kind = (
            types,
            makers[0].fingerprint(forth),
            *(type(g).__name__ for g in upstream),
            *(names.index(name) for name in names),  # one may be there twice
        )
        back = makers[1].make(
            gradients,
            [*sources, *above],
            device,
            scope,
            kind,
            determined=proven,
            n_in_kind=len(sources) if proven else 0,
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
    nest = gradients()
    flat = boundary.tensors_of(nest)
    results = [x for x in flat if x.dtype.is_floating]

    @own_gradient
    def run(*_: tf.Tensor) -> Any:
        def backward(*upstream: Any) -> list[Any]:
            return _again(
                lambda: boundary.differentiated(results, tensors, upstream),
                [*tensors, *boundary.tensors_of(upstream)],
            )

        return [tf.identity(x) for x in results], backward

    copies = iter(run(*tensors))
    return tf.nest.map_structure(
        lambda x: next(copies) if x is not None and x.dtype.is_floating else x,
        nest,
        expand_composites=True,
    )
