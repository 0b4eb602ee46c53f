"""readers: the towers' own datasets, each read where its tower is."""

import contextlib
import dataclasses
import functools
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from typing import Any

import tensorflow as tf

from towers.cluster import cluster as clusters
from towers.engine.host import host_of
from towers.foreign import tf_iterators
from towers.placement.device_names import HOST_HERE
from towers.placement.placement import Placement
from towers.tower_graph import Tower
from towers.verbs.batch import BatchPerTower

_INPUTS = "inputs_of_tower_"  # scopes and functions, which errors name


@dataclasses.dataclass
class Read:
    """The towers' datasets, for a list of devices.

    Attributes:
      devices: where each is read, the tower's device or its host.
      datasets: one per tower.
      iterators: one per tower, of inputs that are given themselves.
    """

    devices: list[str]
    datasets: list[tf.data.Dataset]

    @classmethod
    def by(cls, dataset_fn: Callable[..., Any], where: Placement) -> "Read":
        devices = [host_of(device) for device in where.devices]
        datasets = []
        with watched(devices):
            for i, device in enumerate(where.devices):
                tower = Tower(i, device, f"tower_{i}/", None)
                with tf.init_scope(), tf.device(devices[i]):
                    datasets.append(_dataset(dataset_fn, tower))
        _check_alike(datasets)
        return cls(devices, datasets)

    @functools.cached_property
    def iterators(self) -> list[Any]:
        with watched(self.devices):
            return self.begun()

    def restart(self) -> None:
        """Begins anew with the same iterators, and waits until all have."""
        with watched(self.devices), tf.device(HOST_HERE):
            self._restarted().numpy()

    @functools.cached_property
    def _restarted(self) -> Callable[[], tf.Tensor]:
        """Begins anew, in a function, whose end is that of all it does.

        An op that runs on another process by itself is done when that likes, and
        may be overtaken by the next function.
        """

        def restarted() -> tf.Tensor:
            done = []
            for iterator, dataset, device in zip(
                self.iterators, self.datasets, self.devices
            ):
                with tf.device(device):
                    begun = tf_iterators.restart(iterator, dataset)
                    with tf.control_dependencies([begun]):
                        done.append(tf.ones([]))
            with tf.device(HOST_HERE):
                return tf.stack(done)

        return tf.function(restarted, autograph=False)

    def begun(self) -> list[Any]:
        """Iterators, where the datasets are."""
        found = []
        for dataset, device in zip(self.datasets, self.devices):
            with tf.init_scope(), tf.device(device):
                found.append(iter(dataset))
        return found

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

        def look(i: int) -> Any:
            # A function's results are taken to the device that it is called on.
            with tf.device(self.devices[i]):
                return self._functions[i][0](iterators[i])

        n = len(iterators)
        with watched(self.devices), self._named():
            with futures.ThreadPoolExecutor(n) as pool:
                found, there = zip(*pool.map(look, range(n)))
            with tf.device(HOST_HERE):
                has_value = self._waited(there).numpy().tolist()
            if not all(has_value):
                tower = has_value.index(False)
                raise tf.errors.OutOfRangeError(
                    None, None, f"The inputs of tower {tower} have ended."
                )
            elements = []
            for i, device in enumerate(self.devices):
                with tf.device(device):
                    elements.append(self._functions[i][1](found[i]))
        return BatchPerTower(tuple(elements))

    @functools.cached_property
    def _functions(self) -> list[tuple[Any, Any]]:
        """From an iterator to what may be its next element, and whether it is;
        and to that element.

        For each device, as they are traced for it. The end is no error there:
        those of other processes come when they like.
        """

        def looked(iterator: Any) -> tuple[Any, tf.Tensor]:
            found = iterator.get_next_as_optional()
            return found, found.has_value()

        def taken(found: Any) -> Any:
            return found.get_value()

        def function(call: Callable[[Any], Any], name: str) -> Any:
            # TensorFlow counts traces by code, and warns of many.
            own = functools.partial(call)
            own.__name__ = name  # type: ignore[attr-defined]
            return tf.function(own, autograph=False)

        return [
            (function(looked, f"{_INPUTS}{i}"), function(taken, "taken"))
            for i in range(len(self.devices))
        ]

    @functools.cached_property
    def _waited(self) -> Callable[[Any], tf.Tensor]:
        """[towers], what other processes say, which call back at once."""
        return tf.function(lambda there: tf.stack(there), autograph=False)

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """While open, what a dataset raises says whose it is.

        Not who hears of it first: what other processes raise comes anywhere.
        """
        try:
            yield
        except tf.errors.OpError as error:
            found = re.search(rf"{_INPUTS}(\d+)", error.message)
            if not found or isinstance(error, tf.errors.OutOfRangeError):
                raise
            i = int(found[1])
            raise type(error)(
                error.node_def,
                error.op,
                f"The dataset of tower {i}, on {self.devices[i]}, raised: "
                f"{error.message}",
            ).with_traceback(error.__traceback__) from None


def key(devices: Sequence[str]) -> tuple[Any, ...]:
    """By which datasets are known: devices, and the starts of their workers."""
    cluster = clusters.connected()
    return tuple(devices), cluster and cluster.starts(devices)


def watched(
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
