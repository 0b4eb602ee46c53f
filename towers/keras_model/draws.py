"""draws: what a tower draws by seeds that are the same in all towers.

Where it has rows it is the tower's: its rows of what the plain model would draw,
by a stateless op, else of a stream of its own. Where it has none it is one for
all towers, as it is one for the batch.
"""

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from towers.engine import boundary
from towers.engine.draws import Place, own_key, own_seed, rows_of_whole
from towers.foreign import tf_random
from towers.keras_model.drawn_shapes import STATEFUL, Drawn, Key, key_of


class Look:
    """What all towers of a model know of its draws.

    Args:
      look: what `of_many_rows` tells of the towers' function, when a tower draws
        by such a seed first.
      is_compiled: whether XLA compiles the towers.

    Attributes:
      first: the seeds that ops have in the first tower.
      given: all those that ops were given.
    """

    def __init__(
        self, look: Callable[[Any], dict[Key, Drawn] | None], is_compiled: bool
    ):
        self._look, self.is_compiled = look, is_compiled
        self._seen: list[dict[Key, Drawn] | None] = []
        self.first: dict[Key, tuple[int, int]] = {}
        self.given: set[tuple[int, int]] = set()

    def at(self, key: Key, tower_fn: Callable[..., Any] | None) -> Drawn:
        """What one draw is of; as if of rows, if the model cannot say."""
        drawn = self._of(tower_fn)
        if drawn is None:
            warnings.warn(
                f"{_layer(key[0])} draws random numbers by a seed, and the model "
                "cannot be called with another number of rows to see whether "
                "these are of rows: each tower draws its own, also where one "
                "number is meant for the whole batch. "
                "`seed=keras.random.SeedGenerator(...)`, kept by a layer, does "
                "without that.",
                stacklevel=2,
            )
        return (drawn or {}).get(key, Drawn(None))

    def _of(self, tower_fn: Callable[..., Any] | None) -> Any:
        if not self._seen:
            self._seen.append(self._look(tower_fn))
        return self._seen[0]


class Own:
    """The draws of one tower.

    Args:
      place: where its rows are.
      look: what all towers know.
      tower_fn: what it calls.

    Attributes:
      place: the tower's.
      root: its graph.
      counts: of the draws so far.
      rows: those that are cut from the batch's, with the axis of their rows, and
        how many there are for each of the tower's.
    """

    def __init__(
        self, place: Place, look: Look, tower_fn: Callable[..., Any] | None
    ):
        self.place, self._look, self._tower_fn = place, look, tower_fn
        self._apart: set[Any] = set()
        self.root = tf.compat.v1.get_default_graph()
        self._before = len(self.root.get_operations())
        self.counts: Counter[Any] = Counter()
        self.rows: list[tuple[tf.Tensor, int, int]] = []

    def set_apart(
        self, seeds: Sequence[tf.Tensor], shard: Any, divided: Sequence[bool]
    ) -> None:
        """Names what is another tower's for another tower.

        Args:
          seeds: states of generators, which are each tower's own.
          shard: the tower's inputs.
          divided: for each leaf whether it is of the tower's rows, or whole.
        """
        rows = boundary.own_rows(shard, divided)
        self._apart = {(id(x.graph), x.name) for x in [*seeds, *rows]}

    @property
    def operations(self) -> list[tf.Operation]:
        """What the tower's graph has since its draws began."""
        return self.root.get_operations()[self._before :]

    def _at(self, key: Key) -> Drawn:
        return self._look.at(key, self._tower_fn)

    def again(self, counts: Counter[Any]) -> "Own":
        """The same draws, from where so many are done, made once more."""
        own = copy.copy(self)
        own.counts = Counter(counts)
        own.root = tf.compat.v1.get_default_graph()
        return own

    def seeds(self, path: str, get_seed: Any, op_seed: Any) -> Any:
        """The seeds of an op with a state."""
        key, seeds = key_of(self.counts, path, STATEFUL), get_seed(op_seed)
        if seeds == (None, None):
            return seeds
        seeds = self._look.first.setdefault(key, seeds)
        if not self._at(key).is_one:
            seeds = own_seed(seeds, tf_random.MOST, self.place)
        elif self._look.is_compiled:
            warnings.warn(
                f"{_layer(path)} draws by an op with a seed what has no rows, one "
                "number for the whole batch. XLA does not go by such seeds, so "
                "with `jit_compile=True` each tower draws its own. Use a "
                "function of `tf.random.stateless_*` or `keras.random`.",
                stacklevel=2,
            )
        self._look.given.add(seeds)
        return seeds

    def drawn(
        self, path: str, name: str, by: str, original: Any, given: Any
    ) -> tf.Tensor:
        """What a stateless function draws.

        Args:
          path: the layer's.
          name: the function's.
          by: the argument that seeds it.
          original: the function.
          given: its arguments.
        """
        key = key_of(self.counts, path, name)
        seed = tf.convert_to_tensor(given[by])
        constant = True
        for x in tf_random.sources(seed):
            if (id(x.graph), x.name) in self._apart:
                return original(**given)
            constant &= bool(x.op.inputs) or x.op.type == "Const"
        drawn = self._at(key)
        if drawn.is_one or (drawn.axes == () and constant):
            return original(**given)
        if drawn.axes and drawn.is_once and tf_random.is_by_shape(name, given):
            result = rows_of_whole(
                lambda shape: original(**{**given, "shape": shape}),
                tf.convert_to_tensor(given["shape"]),
                *(drawn.axes[0], drawn.of_row, self.place),
            )
            self.rows.append((result, drawn.axes[0], drawn.of_row))
        else:
            result = original(**{**given, by: own_key(seed, self.place)})
        tf_random.mark(result)  # no copy of this tower has the same
        return result

    def check(self, scope: str) -> None:
        """Warns of draws by seeds that were made past this, by their layers.

        Args:
          scope: of the tower, with its slash.
        """
        # Not those that it makes for all towers.
        ops = [op for op in self.operations if op.name.startswith(scope)]
        given = None if self._look.is_compiled else self._look.given
        for name in tf_random.missed(ops, given):
            path = name.removeprefix(scope).rpartition("/")[0]
            warnings.warn(
                f"{_layer(path)} draws random numbers by a constant seed in a "
                "`tf.function`, a SavedModel or an op of `tf.raw_ops` (by "
                f"{name!r}): all towers draw the same there, so rows of one have "
                "the numbers of another's. Draw outside of it, or by a "
                "`keras.random.SeedGenerator` that a layer keeps.",
                stacklevel=2,
            )


def _layer(path: str) -> str:
    return f"The layer {path!r}" if path else "The model"
