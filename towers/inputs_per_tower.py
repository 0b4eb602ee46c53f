"""inputs_per_tower: inputs that each tower reads on its own machine."""

import contextlib
import dataclasses
import functools
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures
from typing import Any

import tensorflow as tf

from towers import v1_graph
from towers.cluster import cluster as clusters
from towers.engine.host import host_of
from towers.foreign import tf_iterators
from towers.placement.device_names import HOST_HERE, absent
from towers.placement.placement import Placement, check_placement
from towers.tower_graph import Tower
from towers.verbs.batch import BatchPerTower

_INPUTS = "inputs_of_tower_"  # scopes and functions, which errors name


class PerTower:
    """What `per_tower` makes; see there."""

    def __init__(self, dataset_fn: Callable[[Tower], tf.data.Dataset]):
        self._dataset_fn = dataset_fn
        # By the towers' devices, and the starts of the workers that have them.
        self._read: dict[Any, _Read] = {}

    def batches(self, placement: Placement) -> "Batches":
        """The batches, for a loop, which begins anew each time.

        Args:
          placement: that of the towers which are to compute with them.

        Raises:
          TypeError: `placement` is no `Placement`, or `dataset_fn` returns no
            dataset.
          ValueError: towers have elements of different structures or dtypes, or
            a device is not here.
          WorkerLost: in the loop, when a worker is lost.
        """
        return Batches(self._read_for(placement))

    def restart(self) -> None:
        """Begins anew, where the inputs were given to `build_towers` themselves.

        Loops over `batches` have their own place, and do so by themselves.
        """
        for key, read in self._read.items():
            if key != _key(key[0]):  # what is lost is not touched
                continue
            for dataset, iterator, device in zip(
                read.datasets, read.iterators, read.devices
            ):
                with tf.device(device):
                    tf_iterators.restart(iterator, dataset)

    def next_batch(self, placement: Placement) -> BatchPerTower:
        """The next batch, in this graph or at once.

        Raises:
          tf.errors.OutOfRangeError: when it runs, that a tower has no more.
        """
        read = self._read_for(placement)
        if tf.executing_eagerly():
            return read.drawn_now(read.iterators)
        return read.drawn(read.iterators)

    def _read_for(self, placement: Placement) -> "_Read":
        check_placement(placement)
        if v1_graph.in_v1_graph():
            raise ValueError(
                "Inputs of towers.per_tower are read in eager code and in a "
                "tf.function, but this is a graph of tf.compat.v1. Give "
                "build_towers there a whole batch, which it splits."
            )
        missing = absent(list(placement.devices))
        if missing:
            raise ValueError(
                "`placement` has towers on "
                f"{', '.join(missing)}, which TensorFlow does not see, so "
                "nothing can be read there. Expected devices that are here."
            )
        key = _key(placement.devices)
        if key not in self._read:
            self._read[key] = _Read.by(self._dataset_fn, placement)
        return self._read[key]


