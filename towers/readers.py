"""readers: the towers' own datasets, each read where its tower is."""

import contextlib
import dataclasses
import functools
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any

import tensorflow as tf

from towers.cluster import cluster as clusters
from towers.engine.graphs import as_function
from towers.engine.host import host_of
from towers.foreign import tf_iterators
from towers.foreign.tf_errors import in_words
from towers.placement.device_names import HOST_HERE
from towers.tower_graph import Tower
from towers.verbs.batch import BatchPerTower
from towers.verbs.rows import row_count

_INPUTS = "inputs_of_tower_"  # scopes and functions, which errors name


@dataclasses.dataclass
class Read:
    """The datasets of some towers.

    Attributes:
      towers: whose they are, which may be some of a placement's only.
      devices: where each is read, the tower's device or its host.
      datasets: one per tower.
      iterators: one per tower, of inputs that are given themselves.
    """

    towers: Sequence[Tower]
    devices: list[str]
    datasets: list[tf.data.Dataset]

    @classmethod
    def by(
        cls, dataset_fn: Callable[..., Any], whose: Sequence[Tower]
    ) -> "Read":
        devices = [host_of(tower.device) for tower in whose]
        datasets = []
        with watched_devices(devices):
            for tower, device in zip(whose, devices):
                with tf.init_scope(), tf.device(device):
                    datasets.append(_dataset(dataset_fn, tower))
        _check_alike(datasets)
        return cls(whose, devices, datasets)

    @functools.cached_property
    def lengths(self) -> list[int | None]:
        """How many elements each has; None if it has no end or cannot tell."""
        counts = []
        with watched_devices(self.devices):
            for dataset, device in zip(self.datasets, self.devices):
                with tf.device(device):
                    counts.append(int(dataset.cardinality()))
        return [None if count < 0 else count for count in counts]

    @functools.cached_property
    def iterators(self) -> list[Any]:
        with watched_devices(self.devices):
            return self.begun()

    def restart(self) -> None:
        """Begins anew with the same iterators, and waits until all have."""
        with watched_devices(self.devices), tf.device(HOST_HERE):
            self._restarted().numpy()

    @functools.cached_property
    def _restarted(self) -> Callable[[], tf.Tensor]:
        """A function that restarts all iterators, and returns when all have.

        An op that runs on another process by itself is done when that likes, and
        may be overtaken by the next function.
        """

        def restarted() -> tf.Tensor:
            restarts = []
            for iterator, dataset, device in zip(
                self.iterators, self.datasets, self.devices
            ):
                with tf.device(device):
                    begun = tf_iterators.restart(iterator, dataset)
                    with tf.control_dependencies([begun]):
                        restarts.append(tf.ones([]))
            with tf.device(HOST_HERE):
                return tf.stack(restarts)

        return tf.function(restarted, autograph=False)

    def begun(self) -> list[Any]:
        """Iterators, where the datasets are."""
        return [self.begun_at(i) for i in range(len(self.datasets))]

    def begun_at(self, i: int) -> Any:
        """One tower's iterator, where its dataset is."""
        with tf.init_scope(), tf.device(self.devices[i]):
            return iter(self.datasets[i])

    def drawn(self, iterators: list[Any]) -> BatchPerTower:
        """The next elements, in this graph."""
        towers = []
        for i, (iterator, device) in enumerate(zip(iterators, self.devices)):
            with tf.device(device), tf.name_scope(f"{_INPUTS}{i}"):
                towers.append(next(iterator))
        return BatchPerTower(tuple(towers))

    def drawn_now(self, iterators: list[Any]) -> BatchPerTower:
        """The next elements, in eager code, which stay where they are.

        Raises:
          tf.errors.OutOfRangeError: a tower has no more.
        """
        elements, rows = self.look(dict(enumerate(iterators)))
        for i, counts in rows.items():
            if counts is None:
                raise tf.errors.OutOfRangeError(
                    None, None, f"The inputs of tower {i} have ended."
                )
        return BatchPerTower(
            tuple(self.take(i, x) for i, x in elements.items())
        )

    def look(
        self, iterators: Mapping[int, Any]
    ) -> tuple[dict[int, Any], dict[int, list[int] | None]]:
        """What may be the next element of each of these towers, where it is.

        Returns:
          By tower, what `take` makes the element of; and how many rows each of
          its leaves has, 0 for what has no axis, or None if there is no more.
        """

        def look(i: int) -> Any:
            # A function's results are taken to the device that it is called on.
            with tf.device(self.devices[i]):
                return self._functions[i][0](iterators[i])

        which = list(iterators)
        with watched_devices(self.devices), self._named():
            with futures.ThreadPoolExecutor(len(which)) as pool:
                elements, there = zip(*pool.map(look, which))
            with tf.device(HOST_HERE):
                rows = self._waited(there).numpy().tolist()
        sizes = [None if -1 in counts else counts for counts in rows]
        return dict(zip(which, elements)), dict(zip(which, sizes))

    def take(self, i: int, element: Any) -> Any:
        """A tower's element, of what `look` has found."""
        with (
            watched_devices(self.devices),
            self._named(),
            tf.device(self.devices[i]),
        ):
            return self._functions[i][1](element)

    @functools.cached_property
    def _functions(self) -> list[tuple[Any, Any]]:
        """From an iterator to what may be its next element, and the rows of that;
        and to that element.

        For each device, as they are traced for it. The end is no error there:
        those of other processes come when they like.
        """

        def look(device: str, iterator: Any) -> tuple[Any, tf.Tensor]:
            element = iterator.get_next_as_optional()
            n = len(tf.nest.flatten(iterator.element_spec))
            return element, tf.cond(
                element.has_value(),
                lambda: _rows(element.get_value(), device),
                lambda: tf.fill([n], -1),
            )

        def taken(element: Any) -> Any:
            return element.get_value()

        return [
            (
                as_function(
                    functools.partial(look, device),
                    f"{_INPUTS}{tower.index}",
                ),
                as_function(taken, "taken"),
            )
            for tower, device in zip(self.towers, self.devices)
        ]

    @functools.cached_property
    def _waited(self) -> Callable[[Any], tf.Tensor]:
        """[towers, leaves], what other processes say, which call back at once."""
        return as_function(lambda there: tf.stack(there), "waited")

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """While open, what a dataset raises says whose it is.

        Not who hears of it first: what other processes raise comes anywhere.
        """
        try:
            yield
        except tf.errors.OpError as error:
            match = re.search(rf"{_INPUTS}(\d+)", error.message)
            if not match or isinstance(error, tf.errors.OutOfRangeError):
                raise
            i = int(match[1])
            where = {x.index: d for x, d in zip(self.towers, self.devices)}[i]
            words = f"The dataset of tower {i}, on {where}, raised: "
            raise in_words(error, words) from None


