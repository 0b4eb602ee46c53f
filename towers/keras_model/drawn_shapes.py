"""drawn_shapes: which axes of what a model draws are rows, by a call of MANY.

As many rows as hardly any axis has, so that it shows in the shapes, where a tower
may take the number of its rows for a constant, which no op shows. Not more, as some
layers are loops over rows in Python, such as `RandomElasticTransform`; an axis that
has as many in a tower of other rows is none of rows.
"""

import dataclasses
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import tensorflow as tf

from towers.engine import all_towers
from towers.engine.draws import Place
from towers.foreign import keras_layers, tf_random
from towers.keras_model import checks, layer_graph, row_order
from towers.keras_model.attributes import as_before
from towers.keras_model.calls import ModelCall
from towers.keras_model.replay import replayed
from towers.keras_model.request import Request

# A layer's path, the kind of its draw, and which one of those it is.
Key = tuple[str, str, int]
MANY = 61  # a prime
STATEFUL = "op"  # the kind of all ops with a state


@dataclasses.dataclass(frozen=True)
class Drawn:
    """What is drawn of MANY rows.

    Attributes:
      axes: those with rows; None if that is not known.
      of_row: so many in the first of them for each row.
      by_row: whether a loop over rows draws it.
      joined: whether these are of several views of the batch, one after another.
      shape: all of it, as far as it is known.
    """

    axes: tuple[int, ...] | None
    of_row: int = 1
    by_row: bool = False
    joined: bool = False
    shape: tuple[int | None, ...] | None = None

    @property
    def is_one(self) -> bool:
        """Whether it is one for the whole batch."""
        return self.axes == () and not self.by_row

    @property
    def is_once(self) -> bool:
        """Whether it is drawn once, with rows in order in one of its axes."""
        return len(self.axes or ()) == 1 and not (self.by_row or self.joined)

    @property
    def axis(self) -> int:
        """The first with rows."""
        return self.axes[0] if self.axes else 0

    @property
    def why_own(self) -> str:
        """Why a tower cannot have its rows of it, for a sentence."""
        if self.axes is None:
            return "of a size that its data tells"
        if self.by_row:
            return "in a loop over rows"
        if self.joined:
            return "for several views of a batch, joined"
        if len(self.axes) > 1:
            return "for pairs of rows"
        return "that XLA cannot count, or that depend on other rows"

    @staticmethod
    def of(tensors: Iterable[tf.Tensor]) -> "Drawn":
        """What an op has drawn; several, if it was made again in a loop's place."""
        each = [Drawn._of(x) for x in tensors]
        with_rows = [x for x in each if x.axes != () or x.by_row]
        return next(iter([*with_rows, *each]), Drawn(None))

    @staticmethod
    def _of(tensor: tf.Tensor) -> "Drawn":
        shape = tensor.shape
        by_row = any(
            _counts_rows(op, condition)
            for op, condition in tf_random.loops_around(tensor.graph)
        )
        if shape.rank is None or None in shape:
            sizes = None if shape.rank is None else tuple(shape)
            return Drawn(None, 1, by_row, shape=sizes)
        axes = tuple(a for a, n in enumerate(shape) if n and _is_rows(n))
        of_row = shape[axes[0]] // MANY if axes else 1
        joined = of_row > 1 and (
            axes[0] > 0 or row_order.is_for_joined(tensor, MANY)
        )
        return Drawn(axes, of_row, by_row, joined, tuple(shape))

    def of_tower(
        self, sizes: Sequence[int | None] | None, rows: Any
    ) -> "Drawn":
        """What it is of for a tower, which has axes in common that are no rows'.

        Args:
          sizes: of what that draws, as far as they are known.
          rows: the tower's, an int if they are known.
        """
        if not (self.axes and self.shape and sizes):
            return self
        if isinstance(rows, int) and rows == MANY:
            return self
        axes = tuple(a for a in self.axes if sizes[a] != self.shape[a])
        if axes == self.axes:
            return self
        of_row = (self.shape[axes[0]] or MANY) // MANY if axes else 1
        return dataclasses.replace(self, axes=axes, of_row=of_row)

    def fits(
        self, sizes: Sequence[int | None], rows: Any, is_filled: bool
    ) -> bool:
        """Whether a tower may draw this of such sizes, some of them unknown.

        Args:
          sizes: what it draws.
          rows: the tower's, an int if they are known.
          is_filled: whether it is given other axes of unknown size.
        """
        if self.shape is None:
            return True
        if len(sizes) != len(self.shape):
            return False
        if self.axes == () and None in sizes and not is_filled:
            return False
        for a, (n, m) in enumerate(zip(sizes, self.shape)):
            if n is None or m is None:
                continue
            if a not in (self.axes or ()):
                if n != m:
                    return False
            elif isinstance(rows, int) and n != rows * (m // MANY):
                return False
        return True


def _is_rows(n: Any) -> bool:
    return n > 0 and n % MANY == 0


def _counts_rows(loop: tf.Operation, condition: Any) -> bool:
    """Whether a loop is one over MANY rows, by the numbers that it goes by."""
    inside = [x for op in condition.get_operations() for x in op.outputs]
    return any(
        _is_rows(number)
        for x in [*loop.inputs, *inside]
        for number in _numbers(x)
    )


def _numbers(count: tf.Tensor) -> Iterator[int]:
    """A whole number that is known, or those that it is made of."""
    todo, seen = [count], set[int]()
    while todo:
        x = todo.pop()
        if id(x) in seen or not (x.dtype.is_integer and x.shape.rank == 0):
            continue
        seen.add(id(x))
        value = tf.get_static_value(x)
        if value is None and x.op.type == "StridedSlice":  # of a shape
            shape, begin = map(tf.get_static_value, x.op.inputs[:2])
            if shape is not None and begin is not None:
                value = shape[tuple(begin)]
        if value is None:
            todo += tf_random.taken(x)
        else:
            yield int(value)


@dataclasses.dataclass(frozen=True)
class Model:
    """What a model draws.

    Attributes:
      shapes: what each draw is of.
      apart: generators, by variable, by which a `tf.function`, a SavedModel or an
        op of `tf.raw_ops` draws.
      counts: how many draws there are, by a layer's path and their kind.
    """

    shapes: Mapping[Key, Drawn]
    apart: frozenset[int]
    counts: Mapping[Any, int]


class Open:
    """Notes what a model draws, in a graph that is never run."""

    # Of a batch whose rows, and their number, nobody knows.
    place = Place(0, 0, MANY, None)

    def __init__(self) -> None:
        self.root = tf.compat.v1.get_default_graph()
        self.counts: Counter[Any] = Counter()
        self._stateless: dict[Key, tf.Tensor] = {}
        self._stateful: list[tuple[Key, Any]] = []

    def again(self, counts: Counter[Any]) -> "Open":
        """What notes nothing more: a backward pass, which nobody asks for."""
        return Open()

    def seeds(self, path: str, get_seed: Any, op_seed: Any) -> tuple[int, int]:
        graph = tf.compat.v1.get_default_graph()
        self._stateful.append((key_of(self.counts, path, STATEFUL), graph))
        return MANY, len(self._stateful)

    def drawn(
        self, path: str, name: str, by: str, original: Any, given: Any
    ) -> tf.Tensor:
        result = original(**given)
        tf_random.mark_seen(result)
        self._stateless[key_of(self.counts, path, name)] = result
        return result

    def state(self, path: str, value: tf.Tensor) -> tf.Tensor:
        return value

    def shapes(self) -> dict[Key, Drawn]:
        """By draw; to be asked when all is made."""
        made: dict[tuple[int, int], list[tf.Tensor]] = {}
        graphs = {id(graph): graph for _, graph in self._stateful}
        for k, graph in graphs.items():
            for op in graph.get_operations():
                # Of what a sampler returns besides, some is of the rows.
                if tf_random.is_seeded(op):
                    number = k, op.get_attr("seed2")
                    made.setdefault(number, []).append(op.outputs[-1])
        of_ops = {
            key: Drawn.of(made.get((id(graph), i + 1), ()))
            for i, (key, graph) in enumerate(self._stateful)
        }
        others = {key: Drawn.of([x]) for key, x in self._stateless.items()}
        return {**of_ops, **others}

    def apart(self, states: Mapping[int, tf.Tensor]) -> frozenset[int]:
        """Generators, by variable, by which something is drawn past `drawn`.

        Args:
          states: theirs, as the model was given them.
        """
        names = {(id(x.graph), x.name): i for i, x in states.items()}
        return frozenset(
            names[name]
            for op in self.root.get_operations()
            if tf_random.draws_unseen(op)
            for given in op.inputs
            for x in tf_random.sources(given, names)
            if (name := (id(x.graph), x.name)) in names
        )


def key_of(counts: Counter[Any], path: str, kind: str) -> Key:
    counts[path, kind] += 1
    return path, kind, counts[path, kind]


# What is asked once: by a model, or a function of the user's, all the rest.
_kept: weakref.WeakKeyDictionary[Any, dict[Any, Model | None]] = (
    weakref.WeakKeyDictionary()
)


def of_many_rows(
    graph: layer_graph.LayerGraph,
    copies: Sequence[tf.Tensor],
    shard: Any,
    divided: Sequence[bool],
    request: Request,
    tower_fn: Callable[..., Any] | None,
    anew: bool = False,
) -> Model | None:
    """What is drawn; None if the model cannot say. It is asked once.

    Args:
      graph, copies, shard, divided, request, tower_fn: as for `_asked`.
      anew: whether what was said before does not do.
    """
    call = request.tower_fn
    models = tuple(weakref.ref(m) for m in graph.models)
    kind = str(call.kind) if isinstance(call, ModelCall) else ""
    specs = str(row_order.specs_of(shard, divided, MANY))
    variables = tuple(v.path for v in graph.variables)
    key = models, variables, kind, specs, request.training
    try:
        kept = _kept.setdefault(request.users_fn or graph.models[0], {})
    except TypeError:  # a function of which there are no weak references
        kept = {}
    if anew or key not in kept:
        kept[key] = _asked(graph, copies, shard, divided, request, tower_fn)
    return kept[key]


def _asked(
    graph: layer_graph.LayerGraph,
    copies: Sequence[tf.Tensor],
    shard: Any,
    divided: Sequence[bool],
    request: Request,
    tower_fn: Callable[..., Any] | None,
) -> Model | None:
    """What is drawn; None if the model cannot say.

    The model is called once more, in a graph that is never run.

    Args:
      graph: names the variables; `hooked`.
      copies, shard: what a tower is given.
      divided: for each leaf whether it is of the tower's rows, or whole.
      request: tells the phase.
      tower_fn: what the tower calls, of the request, as it is called there.
    """
    told: list[Model] = []

    def call(copies: list[tf.Tensor], shard: Any) -> None:
        drawn = Open()
        replayed(
            *(graph, copies, shard, request.training, "drawn/"),
            *(tower_fn, 0, drawn),
        )
        states = {i: copies[i] for i in graph.seeds}
        told.append(Model(drawn.shapes(), drawn.apart(states), drawn.counts))

    many = row_order.specs_of(shard, divided, MANY)

    def traced() -> None:
        with (
            all_towers.alone(),
            as_before(graph.layers),
            tf_random.nothing_drawn(),
        ):
            for layer in graph.layers:  # in the middle of whose call it may be
                keras_layers.forget_added(layer)
            tf.function(call, autograph=False).get_concrete_function(
                graph.specs_of(copies, MANY), many
            )

    try:
        checks.eagerly(traced)  # in a thread, where no layer is being called
    except Exception:  # whatever the user's layers raise
        return None
    return told[-1]
