"""tower_draws: what a tower draws by seeds that are the same in all towers.

Where it has rows it is the tower's: its rows of what the plain model would draw,
by a stateless op, else of a stream of its own. Where it has none it is one for
all towers, as it is one for the batch.
"""

import contextlib
import copy
import secrets
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tensorflow as tf

from towers.engine.draws import (
    Draw,
    Layout,
    Place,
    can_count,
    has_split_pairs,
    located,
    own_key,
    own_seed,
    place_of,
    rows_by_counter,
    rows_of_whole,
)
from towers.engine.host import device_here, on_host
from towers.foreign import tf_random, tf_random_graphs
from towers.foreign.tf_ancestry import identity
from towers.keras_model.draw_look import Look, layer_named, warn_of_own
from towers.keras_model.drawn_shapes import STATEFUL, DrawShape, Key, key_of
from towers.keras_model.sources import Sources


class Own:
    """The draws of one tower.

    Args:
      place: where its rows are.
      sources: what it is given; where its rows are too, if copies of the tower are
        to have theirs.
      seeds: the places of generators' states among the variables.
      look: what all towers know.
      tower_fn: what it calls.

    Attributes:
      place: the tower's.
      root: its graph.
      counts: of the draws so far.
      rows: those that are of its rows, with the axis of those, and how many there
        are for each of the tower's.
    """

    def __init__(
        self,
        place: Place,
        sources: Sources,
        seeds: Sequence[int],
        look: Look,
        tower_fn: Callable[..., Any] | None,
    ):
        self.place, self._look, self._tower_fn = place, look, tower_fn
        self.root = tf.compat.v1.get_default_graph()
        self._before = len(self.root.get_operations())
        self._located, rows = sources.located, sources.rows
        self._where = place
        if sources.located is not None:
            self._where = place_of(sources.located)
        self._of_rows = {identity(x) for x in rows}
        self._states = {identity(sources.copies[i]): i for i in seeds}
        self._streams: dict[int, tf.Tensor] = {}
        self._is_open = all(None in x.shape[:1] for x in rows)
        self._is_filled = any(
            x.shape.rank is None or None in x.shape[1:] for x in rows
        )
        self.counts: Counter[Any] = Counter()
        self.rows: list[tuple[tf.Tensor, int, int]] = []

    @property
    def operations(self) -> list[tf.Operation]:
        """What the tower's graph has since its draws began."""
        return self.root.get_operations()[self._before :]

    def _at(
        self, key: Key, sizes: Sequence[int | None] | None = None
    ) -> DrawShape:
        return self._look.at(
            *(key, sizes, self.place.fed, self._is_filled, self._tower_fn)
        )

    def again(self, counts: Counter[Any]) -> "Own":
        """The same draws, from where so many are done, made once more."""
        own = copy.copy(self)
        own.counts = Counter(counts)
        own.root = tf.compat.v1.get_default_graph()
        return own

    def state(self, path: str, value: tf.Tensor) -> tf.Tensor:
        """The state of a generator, as the tower reads it.

        It is the model's, but where something draws by it past `drawn`, as in a
        `tf.function` of a layer, which may be kept: there it begins a stream of
        the tower's own.

        Args:
          path: of the layer that reads it.
          value: the tower's copy of it.
        """
        seed = self._states.get(identity(value))
        if (
            seed is None
            or self._look.is_only
            or not self._look.is_apart(path, seed, self._tower_fn)
        ):
            return value
        if seed not in self._streams:
            with self._in_root():
                self._streams[seed] = own_key(value, self._numbers())
        return self._streams[seed]

    def seeds(self, path: str, get_seed: Any, op_seed: Any) -> Any:
        """The seeds of an op with a state."""
        key, seeds = key_of(self.counts, path, STATEFUL), get_seed(op_seed)
        if self._look.is_only:
            return seeds
        if seeds == (None, None):
            return self._unseeded(key)
        seeds = self._look.first.setdefault(key, seeds)
        if not self._at(key).is_one:
            seeds = own_seed(seeds, tf_random.MOST, self.place)
            warn_of_own(path, "by an op of `tf.random` or `tf.nn` with a state")
        elif self._look.is_compiled:
            warnings.warn(
                f"{layer_named(path)} draws by an op with a seed what has no rows, one "
                "number for the whole batch. XLA does not go by such seeds, so "
                "with `jit_compile=True` each tower draws its own. Use a "
                "function of `tf.random.stateless_*` or `keras.random`.",
                stacklevel=2,
            )
        self._look.seeds.add(seeds)
        return seeds

    def _unseeded(self, key: Key) -> Any:
        """The seeds of an op that has none; of one number for all towers, any."""
        look = self._look
        if look.is_compiled or not look.is_known_to_be_one(key, self._tower_fn):
            return None, None
        anything = 1 + secrets.randbelow(tf_random.MOST - 1), 1
        seeds = look.first.setdefault(key, anything)
        look.seeds.add(seeds)
        return seeds

    def drawn(
        self, path: str, name: str, by: str, original: Any, arguments: Any
    ) -> tf.Tensor:
        """What a stateless function draws.

        Args:
          path: the layer's.
          name: the function's.
          by: the argument that seeds it.
          original: the function.
          arguments: its arguments.
        """
        key = key_of(self.counts, path, name)
        if self._look.is_only:
            return original(**arguments)
        seed = tf.convert_to_tensor(arguments[by])
        is_alike = True  # in each step of a loop
        for x in tf_random_graphs.sources(seed, self._states, False):
            if identity(x) in self._of_rows:  # which tell the numbers
                tf_random_graphs.mark_seen(result := original(**arguments))
                return result
            is_alike &= (
                identity(x) in self._states
                or x.op.type == "Const"
                or bool(tf_random_graphs.taken(x))
            )
        sizes = tf_random.sizes(arguments)
        drawn = self._at(key, sizes)
        is_one = drawn.is_one or (drawn.axes == () and is_alike)
        if is_one or self._is_fixed(drawn, sizes):
            tf_random_graphs.mark_seen(result := original(**arguments))
            return result
        result = self._rows(path, drawn, sizes, name, original, arguments)
        if result is None:
            warn_of_own(path, drawn.why_own)
            result = original(
                **{**arguments, by: own_key(seed, self._numbers())}
            )
            tf_random_graphs.mark_seen(result)
        else:
            self.rows.append((result, drawn.axis, drawn.of_row))
        if self._located is None:
            tf_random_graphs.mark(result)  # no copy of this tower has the same
        return result

    def _is_fixed(
        self, drawn: DrawShape, sizes: Sequence[int | None] | None
    ) -> bool:
        """Whether a number is known where that of rows is not: so it is none."""
        if not (self._is_open and drawn.axes and sizes):
            return False
        return all(sizes[a] is not None for a in drawn.axes)

    def _rows(
        self,
        path: str,
        drawn: DrawShape,
        sizes: list[int | None] | None,
        name: str,
        original: Any,
        arguments: Any,
    ) -> tf.Tensor | None:
        """The tower's rows of a draw; None if they cannot be told."""
        if not (sizes and drawn.is_once and tf_random.is_by_row(name)):
            return None
        parameters = tf_random.parameters(arguments)
        if any(x.shape.rank is None for x in parameters.values()):
            return None
        # Logits of as many samples as rows.
        if "logits" in arguments and drawn.axis > 0:
            return None
        # So many for each row, as far as the model was asked of other sizes.
        if drawn.of_row > 1 and self._is_filled and sizes[drawn.axis] is None:
            return None

        def draw(shape: Any, counter: Any, parameters: Any) -> tf.Tensor:
            changed = {"shape": shape, "counter": counter}
            result = original(
                **{k: changed.get(k, x) for k, x in arguments.items()}
                | dict(parameters)
            )
            tf_random_graphs.mark_seen(result)
            return result

        of_rows = Draw(
            draw,
            tf_random.shape_of(arguments),
            sizes,
            arguments.get("counter"),
            *(drawn.axis, drawn.of_row, self._numbers()),
            parameters,
        )
        counted = tf_random.counted(name, arguments, self._look.is_compiled)
        layout = counted and Layout(*counted)
        if layout and can_count(of_rows, layout):
            if has_split_pairs(of_rows, layout):
                warn_of_own(
                    path,
                    "by XLA, which pairs them within odd axes: in a batch "
                    "of an odd number of rows, smaller than such an axis",
                )
            return rows_by_counter(of_rows, layout)
        if self._look.is_compiled and not self.place.is_known:
            return None  # XLA knows shapes
        return rows_of_whole(of_rows)

    def _numbers(self) -> Place:
        """Where the tower's rows are, in ints or in int64 scalars."""
        if not self._where.is_known and self._where is self.place:
            with self._in_root(), on_host(device_here()):
                self._where = place_of(located(self.place))
        return self._where

    @contextlib.contextmanager
    def _in_root(self) -> Iterator[None]:
        """While open, what is made is in no loop, and waits for nothing."""
        with self.root.as_default(), tf.control_dependencies(None):
            yield

    def check_counts(self) -> None:
        """Warns of layers that draw once for each row, in a loop of Python's."""
        if not (self._look.is_only or self._is_filled):
            self._look.check_counts(self.counts)

    def check(self, scope: str) -> None:
        """Warns of draws that were made past this, by their layers.

        Args:
          scope: of the tower, with its slash.
        """
        if self._look.is_only:
            return
        # Not those that it makes for all towers.
        ops = [op for op in self.operations if op.name.startswith(scope)]
        for name in tf_random_graphs.by_generators(ops):
            path = name.removeprefix(scope).rpartition("/")[0]
            warn_of_own(path, "by a `tf.random.Generator`")
        seeds = None if self._look.is_compiled else self._look.seeds
        for name in tf_random_graphs.missed(ops, seeds):
            path = name.removeprefix(scope).rpartition("/")[0]
            warnings.warn(
                f"{layer_named(path)} draws random numbers by a constant seed in a "
                "`tf.function`, a SavedModel or an op of `tf.raw_ops` (by "
                f"{name!r}): all towers draw the same there, so rows of one have "
                "the numbers of another's. Draw outside of it, or by a "
                "`keras.random.SeedGenerator` that a layer keeps.",
                stacklevel=2,
            )
