"""values: where a tensor of a graph comes from, who takes it, where it ends."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from towers.foreign.tf_nodes import IN_A_ROW, full, op_of_kernel, port, source
from towers.report.graph_defs import COPY_NODES, copied
from towers.report.variables import VariableUse

READS = ("ReadVariableOp", "ResourceGather")
# What is still the same value, elsewhere, in other words or another shape.
_SAME = (
    *COPY_NODES,
    *("Cast", "Reshape", "EnsureShape", "ExpandDims", "Squeeze"),
    *("Switch", "PreventGradient", "CheckNumerics"),
)
# What makes of each element one of its own.
_BY_ELEMENT = frozenset(
    (
        *_SAME,
        *("Merge", "Exit"),
        *("AddN", "Add", "AddV2", "Sub", "Mul", "MulNoNan", "Neg", "RealDiv"),
        *("Div", "DivNoNan", "Square", "Sqrt", "Rsqrt", "Pow", "Abs", "Sign"),
        *("Maximum", "Minimum", "ClipByValue", "Select", "SelectV2"),
        *("Reciprocal", "Inv", IN_A_ROW, "AccumulateNV2"),
        *("UnsortedSegmentSum", "Unique", "ZerosLike", "Transpose"),
    )
)
# What a state of several towers is merged by, besides.
_MERGING = frozenset(
    (
        *("Pack", "Unpack", "StridedSlice", "Slice", "Sum", "Mean", "Max"),
        *("Min", "SquaredDifference", "MatMul", "Split"),
    )
)
_ASSIGNS = ("AssignVariable", "AssignAddVariable", "AssignSubVariable")
_APPLIES = ("ResourceApply", "ResourceSparseApply", "ResourceScatter")
# Which of how many in each of the tensors that a value was joined in.
Places = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class SizedVariable:
    """A variable, and how many elements it has."""

    use: VariableUse
    elements: int


class GraphValues:
    """The tensors of one graph.

    Args:
      nodes: its nodes.
      handles: by the names of nodes that are handles of variables, those.
    """

    def __init__(
        self, nodes: Iterable[Any], handles: Mapping[str, SizedVariable]
    ):
        self.nodes = {node.name: node for node in nodes}
        self._handles = handles
        self._takers: dict[str, list[tuple[Any, int]]] = {}
        for node in self.nodes.values():
            for k, tensor in enumerate(node.input):
                if not tensor.startswith("^"):
                    self._takers.setdefault(full(tensor), []).append((node, k))

    def node(self, tensor: str) -> Any:
        """What makes a tensor; None if it is not in this graph."""
        return self.nodes.get(source(tensor))

    def takers(self, tensor: str) -> list[tuple[Any, int]]:
        """Who takes a tensor, and as which input."""
        return self._takers.get(full(tensor), [])

    def origin(self, tensor: str) -> str:
        """Where a value was made, past copies and what it was joined in."""
        tensors = set()
        while tensor not in tensors:
            tensors.add(tensor)
            node = self.node(tensor)
            if node is None or not node.input:
                return full(tensor)
            if node.op == "SplitV":
                whole = self.node(self.origin(node.input[0]))
                joined = self.joined(whole)
                if len(joined) != node.attr["num_split"].i:
                    return full(tensor)
                tensor = joined[port(tensor)]
            elif node.op in _SAME:
                tensor = copied(node, tensor)
        return full(tensor)

    def joined(self, node: Any) -> list[str]:
        """What an op joins."""
        if node is None or node.op != "ConcatV2":
            return []
        return list(map(full, node.input[: node.attr["N"].i]))

    def read(self, tensor: str) -> SizedVariable | None:
        """The variable that a tensor is read of, if it is."""
        node = self.node(tensor)
        if node is None or node.op not in READS:
            return None
        return self.variable(node.input[0])

    def variable(self, handle: str) -> SizedVariable | None:
        """The variable that a handle is of."""
        return self._handles.get(source(self.origin(handle)))

    def taken_by(
        self, tensor: str, counts: Callable[[Any], bool]
    ) -> Iterator[Any]:
        """What takes a value, past copies and what it is joined in.

        Args:
          tensor: the value.
          counts: which of those that take it at once are meant.
        """
        start = full(tensor)
        ahead, tensors = [start], set()
        while ahead:
            now = ahead.pop()
            for node, k in self.takers(now):
                if now == start and not counts(node):
                    continue
                if node.op not in _SAME:
                    yield node
                if node.op not in (*_SAME, "ConcatV2"):
                    continue
                after = f"{node.name}:{k if node.op == 'IdentityN' else 0}"
                if after not in tensors:
                    tensors.add(after)
                    ahead.append(after)

    def assigned(
        self,
        tensor: str,
        places: Places,
        counts: Callable[[Any], bool],
        merging: bool,
    ) -> list[SizedVariable]:
        """The variables that a value goes into, element by element.

        Args:
          tensor: what it is in.
          places: where in there.
          counts: which takers of the tensor are meant.
          merging: whether it is a state, which is merged on its way.
        """
        variables: dict[int, SizedVariable] = {}
        start = full(tensor)
        ahead: list[tuple[str, Places]] = [(start, places)]
        tensors = set(ahead)
        while ahead:
            now, places = ahead.pop()
            for node, k in self.takers(now):
                if now == start and not counts(node):
                    continue
                for after in self._after(node, k, places, merging, variables):
                    if after not in tensors:
                        tensors.add(after)
                        ahead.append(after)
        return list(variables.values())

    def _after(
        self,
        node: Any,
        k: int,
        places: Places,
        merging: bool,
        variables: dict[int, SizedVariable],
    ) -> Iterator[tuple[str, Places]]:
        """Where a value goes on after an op that takes it as its input `k`."""
        op = op_of_kernel(node.op)
        if op.startswith((*_ASSIGNS, *_APPLIES)):
            yield from self._written(node, variables)
        elif op == "ConcatV2":
            count = node.attr["N"].i
            if k < count:
                yield f"{node.name}:0", ((k, count), *places)
        elif op == "SplitV":
            count = node.attr["num_split"].i
            inner = places and places[0][1] == count
            ports = [places[0][0]] if inner else range(count)
            for j in ports:
                yield f"{node.name}:{j}", places[1:] if inner else places
        elif op == "IdentityN":
            yield f"{node.name}:{k}", places
        elif op in _BY_ELEMENT or (merging and op in _MERGING):
            for j in range(_results(node)):
                yield f"{node.name}:{j}", places

    def _written(
        self, node: Any, variables: dict[int, SizedVariable]
    ) -> Iterator[tuple[str, Places]]:
        """Notes what an op writes, and goes on with who reads a slot."""
        some = op_of_kernel(node.op).startswith(_APPLIES)
        for handle in node.input if some else node.input[:1]:
            if handle.startswith("^"):
                continue
            held = self.variable(handle)
            if held is None or id(held) in variables:
                continue
            variables[id(held)] = held
            if held.use.kind == "slot":
                for reader, _ in self.takers(self.origin(handle)):
                    if reader.op in READS:
                        yield f"{reader.name}:0", ()


def _results(node: Any) -> int:
    """How many results an op has whose elements are those of its arguments."""
    return {
        "Switch": 2,
        "Unpack": node.attr["num"].i,
        "Split": node.attr["num_split"].i,
    }.get(node.op, 1)
