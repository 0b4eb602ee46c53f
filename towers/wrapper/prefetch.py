"""prefetch: while a step runs, the next batch is read, split and sent to the towers.

TensorFlow ends a function when all it computes is there, so what is to go on beside
a step is another function, called by another thread. It hands out the batch, which
stays where batches are split, and the shards, which stay on the towers: nobody here
reads them. The step gets both. Of which inputs its towers make nothing but casts to a
half dtype, is known when it is traced: those cross in that, and are as wide again
before it takes them.
"""

import functools
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from typing import Any

import keras
import tensorflow as tf
from absl import logging

from towers.foreign import specs, tf_calls, tf_functions
from towers.placement.device_names import HOST_HERE, process_of
from towers.reading import Drawn
from towers.verbs.arrivals import Arrivals, arriving
from towers.verbs.batch import Batch, checked_batch
from towers.verbs.split import split_shards
from towers.wrapper.loss_on_towers import whole_of_data

# With what of its own a step may look at a batch in ways that are not known.
_OWN = ("train_step", "test_step", "compute_loss")


def check_prefetch(prefetch: bool, on_lost: str) -> None:
    """Raises if these arguments of a `TowerModel` do not go together."""
    if prefetch not in (True, False):
        raise ValueError(f"`prefetch` must be True or False; got {prefetch!r}.")
    if prefetch and on_lost == "continue":
        raise ValueError(
            '`prefetch` is True, but `on_lost` is "continue", which takes a batch '
            "again with other towers than those that have its shards. Leave out "
            "one of them."
        )


class Prefetch:
    """What a model has read ahead, and the functions that do so.

    A batch that was read belongs to its iterator: it is taken by whichever function
    is given that next.

    Args:
      model: a `TowerModel`.
    """

    def __init__(self, model: Any):
        self._model = model
        self._ahead: Any = weakref.WeakKeyDictionary()

    @property
    def fetches(self) -> "list[_Fetch]":
        """What is read ahead, by iterators that are in use."""
        return list(self._ahead.values())

    def rest_of(self, iterator: Any) -> Iterator[Any]:
        """Batches that an iterator has still to give, what was read first."""
        if iterator in self._ahead:
            try:
                brought = self._brought(iterator)
            except StopIteration:  # of a `Reading`
                return
            yield brought if isinstance(brought, Drawn) else brought[0]
        yield from iterator

    def function(
        self, step: Callable[[Any], Any], otherwise: Callable[[Any], Any]
    ) -> Callable[[Any], Any]:
        """Steps with a batch of an iterator, while the next one is brought.

        An error of the dataset, or its end, comes when that next one is asked for.

        Args:
          step: what is done with a batch, Keras's own.
          otherwise: Keras's function, for what is no iterator over a dataset, or
            for batches that cannot be brought.

        Raises:
          ValueError: how the model is compiled, or its template, has other steps.
        """
        self._check()
        traces: dict[str, _Traced | None] = {}

        def stepped(data: Any) -> Any:
            if not isinstance(data, tf.data.Iterator):
                return otherwise(data)
            kind = str(data.element_spec)
            if kind not in traces:
                traces[kind] = self._traced(step, data.element_spec)
            traced = traces[kind]
            if traced is None or tf.config.functions_run_eagerly():
                if data not in self._ahead:
                    return otherwise(data)
                return otherwise(iter([self._brought(data)[0]]))
            # Who hears of what runs hears of this thread only. Then the two take
            # turns, and each step has one batch brought.
            alone = tf_calls.is_heard()
            goes_on = data in self._ahead or not alone
            try:
                batch, shards = self._next(data, traced)
            except tf.errors.OutOfRangeError:
                traced.run_out(data)
                raise
            if goes_on:
                bring = functools.partial(traced.bring, data)
                self._ahead[data] = _Fetch(bring, alone, traced)
            return traced.step(batch, shards)

        return stepped

    def drawn(self, reading: Any, draw: Callable[[], Any]) -> Any:
        """What towers have read, while the step before it ran.

        Args:
          reading: whose it is.
          draw: reads the next.
        """
        alone = tf_calls.is_heard()
        was_ahead = reading in self._ahead
        drawn = self._brought(reading) if was_ahead else draw()
        if was_ahead or not alone:
            self._ahead[reading] = _Fetch(draw, alone)
        return drawn

    def _next(self, iterator: Any, traced: "_Traced") -> Any:
        """The iterator's next batch, and its shards."""
        fetch = self._ahead.get(iterator)
        if fetch is None:
            return traced.bring(iterator)
        batch, shards = self._brought(iterator)
        if fetch.traced is traced:
            return batch, shards
        return traced.bring_again(batch)  # the function was made anew

    def _brought(self, iterator: Any) -> Any:
        """The batch that was read ahead; raises the error of reading, once."""
        outcome = self._ahead[iterator].outcome
        try:
            return outcome.result()
        finally:
            if outcome.done():  # and not interrupted
                del self._ahead[iterator]

    def _traced(
        self, step: Callable[[Any], Any], spec: Any
    ) -> "_Traced | None":
        """Functions for batches of this kind; None if they cannot be brought."""
        problem = None
        try:
            traced = _Traced(self._model, spec)
        except Exception as error:  # Keras's function says what is wrong
            problem = f"{type(error).__name__}: {error}"
        else:
            if traced.trace(step):
                return traced
            problem = "the step takes other tensors than those that were split"
        logging.warning(
            "Batches of %r are not sent ahead, though prefetch=True: %s",
            self._model.name,
            problem,
        )
        return None

    def _check(self) -> None:
        model, problems = self._model, []
        if model.run_eagerly:
            problems.append("run_eagerly=True")
        if model.steps_per_execution != 1:
            problems.append(f"steps_per_execution={model.steps_per_execution}")
        own = [name for name in _OWN if name in model.own_steps()]
        if own:
            problems.append(f"{', '.join(own)} of the model's own")
        if problems:
            raise ValueError(
                "`prefetch` is True, which brings a batch at a time to Keras's own "
                f"steps, but there is {', and '.join(problems)}. Leave that out, "
                "or `prefetch`."
            )