def key(whose: Sequence[Tower]) -> tuple[Any, ...]:
    """By which datasets are known: towers, and the starts of their workers."""
    cluster = clusters.connected()
    towers = tuple((tower.index, tower.device) for tower in whose)
    return towers, cluster and cluster.starts([x.device for x in whose])


def watched_devices(
    devices: Sequence[str],
) -> contextlib.AbstractContextManager[None]:
    """While open, what a lost worker raises is told as such, if these need one."""
    cluster = clusters.connected()
    if cluster is None or all(clusters.task_of(d) is None for d in devices):
        return contextlib.nullcontext()
    return cluster.watch()


def _dataset(dataset_fn: Callable[..., Any], tower: Tower) -> tf.data.Dataset:
    whose = f"`dataset_fn`, for tower {tower.index} on {tower.device}"
    try:
        dataset = dataset_fn(tower)
    except Exception as error:
        if sys.version_info >= (3, 11):
            error.add_note(f"This was raised by {whose}.")
        raise
    if not isinstance(dataset, tf.data.Dataset):
        raise TypeError(
            f"{whose}, must return a tf.data.Dataset; got a "
            f"{type(dataset).__name__}. For arrays, use "
            "tf.data.Dataset.from_tensor_slices(arrays).batch(rows)."
        )
    is_far = clusters.task_of(tower.device) is not None
    if is_far and tf_iterators.calls_python(dataset):
        raise ValueError(
            f"{whose}, returns a dataset that calls Python, by from_generator, "
            "py_function or numpy_function. That is in this process, so its rows "
            "would cross. Expected TensorFlow's own ops, such as "
            "tf.data.TFRecordDataset of files that are there."
        )
    return dataset


def _rows(element: Any, device: str) -> tf.Tensor:
    """[leaves], how many rows each has; 0 for what has no axis."""
    return tf.stack(
        [
            row_count(x, device) if x is not None and x.shape.rank != 0 else 0
            for x in tf.nest.flatten(element)
        ]
    )


def _check_alike(datasets: list[tf.data.Dataset]) -> None:
    """Raises unless all have elements of one structure, and its dtypes."""
    first = datasets[0].element_spec
    for i, dataset in enumerate(datasets):
        other = dataset.element_spec
        try:
            tf.nest.assert_same_structure(first, other)
            same = [_kind(x) for x in tf.nest.flatten(first)] == [
                _kind(x) for x in tf.nest.flatten(other)
            ]
        except (TypeError, ValueError):
            same = False
        if not same:
            raise ValueError(
                "`dataset_fn` must return datasets whose elements have one "
                f"structure, and the same dtypes, for all towers; got {first} "
                f"for tower 0, and {other} for tower {i}."
            )


def _kind(spec: tf.TypeSpec) -> tuple[Any, ...]:
    rank = spec.shape.rank if hasattr(spec, "shape") else None
    return type(spec), getattr(spec, "dtype", None), rank
