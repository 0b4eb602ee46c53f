"""sent_kinds: what it is that crosses, by its kind, its layer and its variable."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from towers.foreign import tf_nodes
from towers.placement.device_names import short
from towers.placement.scopes import is_backward, layer_of, tower_of
from towers.report.parts import Part, merged_parts, summed_parts
from towers.report.values import GraphValues, Places, SizedVariable

_PICKS = ("StridedSlice", "Slice", "GatherV2", "Split", "SplitV")
_GIVEN = (*tf_nodes.ARGUMENTS, "IteratorGetNext", "Placeholder", "Const")
_VERBS = re.compile(
    r"(?:^|/)(split|replicate|gather|merge_state|merge_moments|all_towers)"
    r"(?:_\d+)?(?=/)"
)
_HOST = "host/"  # of a tower, see `engine/host`
_SHARED = "what all towers share"
_MANY = 100  # steps back to the batch


class _Sent(NamedTuple):
    """A tensor, and which of its takers it is sent to."""

    tensor: str
    counts: Callable[[Any], bool]


class Kinds:
    """What the tensors of one placed graph are.

    Args:
      nodes: all of it, before it was cut.
      handles: by the names of nodes that are handles of variables, those.
      variables: more, that a gradient may be of which is assigned nowhere here.
      backward: whether this is a backward pass alone, which takes no batch.
    """

    def __init__(
        self,
        nodes: Iterable[Any],
        handles: Mapping[str, SizedVariable],
        variables: Iterable[SizedVariable] = (),
        backward: bool = False,
    ):
        self._values = GraphValues(nodes, handles)
        self._variables = list(
            {id(h): h for h in (*variables, *handles.values())}.values()
        )
        self._backward = backward
        self._short = functools.cache(short)

    def pieces(self, tensor: str) -> list[str]:
        """What was joined for its way in a tensor, or just that."""
        return [piece for piece, _ in self._pieces(tensor)]

    def _pieces(self, tensor: str) -> list[tuple[str, Places]]:
        """The same, and where in the tensor each is."""
        node = self._values.node(self._values.origin(tensor))
        joined = self._values.joined(node)
        if not joined or _layer(node.name):
            return [(tensor, ())]
        return [
            (piece, ((k, len(joined)), *places))
            for k, each in enumerate(joined)
            for piece, places in self._pieces(each)
        ]

    def parts(
        self, transfer: Any, shapes: Mapping[str, tuple[int, ...]]
    ) -> tuple[Part, ...]:
        """What a transfer holds: parts that have all of its bytes.

        Args:
          transfer: one of this graph.
          shapes: those of `pieces` that are known.
        """
        sent = _Sent(
            transfer.tensor,
            lambda node: self._short(node.device) == transfer.target,
        )
        pieces = self._pieces(transfer.tensor)
        own = [
            self._part(sent, piece, places, shapes.get(piece))
            for piece, places in pieces
        ]
        sizes = [
            dataclasses.replace(transfer, shape=shapes.get(piece)).bytes
            for piece, _ in pieces
        ]
        if len(own) == 1:
            return (dataclasses.replace(own[0], bytes=transfer.bytes),)
        counts = [size for size in sizes if size is not None]
        if len(counts) == len(own) and sum(counts) == transfer.bytes:
            return summed_parts(own, counts)
        return (merged_parts(own, transfer.bytes),)

    def _part(
        self,
        sent: _Sent,
        piece: str,
        places: Places,
        shape: tuple[int, ...] | None,
    ) -> Part:
        """What one value is that crosses."""
        origin = self._values.origin(piece)
        node = self._values.node(origin)
        if node is None or piece.startswith("^"):
            return Part("rest")
        held = self._values.read(origin)
        if held is not None and node.op == "ReadVariableOp":
            trained = held.use.kind == "parameter"
            return self._of_variables(
                "parameters" if trained else "state", [held]
            )
        if not self._tops:
            is_batch = self._splits and self._is_given(origin)
            return Part("batch" if is_batch else "rest")
        takers = list(self._values.taken_by(*sent))
        verbs = {_verb(taker.name) for taker in takers}
        return (
            self._of_verb(node, origin, {_verb(piece), *verbs})
            or self._within(node, takers)
            or self._changed(sent, places, shape, verbs)
            or self._leaving(node, takers, shape)
        )

    def _of_verb(self, node: Any, origin: str, verbs: set[str]) -> Part | None:
        """What a value is by the verbs that make and take it."""
        layer, back = self._layer(node.name), is_backward(node.name)
        if not tower_of(node.name) and not back and self._is_given(origin):
            return Part("batch")
        if _verb(node.name) == "gather":
            return Part("output gradients" if back else "outputs")
        if "all_towers" in (_verb(node.name), *verbs):
            return Part("rest", layer, _SHARED)
        if "gather" in verbs and not back:
            return Part("outputs", layer)
        return None

    def _changed(
        self,
        sent: _Sent,
        places: Places,
        shape: tuple[int, ...] | None,
        verbs: set[str],
    ) -> Part | None:
        """What changes variables: a gradient, or a state."""
        merging = bool(verbs & {"merge_state", "merge_moments"})
        held = self._values.assigned(sent.tensor, places, sent.counts, merging)
        trained = [h for h in held if h.use.kind == "parameter"]
        if trained and not merging:
            return self._of_variables("gradients", _like(trained, shape))
        state = [h for h in held if h.use.kind == "state"]
        if state or merging:
            return self._of_variables("state", state)
        return None

    def _within(self, node: Any, takers: Sequence[Any]) -> Part | None:
        """What goes from one part of a tower to another, which is elsewhere."""
        tower, same = tower_of(node.name), [tower_of(t.name) for t in takers]
        if tower is None or not same or _HOST in node.name:
            return None
        if not all(other and other[0] == tower[0] for other in same):
            return None
        back = is_backward(node.name)
        return Part(
            "activation gradients" if back else "activations",
            self._layer(node.name),
        )

    def _leaving(
        self, node: Any, takers: Sequence[Any], shape: tuple[int, ...] | None
    ) -> Part:
        """What leaves a tower past the verbs, and changes no variable here."""
        layer = self._layer(node.name)
        if not tower_of(node.name) or not takers or _HOST in node.name:
            return Part("rest", layer)
        if is_backward(node.name):
            return self._gradient(node, layer, takers, shape)
        returned = any(taker.op in tf_nodes.RESULTS for taker in takers)
        return Part("outputs" if returned else "rest", layer)

    def _gradient(
        self,
        node: Any,
        layer: str,
        takers: Sequence[Any],
        shape: tuple[int, ...] | None,
    ) -> Part:
        """A gradient that leaves its tower, and changes nothing in this graph.

        Those of parameters are summed, those of a batch have rows of their own.
        """
        every = [h for h in self._variables if h.use.kind == "parameter"]
        own = [
            h for h in every if f"{self._path(h)[0]}/".startswith(f"{layer}/")
        ]
        sparse = "Gather" in node.name
        like = own if sparse else _like(own, shape, strictly=True)
        joined = any(taker.op == "ConcatV2" for taker in takers)
        if joined and not sparse and len(like) != 1:
            return Part("batch gradients", layer)
        if len(like) == 1:
            return self._of_variables("gradients", like)
        names = " or ".join(self._path(h)[1] for h in like)
        return Part("gradients", layer, names)

    def _of_variables(self, kind: str, held: Sequence[SizedVariable]) -> Part:
        paths = [self._path(h) for h in held]
        layers = dict.fromkeys(layer for layer, _ in paths)
        return Part(
            kind,
            next(iter(layers)) if len(layers) == 1 else "",
            ", ".join(dict.fromkeys(name for _, name in paths)),
        )

    def _path(self, held: SizedVariable) -> tuple[str, str]:
        """The layer of a variable, and its name from the model's top on.

        A model may give its own name to what it holds, its tower does not.
        """
        parts = held.use.path.split("/")
        tops = (k for k in range(len(parts) - 1) if parts[k] in self._tops)
        first = next(tops, 0)
        return "/".join(parts[first:-1]), "/".join(parts[first:])

    def _layer(self, name: str) -> str:
        """The layer that an op of a tower is of, past what the layer calls inside."""
        parts = _layer(name).split("/")
        for end in range(len(parts), 0, -1):
            if "/".join(parts[:end]) in self._holding:
                return "/".join(parts[:end])
        above = any(x.startswith(f"{parts[0]}/") for x in self._holding)
        return "/".join(parts[: 1 + above])

    @functools.cached_property
    def _holding(self) -> set[str]:
        """The layers that have variables."""
        return {self._path(held)[0] for held in self._variables}

    @functools.cached_property
    def _tops(self) -> set[str]:
        """What stands at the top of the towers' models."""
        names = filter(tower_of, self._values.nodes)
        return {_layer(name).split("/")[0] for name in names}

    @functools.cached_property
    def _splits(self) -> bool:
        """Whether a batch is split, maybe before the step that takes it."""
        # A `tf.split` has a name of its own, and a constant in that.
        return any(
            _verb(name) == "split" and node.op != "Const"
            for name, node in self._values.nodes.items()
        )

    def _is_given(self, origin: str) -> bool:
        """Whether a value is of the batch, or rows of it."""
        for _ in range(_MANY):
            node = self._values.node(origin)
            if node is None or self._backward:
                return False
            if node.op in _GIVEN or _verb(node.name) == "split":
                return True
            if node.op not in _PICKS:
                return False
            at = 1 if node.op == "Split" else 0
            origin = self._values.origin(node.input[at])
        return False


def _layer(name: str) -> str:
    """The path of the layer that an op of a tower is of."""
    tower = tower_of(name)
    return layer_of(tower[1]) if tower else ""


def _verb(name: str) -> str:
    """The verb of towers that an op belongs to; "" for others."""
    verbs = _VERBS.findall(name)
    return verbs[-1] if verbs and not tower_of(name) else ""


def _like(
    held: Iterable[SizedVariable],
    shape: tuple[int, ...] | None,
    strictly: bool = False,
) -> list[SizedVariable]:
    """Variables of as many elements; if none is, all, or none if strictly."""
    every = list(held)
    if shape is None:
        return [] if strictly else every
    same = [h for h in every if h.elements == math.prod(shape)]
    return same if same or strictly else every
