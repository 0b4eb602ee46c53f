"""draw_look: what a model draws, looked at once in a call of MANY rows.

The call is made in a graph that is never run, and leaves no trace in the layers.
"""

import dataclasses
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tensorflow as tf

from towers.engine.draws import Place
from towers.foreign import tf_random_graphs
from towers.foreign.tf_ancestry import identity
from towers.keras_model.drawn_shapes import (
    BY_ROW,
    MANY,
    STATEFUL,
    DrawShape,
    Key,
    key_of,
)
from towers.keras_model.findings import Findings
from towers.keras_model.rehearsal import Rehearsal


@dataclasses.dataclass(frozen=True)
class Model:
    """What a model draws.

    Attributes:
      shapes: what each draw is of.
      apart: generators, by variable, by which a `tf.function`, a SavedModel or an
        op of `tf.raw_ops` draws.
      counts: how many draws there are, by a layer's path and their kind.
    """

    shapes: Mapping[Key, DrawShape]
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
        """Notes for a backward pass, which nobody reads."""
        return Open()

    def seeds(self, path: str, get_seed: Any, op_seed: Any) -> tuple[int, int]:
        graph = tf.compat.v1.get_default_graph()
        self._stateful.append((key_of(self.counts, path, STATEFUL), graph))
        return MANY, len(self._stateful)

    def drawn(
        self, path: str, name: str, by: str, original: Any, arguments: Any
    ) -> tf.Tensor:
        result = original(**arguments)
        tf_random_graphs.mark_seen(result)
        self._stateless[key_of(self.counts, path, name)] = result
        return result

    def state(self, path: str, value: tf.Tensor) -> tf.Tensor:
        return value

    def shapes(self) -> dict[Key, DrawShape]:
        """By draw; to be asked when all is made."""
        outputs: dict[tuple[int, int], list[tf.Tensor]] = {}
        graphs = {id(graph): graph for _, graph in self._stateful}
        for k, graph in graphs.items():
            for op in graph.get_operations():
                # Of what a sampler returns besides, some is of the rows.
                if tf_random_graphs.is_seeded(op):
                    number = k, op.get_attr("seed2")
                    outputs.setdefault(number, []).append(op.outputs[-1])
        of_ops = {
            key: DrawShape.of(outputs.get((id(graph), i + 1), ()))
            for i, (key, graph) in enumerate(self._stateful)
        }
        others = {key: DrawShape.of([x]) for key, x in self._stateless.items()}
        return {
            (path, kind, k): drawn.made_each(self.counts[path, kind])
            for (path, kind, k), drawn in {**of_ops, **others}.items()
        }

    def apart(self, states: Mapping[int, tf.Tensor]) -> frozenset[int]:
        """Generators, by variable, by which something is drawn past `drawn`.

        Args:
          states: theirs, as the model was given them.
        """
        names = {identity(x): i for i, x in states.items()}
        return frozenset(
            names[name]
            for op in self.root.get_operations()
            if tf_random_graphs.draws_unseen(op)
            for argument in op.inputs
            for x in tf_random_graphs.sources(argument, names)
            if (name := identity(x)) in names
        )


_FINDINGS: Findings[Model | None] = Findings()


def of_many_rows(rehearsal: Rehearsal, anew: bool = False) -> Model | None:
    """What is drawn; None if the model cannot say. It is asked once.

    Args:
      rehearsal: of a tower's call, whose graph is `hooked`.
      anew: whether what was said before does not do.
    """
    return _FINDINGS.of(
        *(rehearsal.graph, rehearsal.request, str(rehearsal.specs(MANY))),
        *(lambda: _rehearsed(rehearsal), anew),
    )


def _rehearsed(rehearsal: Rehearsal) -> Model | None:
    """What is drawn; None if the model cannot say."""
    models: list[Model] = []

    def call(copies: list[tf.Tensor], shard: Any) -> None:
        drawn = Open()
        rehearsal.replay(copies, shard, "drawn/", draws=drawn)
        states = {i: copies[i] for i in rehearsal.graph.seeds}
        models.append(Model(drawn.shapes(), drawn.apart(states), drawn.counts))

    try:
        rehearsal.run(call, MANY)
    except Exception:  # whatever the user's layers raise
        return None
    return models[-1]