class _Fetch:
    """A batch that is being brought, by a thread, or at once.

    The thread does not keep a program alive, as one of a pool would: it may wait
    for data without end.
    """

    def __init__(
        self,
        bring: Callable[[], Any],
        at_once: bool,
        traced: "_Traced | None" = None,
    ):
        self.traced = traced
        self.outcome: futures.Future = futures.Future()
        if at_once:
            self._bring(bring)
            return
        threading.Thread(
            target=self._bring, args=(bring,), name="prefetch", daemon=True
        ).start()

    def _bring(self, bring: Callable[[], Any]) -> None:
        try:
            self.outcome.set_result(bring())
        except BaseException as error:  # for the step that asks for it
            self.outcome.set_exception(error)


class _Traced:
    """Functions for a kind of batch: that bring it, and step with it.

    Args:
      model: a `TowerModel`.
      spec: what the dataset's elements are, with open rows if the last batch may
        be smaller.
    """

    def __init__(self, model: Any, spec: Any):
        self._model, self._spec = model, spec
        self._halves: Mapping[int, tf.DType] = {}
        self._bring = self._bringing()
        self._bring_again = tf.function(
            self._sent, autograph=False, reduce_retracing=True
        )
        self._begun = tf.function(
            lambda iterator: self._step(*self._bring(iterator)), autograph=False
        )

    def _bringing(self) -> Any:
        def brought(iterator: Any) -> Any:
            return self._sent(iterator.get_next())

        bring = tf.function(brought, autograph=False)
        with tf.device(HOST_HERE):
            return bring.get_concrete_function(tf.data.IteratorSpec(self._spec))

    def bring(self, iterator: Any) -> Any:
        """Reads a batch; it and a nest of its shards per tower, on that."""
        with tf.device(HOST_HERE):
            return self._bring(iterator)

    def bring_again(self, batch: Any) -> Any:
        """As `bring`, for a batch that was read for another function."""
        with tf.device(HOST_HERE):
            return self._bring_again(batch)

    def step(self, batch: Any, shards: Any) -> Any:
        """What the step says of a batch that was brought."""
        with tf.device(self._device):
            return self._step(batch, shards)

    def run_out(self, iterator: Any) -> None:
        """The step that Keras begins at the end of data, see `repeated_step`."""
        with tf.device(self._device):
            self._begun(iterator)

    def trace(self, step: Callable[[Any], Any]) -> bool:
        """Traces the step; whether it takes what is brought, and all of it."""
        model, arrivals = self._model, []

        def run(batch: Any, shards: Any) -> Any:
            shared = _shared(model, batch)
            arrivals.append(Arrivals(shared, model.placement, shards))
            with arriving(arrivals[-1]):
                logs = step(batch)
            if not self._is_away:
                return logs
            with tf.device(HOST_HERE):  # see `BroughtStep`
                return tf.nest.map_structure(tf.identity, logs)

        outputs = self._bring.structured_outputs
        arguments = tf.nest.map_structure(specs.of, outputs)
        function = tf.function(run, autograph=False)
        with tf.device(self._device):
            self._step = function.get_concrete_function(*arguments)
        if arrivals[-1].halves:
            self._halves = arrivals[-1].halves
            self._bring = self._bringing()
        return arrivals[-1].are_taken

    @property
    def _is_away(self) -> bool:
        """Whether outputs are on another process."""
        return bool(process_of(str(self._model.placement.output_device)))

    @property
    def _device(self) -> str:
        outputs = str(self._model.placement.output_device)
        return HOST_HERE if self._is_away else outputs

    def _sent(self, element: Any) -> Any:
        """A batch where the step wants it, and its shards where the towers are."""
        tf_functions.return_where_made()
        placement = self._model.placement
        batch = tf.nest.map_structure(_left_out, element)
        shared = {id(x) for x in _leaves(_shared(self._model, batch))}

        def moved(leaf: Any) -> Any:
            if id(leaf) in shared:
                with tf.device(placement.input_device):
                    return tf.identity(leaf)
            if isinstance(leaf, tf.Tensor) and leaf.dtype != tf.string:
                with tf.device(placement.output_device):
                    return tf.identity(leaf)
            return leaf

        batch = tf.nest.map_structure(moved, batch)
        split = split_shards(_shared(self._model, batch), placement)
        split = split.narrowed(self._halves, placement.devices)
        shards = []
        for device, shard in zip(placement.devices, split.fed):
            with tf.device(device):
                shards.append(tf.nest.map_structure(_same, shard))
        return batch, shards


def _shared(model: Any, batch: Any) -> Batch:
    """The part of a batch that a step splits over the towers."""
    x, y, weights = keras.utils.unpack_x_y_sample_weight(batch)
    if model.loses_on_towers(batch):
        return checked_batch((x, y, weights), whole=whole_of_data(model))
    return checked_batch(x, whole=model.whole)


def _leaves(batch: Batch) -> list[Any]:
    return [x for x in tf.nest.flatten(batch.nest) if x is not None]


def _left_out(leaf: Any) -> Any:
    """The leaf, or None for the Optional that Keras makes of a None."""
    return None if isinstance(leaf, tf.experimental.Optional) else leaf


def _same(leaf: Any) -> Any:
    return None if leaf is None else tf.identity(leaf)
