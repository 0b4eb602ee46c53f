"""reading: batches that towers read for `fit`, until all of them have ended."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from towers.cluster import cluster as clusters
from towers.engine.host import host_of
from towers.foreign import specs
from towers.inputs_per_tower import PerTower
from towers.placement.placement import Placement
from towers.tower_graph import Tower
from towers.verbs.batch import whole_leaves, whole_paths
from towers.verbs.scatter import first_rows


class Drawn(NamedTuple):
    """A batch that towers have read.

    Attributes:
      towers: what each is fed, a nest on its machine; one spare row where it has
        none of its own.
      rows: how many are its own.
      sure: the place of a tower with rows, if others have none; None if all have.
      spec: a nest of specs per tower, of any number of rows.
    """

    towers: tuple[Any, ...]
    rows: tuple[int, ...]
    sure: int | None
    spec: tuple[Any, ...]


class Reading:
    """The batches of an epoch; a loop over it reads them.

    A tower that has ended has no rows, until all have. One whose worker is lost has
    none either, until it is begun anew.

    Args:
      data: what towers read.
      placement: of all towers, those too that are lost.
      which: the places there of those that are here.
      whole: inputs that are no batch, as for a `TowerModel`.

    Attributes:
      lost: towers that were lost, with the rest of what they had to read.
      count: how many batches were read.
    """

    def __init__(
        self,
        data: PerTower,
        placement: Placement,
        which: Sequence[int],
        whole: Sequence[Any] = (),
    ):
        self._data, self._placement = data, placement
        self._whole = whole
        self._iterators: dict[int, Any] = {}
        self._spares: dict[int, Any] = {}
        self._ended: set[int] = set()
        self._sure: int | None = None
        self._back: list[Drawn] = []
        self.lost: list[Tower] = []
        self.count = 0
        self.begin(which)
        clusters.hold(self)

    def begin(self, which: Sequence[int]) -> None:
        """Begins with those of these towers that have not begun."""
        new = set(which) - set(self._iterators)
        if not new:
            return
        self._which = list(which)
        self._read = self._data.read_for(self._placement, which)
        for i in new:
            self._ended.discard(i)
            self._iterators[i] = self._read.begun_at(self._which.index(i))
        spec = self._read.datasets[0].element_spec
        paths = whole_paths(self._whole)
        below = [(0, *x) for x in paths] if isinstance(spec, tuple) else paths
        marked = zip(tf.nest.flatten(spec), whole_leaves(spec, below))
        self._divided = [
            not whole and not isinstance(x, tf.NoneTensorSpec)
            for x, whole in marked
        ]
        self._spec = {
            i: specs.of_nest(data.element_spec, self._divided)
            for i, data in zip(which, self._read.datasets)
        }

    @property
    def is_open(self) -> bool:
        """Whether it is not known how many batches there are."""
        return None in self._read.lengths

    def __iter__(self) -> Iterator[Drawn]:
        return self

    def __next__(self) -> Drawn:
        return self.draw(self._which)

    def draw(self, which: Sequence[int]) -> Drawn:
        """The next batch of these towers.

        Raises:
          StopIteration: all have ended.
          ValueError: leaves of a tower have different rows, or none.
          WorkerLost: one of them is lost; what others have read is gone too.
        """
        if self._back:
            return self._back.pop(0)
        at = {self._which.index(i): i for i in which if i in self._iterators}
        going = {
            p: self._iterators[i] for p, i in at.items() if i not in self._ended
        }
        elements, sizes = self._read.look(going) if going else ({}, {})
        self._ended |= {at[p] for p, counts in sizes.items() if counts is None}
        rows = {at[p]: self._rows(p, sizes[p]) for p in sizes if sizes[p]}
        if not rows:
            raise StopIteration
        fed = {
            at[p]: self._read.take(p, elements[p]) for p in elements if sizes[p]
        }
        self._keep_spares(fed)
        self.count += 1
        counts = tuple(rows.get(i, 0) for i in which)
        return Drawn(
            tuple(fed[i] if i in fed else self._spare(i, fed) for i in which),
            counts,
            self._sure_of(which, rows) if 0 in counts else None,
            tuple(self._spec.get(i) or self._any_spec() for i in which),
        )

    def put_back(self, batches: Sequence[Drawn]) -> "Reading":
        """The same, which gives these batches first."""
        self._back = list(batches)
        return self

    def lose(self, tasks: set[int], workers: Any) -> list[Any]:
        """Gives up what is on lost workers, before anybody touches it."""
        gone: list[Any] = []
        for i in list(self._iterators):
            device = self._placement.devices[i]
            if clusters.task_of(device) in tasks:
                gone += [self._iterators.pop(i), self._spares.pop(i, None)]
                self.lost.append(Tower(i, device, f"tower_{i}/", None))
        return [*gone, self._read] if gone else []

    def _rows(self, p: int, counts: Sequence[int] | None) -> int:
        divided = [n for n, mine in zip(counts or (), self._divided) if mine]
        if len(set(divided)) > 1 or min(divided) < 1:
            tower = self._read.towers[p]
            raise ValueError(
                f"The dataset of tower {tower.index}, on {tower.device}, gave a "
                f"batch whose leaves have {divided} rows. Expected the same "
                "number in all, at least one: leave out batches without rows by "
                "`filter`, and name in `whole` what is no batch."
            )
        return divided[0]

    def _sure_of(self, which: Sequence[int], rows: dict[int, int]) -> int:
        """The place of the tower that the traced step relies on for rows."""
        if self._sure not in rows:
            lengths = dict(zip(self._which, self._read.lengths))
            self._sure = max(rows, key=lambda i: (lengths.get(i) or 0, -i))
        return list(which).index(self._sure)  # type: ignore[arg-type]

    def _keep_spares(self, fed: dict[int, Any]) -> None:
        """Keeps a row of each tower's, for when it has ended."""
        if len({*self._read.lengths}) == 1 and None not in self._read.lengths:
            return  # all end together
        for i in fed.keys() - self._spares.keys():
            self._spares[i] = self._first(i, fed[i])

    def _spare(self, i: int, fed: dict[int, Any]) -> Any:
        """A row for a tower that has ended: its own, or another tower's."""
        if i not in self._spares:
            self._spares[i] = self._first(i, next(iter(fed.values())))
        return self._spares[i]

    def _first(self, i: int, nest: Any) -> Any:
        device = host_of(self._placement.devices[i])
        with tf.device(device):
            return tf.nest.pack_sequence_as(
                nest,
                [
                    None
                    if x is None
                    else tf.nest.map_structure(
                        tf.identity,
                        first_rows(x, 1, device) if mine else x,
                        expand_composites=True,
                    )
                    for x, mine in zip(tf.nest.flatten(nest), self._divided)
                ],
            )

    def _any_spec(self) -> Any:
        return next(iter(self._spec.values()))


def check_fits(data: PerTower, placement: Placement, which: Any) -> None:
    """Raises unless towers read what `fit` takes, which could be joined."""
    each = [x.element_spec for x in data.read_for(placement, which).datasets]
    keras.utils.unpack_x_y_sample_weight(each[0])
    for i, spec in zip(which, each):
        for mine, first in zip(tf.nest.flatten(spec), tf.nest.flatten(each[0])):
            shapes = [
                getattr(x, "shape", tf.TensorShape(None)) for x in (mine, first)
            ]
            if not shapes[0][1:].is_compatible_with(shapes[1][1:]):
                raise ValueError(
                    f"`dataset_fn` gives tower {i} batches of shape {shapes[0]}, "
                    f"and tower {which[0]} of {shapes[1]}. Expected the same "
                    "axes after the first in all towers."
                )