class Look:
    """What all towers of a model know of its draws.

    Args:
      look: `f(tower_fn, anew)` to what `of_many_rows` tells of the towers'
        function, when a tower draws by such a seed first.
      is_compiled: whether XLA compiles the towers.
      is_only: whether there is but one tower.

    Attributes:
      first: the seeds that ops have in the first tower.
      seeds: all those that ops were given.
    """

    def __init__(
        self,
        look: Callable[[Any, bool], Model | None],
        is_compiled: bool,
        is_only: bool,
    ):
        self._look, self.is_compiled = look, is_compiled
        self.is_only = is_only
        self._models: list[Model | None] = []
        self._is_new = False
        self.first: dict[Key, tuple[int, int]] = {}
        self.seeds: set[tuple[int, int]] = set()

    def at(
        self,
        key: Key,
        sizes: Sequence[int | None] | None,
        rows: Any,
        is_filled: bool,
        tower_fn: Callable[..., Any] | None,
    ) -> DrawShape:
        """What one draw is of; as if of rows, if the model cannot say.

        Args:
          key: which one.
          sizes, rows, is_filled: of the tower, as for `DrawShape.fits`.
          tower_fn: what the tower calls.
        """
        model = self._of(key[0], tower_fn)
        drawn = model.shapes.get(key) if model else None
        drawn = drawn and drawn.of_tower(sizes, rows)
        if drawn and (sizes is None or drawn.fits(sizes, rows, is_filled)):
            return drawn
        if model and not self._is_new:  # it has changed since
            self._models, self._is_new = [self._look(tower_fn, True)], True
            return self.at(key, sizes, rows, is_filled, tower_fn)
        return DrawShape(None)

    def is_known_to_be_one(
        self, key: Key, tower_fn: Callable[..., Any] | None
    ) -> bool:
        """Whether a draw is one for the whole batch, as far as anybody knows."""
        model = self._model(tower_fn)
        drawn = model.shapes.get(key) if model else None
        return drawn is not None and drawn.is_one

    def check_counts(self, counts: Mapping[Any, int]) -> None:
        """Warns of layers that draw more or less often in towers of other rows."""
        model = self._models[0] if self._models else None
        expected = model.counts if model else counts
        for path, kind in sorted(counts):
            if expected.get((path, kind)) != counts[path, kind]:
                warn_of_own(path, BY_ROW)

    def is_apart(
        self, path: str, seed: int, tower_fn: Callable[..., Any] | None
    ) -> bool:
        """Whether something draws by a generator past the tower's draws."""
        model = self._of(path, tower_fn)
        if model is not None and seed in model.apart:
            warn_of_own(
                path,
                "in a `tf.function`, a SavedModel or an op of `tf.raw_ops`",
            )
        return model is None or seed in model.apart

    def _of(
        self, path: str, tower_fn: Callable[..., Any] | None
    ) -> Model | None:
        model = self._model(tower_fn)
        if model is None:
            warnings.warn(
                f"{layer_named(path)} draws random numbers by a seed, and the model "
                "cannot be called with another number of rows to see whether "
                "these are of rows: each tower draws its own, also where one "
                "number is meant for the whole batch. Expected a model that "
                "takes any number of rows.",
                stacklevel=2,
            )
        return model

    def _model(self, tower_fn: Callable[..., Any] | None) -> Model | None:
        if not self._models:
            self._models.append(self._look(tower_fn, False))
        return self._models[0]


def warn_of_own(path: str, how: str) -> None:
    """Warns of numbers that are not the plain model's."""
    warnings.warn(
        f"{layer_named(path)} draws random numbers {how}: each tower has a stream of "
        "its own there, not its rows of what the plain model draws. "
        "`keras.random` and `tf.random.stateless_*`, with a number or a "
        "`keras.random.SeedGenerator` for a seed and the shape of the rows, have "
        "those.",
        stacklevel=2,
    )


def layer_named(path: str) -> str:
    return f"The layer {path!r}" if path else "The model"