def per_tower(dataset_fn: Callable[[Tower], tf.data.Dataset]) -> PerTower:
    """Inputs that each tower reads on its own machine, so that none crosses.

    For functions and loops of your own: give them, or batches of them, to
    `build_towers` in the place of inputs. Each tower gets the elements of its own
    dataset, of as many rows as those have: together they are the batch. So
    `placement.weights` say nothing here, and what is a mean weights each tower by
    its rows.

    >>> placement = towers.Placement(["/CPU:0", "/CPU:1"])
    >>> model = keras.Sequential([keras.Input([3]), keras.layers.Dense(2)])
    >>> def read(tower):  # 3 rows on one, 5 on the other
    ...     rows = tf.data.Dataset.range(20).map(lambda i: tf.ones([3]))
    ...     return rows.batch([3, 5][tower.index], drop_remainder=True)
    >>> data = towers.per_tower(read)
    >>> @tf.function
    ... def step(batch):
    ...     return towers.build_towers(model, batch, placement).outputs
    >>> [step(batch).shape[0] for batch in data.batches(placement)]
    [8, 8, 8, 8]

    It ends with the first tower that ends; the next loop begins anew. Steps whose
    batches differ in size are traced again, unless they are a
    `tf.function(reduce_retracing=True)`.

    In a `tf.function`, inputs may be given to `build_towers` themselves, loops
    included. Each time that runs, it reads the next, and at the end raises
    `tf.errors.OutOfRangeError`, as `next(iterator)` would: what does not depend on
    inputs, such as counting `optimizer.iterations`, may have been done then. So
    prefer `batches`. Afterwards call `restart()`.

    Datasets are built, once for a list of devices, under the device of their
    tower, or its host if that is a GPU. So files are opened where the tower is;
    what `dataset_fn` takes from Python, arrays for instance, goes there when it is
    built. For a tower of another process, datasets that call Python are refused
    (`from_generator`, `py_function`): that is in this process. What a dataset
    raises in a loop over `batches` names its tower and the device; in a graph of
    yours, TensorFlow names an op below "inputs_of_tower_1".

    Keras's `fit` has no place for them, nor has a graph of `tf.compat.v1`; they
    say so.

    Args:
      dataset_fn: `f(tower)` that returns a `tf.data.Dataset` of batches: nests of
        [rows, ...], dense, ragged or sparse, of at least one row, with the same
        structure and dtypes in all towers. `tower` is a `Tower` of which index,
        device and scope are known.

    Raises:
      TypeError: `dataset_fn` is no function.
    """
    if not callable(dataset_fn):
        raise TypeError(
            "`dataset_fn` must be a function of a tower that returns a "
            f"tf.data.Dataset; got {dataset_fn!r}. For one dataset for all "
            "towers, whose batches are split, use `fit`, or build_towers with "
            "its batches."
        )
    return PerTower(dataset_fn)


class Batches:
    """Batches of inputs that each tower reads; a loop over it begins anew."""

    def __init__(self, read: "_Read"):
        self._read = read

    def __iter__(self) -> Iterator[BatchPerTower]:
        with _watched():
            iterators = self._read.begun()
        while True:
            try:
                batch = self._read.drawn_now(iterators)
            except tf.errors.OutOfRangeError:
                return
            yield batch


def refuse_per_tower(
    given: Iterable[Any], method: str, on_lost: str = "raise"
) -> None:
    """Raises a `ValueError` if one of these is what towers read themselves."""
    if not any(
        isinstance(x, (PerTower, Batches, BatchPerTower)) for x in given
    ):
        return
    continued = (
        '; nor can `on_lost="continue"` take again what a lost worker has read'
        if on_lost == "continue"
        else ""
    )
    raise ValueError(
        f"Inputs of towers.per_tower were given to `{method}` of a TowerModel, "
        f"which splits whole batches{continued}. Expected arrays or a "
        "tf.data.Dataset. In a loop of your own, give them to "
        "towers.build_towers(model.template, batch, placement, tower_fn=...)."
    )


@dataclasses.dataclass
class _Read:
    """The towers' datasets, for a list of devices.

    Attributes:
      devices: where each is read, the tower's device or its host.
      datasets: one per tower.
      iterators: one per tower, of inputs that are given themselves.
    """

    devices: list[str]
    datasets: list[tf.data.Dataset]

    @classmethod
    def by(cls, dataset_fn: Callable[..., Any], where: Placement) -> "_Read":
        devices = [host_of(device) for device in where.devices]
        datasets = []
        with _watched():
            for i, device in enumerate(where.devices):
                tower = Tower(i, device, f"tower_{i}/", None)
                with tf.init_scope(), tf.device(devices[i]):
                    datasets.append(_dataset(dataset_fn, tower))
        _check_alike(datasets)
        return cls(devices, datasets)

    @functools.cached_property
    def iterators(self) -> list[Any]:
        with _watched():
            return self.begun()

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
        with _watched(), self._named():
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


def _key(devices: Sequence[str]) -> tuple[Any, ...]:
    cluster = clusters.connected()
    return tuple(devices), cluster and cluster.starts(devices)


def _watched() -> contextlib.AbstractContextManager[None]:
    cluster = clusters.connected()
    return contextlib.nullcontext() if cluster is None else cluster.watch()


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
