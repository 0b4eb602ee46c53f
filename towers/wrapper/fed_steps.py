"""fed_steps: steps with what towers have read, each where it is."""

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from towers.cluster.lost import WorkerLost
from towers.engine.host import host_of
from towers.reading import Drawn, Reading
from towers.verbs.arrivals import Arrivals, arriving
from towers.verbs.batch import Batch
from towers.verbs.rows import Ranges, ranges_of
from towers.wrapper.joined_batch import joined_batch
from towers.wrapper.repeated_step import RepeatedStep, run_out


class FedSteps:
    """What Keras calls in a loop, with batches of a `Reading` or any others.

    Args:
      model: a `TowerModel`.
      name: of its step that is taken with a batch.
      otherwise: Keras's function, for all other batches.
    """

    def __init__(self, model: Any, name: str, otherwise: Callable[[Any], Any]):
        self._model = model
        self._name = name
        self._step = getattr(model, name)
        self._otherwise = otherwise
        self._steps: dict[int | None, RepeatedStep] = {}
        self._last: Any = None  # which of these was taken, and of what spec

    def __call__(self, data: Any) -> Any:
        """Steps with the next batches that towers read, of one execution."""
        if not isinstance(data, Reading):
            return self._otherwise(data)
        logs = None
        for _ in range(self._model.steps_per_execution):
            try:
                logs = self._next(data)
            except StopIteration:
                if logs is None:
                    self._run_out(data)
                    raise
                break
        return logs

    def predict(self, data: Any) -> Any:
        """Steps with a list of batches that towers have read; all their rows."""
        if not isinstance(data, list) or not isinstance(data[0], Drawn):
            return self._otherwise(data)
        if self._is_eager:
            return self._otherwise([self._joined(drawn) for drawn in data])
        results = [self._take(drawn) for drawn in data]
        if len(results) == 1:
            return results[0]
        return tf.nest.map_structure(lambda *x: tf.concat(x, 0), *results)

    def _next(self, reading: Reading) -> Any:
        """Steps with the next batch that no lost worker had a part of."""
        model, recovery = self._model, self._model.tower_recovery
        while True:
            recovery.catch_up()
            _tell_lost(reading)
            draw = functools.partial(reading.draw, recovery.towers_now())
            try:
                if model.prefetch:
                    draw = functools.partial(
                        model.read_ahead.drawn, reading, draw
                    )
                drawn = draw()
                if self._is_eager:
                    return self._otherwise(iter([self._joined(drawn)]))
                return self._take(drawn)
            except WorkerLost:
                if model.on_lost == "raise":
                    raise
                recovery.go_on()
                _tell_lost(reading, "The batch that it was in is left out. ")

    def _run_out(self, reading: Reading) -> None:
        """As Keras's own function at an open end, which takes single steps."""
        is_single = self._model.steps_per_execution == 1
        if self._last is None or not is_single or not reading.is_open:
            return
        sure, spec = self._last
        try:
            run_out(self._steps[sure].take_once, spec)
        except WorkerLost:
            if self._model.on_lost == "raise":
                raise

    def _take(self, drawn: Drawn) -> Any:
        if drawn.sure not in self._steps:
            stepped = functools.partial(self._stepped, drawn.sure)
            self._steps[drawn.sure] = self._model.tower_recovery.repeated(
                stepped
            )
        spec = tf.TensorSpec([len(drawn.rows)], tf.int32), drawn.spec
        self._last = drawn.sure, spec
        return self._steps[drawn.sure].take_once(
            (tf.constant(drawn.rows), drawn.towers), spec
        )

    def _stepped(self, sure: int | None, fed: Any) -> Any:
        """The step, in its graph, as of a batch that was split."""
        rows, towers = fed
        placement = self._model.placement
        with tf.device(host_of(placement.input_device)):
            true = tf.unstack(rows)
            may_be_empty = [sure not in (None, i) for i in range(len(true))]
            ranges = ranges_of(true, may_be_empty)
        batch, spared = self._batch(towers, ranges)
        arrivals = Arrivals(batch, placement, towers, ranges)
        with arriving(arrivals):
            result = self._step(batch.nest)
        if not arrivals.are_taken_of(spared):
            raise RuntimeError(
                "With `quick_start=True` towers take the inputs that they have "
                "read, but this step takes others. Leave out `quick_start`."
            )
        return result

    def _batch(
        self, towers: Sequence[Any], ranges: Ranges
    ) -> tuple[Batch, list[Any]]:
        """The towers' batch, and those of its leaves that are only stand-ins.

        Joined is what somebody asks for, as TensorFlow leaves out the rest. It does
        not where it is to start quickly.
        """
        model = self._model
        join = functools.partial(joined_batch, model, towers, ranges)
        if not model.quick_start or model.own_steps():
            return join(), []
        batch = join(inputs=False, targets=False)
        if self._name != "predict_step":
            if model.loses_on_towers(batch.nest):
                return batch, tf.nest.flatten(batch.nest)
            batch = join(inputs=False)
        x, *_ = keras.utils.unpack_x_y_sample_weight(batch.nest)
        return batch, tf.nest.flatten(x)

    @property
    def _is_eager(self) -> bool:
        """Whether steps run eagerly, on batches in this process."""
        eager = tf.config.functions_run_eagerly()
        return eager or bool(self._model.run_eagerly)

    def _joined(self, drawn: Drawn) -> Any:
        empty = [not count for count in drawn.rows]
        ranges = ranges_of(drawn.rows, empty)
        return joined_batch(self._model, drawn.towers, ranges).nest


def _tell_lost(reading: Reading, first: str = "") -> None:
    """Warns, once, of what is left unread as workers were lost."""
    whose = ", ".join(f"{x.index} on {x.device}" for x in reading.lost)
    reading.lost.clear()
    if whose:
        warnings.warn(
            f"A worker was lost, after {reading.count} batches were read. {first}"
            "What the datasets of these towers had still to give is not read: "
            f"{whose}. They begin anew in the first epoch to which their worker "
            "has come back.",
            stacklevel=2,
        )
