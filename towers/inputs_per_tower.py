"""inputs_per_tower: inputs that each tower reads on its own machine."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import tensorflow as tf

from towers.keras_model import checks
from towers.placement.device_names import absent
from towers.placement.placement import Placement, check_placement
from towers.readers import Read, key, watched_devices
from towers.tower_graph import Tower
from towers.verbs.batch import BatchPerTower


class PerTower:
    """What `per_tower` makes; see there."""

    def __init__(self, dataset_fn: Callable[[Tower], tf.data.Dataset]):
        self.dataset_fn = dataset_fn
        # By the towers' devices, and the starts of the workers that have them.
        self._read: dict[Any, Read] = {}

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
        return Batches(self.read_for(placement))

    def restart(self) -> None:
        """Begins anew, where the inputs were given to `build_towers` themselves.

        Loops over `batches` have their own place, and do so by themselves.
        """
        for identity, read in self._read.items():
            if identity != key(read.towers):  # what is lost is not touched
                continue
            read.restart()

    def batch_per_tower(self, placement: Placement) -> BatchPerTower:
        """The next batch, in this graph or at once.

        Raises:
          tf.errors.OutOfRangeError: when it runs, that a tower has no more.
        """
        read = self.read_for(placement)
        if tf.executing_eagerly():
            return read.drawn_now(read.iterators)
        return read.drawn(read.iterators)

    def read_for(
        self, placement: Placement, which: Sequence[int] | None = None
    ) -> Read:
        """The datasets of a placement's towers, or of some of them.

        Raises:
          ValueError: the graph is one of tf.compat.v1, or a device is not here.
        """
        check_placement(placement)
        if checks.in_v1_graph():
            raise ValueError(
                "Inputs of towers.per_tower are read in eager code and in a "
                "tf.function, but this is a graph of tf.compat.v1. Give "
                "build_towers there a whole batch, which it splits."
            )
        devices = placement.devices
        whose = [
            Tower(i, devices[i], f"tower_{i}/", None)
            for i in (range(len(devices)) if which is None else which)
        ]
        missing = absent([tower.device for tower in whose])
        if missing:
            raise ValueError(
                "`placement` has towers on "
                f"{', '.join(missing)}, which TensorFlow does not see, so "
                "nothing can be read there. Expected devices that are here."
            )
        identity = key(whose)
        if identity not in self._read:
            self._read[identity] = Read.by(self.dataset_fn, whose)
        return self._read[identity]


def per_tower(dataset_fn: Callable[[Tower], tf.data.Dataset]) -> PerTower:
    """Inputs that each tower reads on its own machine, so that none crosses.

    Each tower gets the elements of its own dataset, of as many rows as those have:
    together, in the order of the towers, they are the batch. So
    `placement.weights` say nothing here, and what is a mean weights each tower by
    its rows.

    For `fit`, `evaluate` and `predict` of a `TowerModel`, and as
    `validation_data`, datasets give what `fit` takes: (x, y), (x, y,
    sample_weight), or x alone. The numbers are those of plain `fit` on the joined
    batches. A tower that has ended has no rows until all have. Targets and sample
    weights are gathered beside the outputs, or stay too with `loss_on_towers`.

    >>> placement = towers.Placement(["/CPU:0", "/CPU:1"])
    >>> model = keras.Sequential([keras.Input([3]), keras.layers.Dense(2)])
    >>> def read(tower):  # 3 rows on one, 5 on the other
    ...     rows = tf.data.Dataset.range(20)
    ...     rows = rows.map(lambda i: (tf.ones([3]), tf.zeros([2])))
    ...     return rows.batch([3, 5][tower.index], drop_remainder=True)
    >>> data = towers.per_tower(read)
    >>> towered = towers.TowerModel(model, placement, loss_on_towers="auto")
    >>> towered.compile("sgd", "mse")
    >>> towered.fit(data, epochs=2, verbose=0).params["steps"]
    6
    >>> towered.predict(data, verbose=0).shape  # 3 and 5, four times, and 3, 3
    (38, 2)

    `predict` gives rows batch by batch, each tower's after those of the one before.
    What a step of your own, or a metric, makes of inputs outside of towers is right,
    and has them cross. With `TowerModel(prefetch=True)` the next batch is read while
    a step runs. With `on_lost="continue"` the batch that a lost worker has read a
    part of is left out, and what its datasets had still to give is not read, of
    which a warning tells; in `predict` it is a `WorkerLost`. A worker that comes back
    begins its datasets anew at the next epoch.

    For functions and loops of your own: give them, or batches of them, to
    `build_towers` in the place of inputs.

    >>> def outputs(model, shard):
    ...     x, y = shard
    ...     return model(x)
    >>> @tf.function
    ... def step(batch):
    ...     return towers.build_towers(model, batch, placement,
    ...                                tower_fn=outputs).outputs
    >>> [step(batch).shape[0] for batch in data.batches(placement)]
    [8, 8, 8, 8]

    Such a loop ends with the first tower that ends; the next begins anew. Steps
    whose batches differ in size are traced again, unless they are a
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
    yours, TensorFlow names an op below "inputs_of_tower_1", and may call it the end
    of another tower's inputs, which it cancels: the message has both.

    A graph of `tf.compat.v1` has no place for them, and says so.

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

    def __init__(self, read: Read):
        self._read = read

    def batch_per_tower(self, placement: Placement) -> NoReturn:
        """Raises a `TypeError`: batches are taken in a loop."""
        raise TypeError(
            "`inputs` are the batches of towers.per_tower, which begin anew in "
            "each loop. Expected one of them, as in `for batch in batches`; or "
            "what towers.per_tower returned, whose next batch that takes."
        )

    def __iter__(self) -> Iterator[BatchPerTower]:
        with watched_devices(self._read.devices):
            iterators = self._read.begun()
        while True:
            try:
                batch = self._read.drawn_now(iterators)
            except tf.errors.OutOfRangeError:
                return
            yield batch
