"""repeated_step: a step that happens once, though a worker dies in it.

A step that failed may have been applied in part. So what it may change, all
variables that its function knows, is kept before it is taken, on this process,
and put back before the same batch is taken again by the towers that are left.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from towers.cluster import cluster as clusters
from towers.cluster.lost import WorkerLost
from towers.foreign import specs
from towers.placement.device_names import HOST_HERE


class RepeatedStep:
    """Takes a batch from an iterator, once, and steps with it until that is done.

    Args:
      step: from a batch to logs, or outputs; is traced once for each placement.
      placed_now: names the placement for which a step is traced.
      go_on: makes another placement when a worker is lost.
    """

    def __init__(
        self,
        step: Callable[[Any], Any],
        placed_now: Callable[[], tuple[str, ...]],
        go_on: Callable[[], None],
    ):
        self._step = step
        self._placed_now = placed_now
        self._go_on = go_on
        self._traced: dict[Any, _TracedStep] = {}

    def __call__(self, iterator: Any) -> Any:
        spec = getattr(iterator, "element_spec", None)
        try:
            batch = next(iterator)
        except StopIteration:
            if spec is not None:
                run_out(self.take, spec)
            raise
        if spec is None:  # of train_on_batch
            batch = tf.nest.map_structure(_tensor, batch)
            spec = tf.nest.map_structure(_open, batch)
        return self.take(batch, spec)

    def predict(self, batch: Any) -> Any:
        """A prediction of the one batch in a list."""
        batch = tf.nest.map_structure(_tensor, batch[0])
        return self.take(batch, tf.nest.map_structure(_open, batch))

    def take(self, batch: Any, spec: Any) -> Any:
        """What the step says of this batch."""
        cluster = clusters.current()
        while True:
            if cluster.lost() or not cluster.has(self._placed_now()):
                self._go_on()
            try:
                return self.take_once(batch, spec)
            except WorkerLost:
                self._go_on()

    def take_once(self, batch: Any, spec: Any) -> Any:
        """As `take`, if no worker is lost; else all is as it was before.

        Raises:
          WorkerLost: one is.
        """
        traced, before = None, None
        try:
            with clusters.current().guard():
                traced = self._traced_for(spec)
                before = traced.keep()
                return traced.step(batch)
        except WorkerLost:
            if traced is not None and before is not None:
                traced.put_back(before)
            raise

    def _traced_for(self, spec: Any) -> "_TracedStep":
        key = (self._placed_now(), str(spec))
        if key not in self._traced:
            self._traced[key] = _TracedStep(self._step, spec)
        return self._traced[key]


class BroughtStep(RepeatedStep):
    """Takes a step once, and brings what it says to this process.

    Reading a tensor of another process waits for it with Python locked, so that
    nobody could notice that the worker is lost; calling a function does not.
    """

    def take(self, batch: Any, spec: Any) -> Any:
        return self.take_once(batch, spec)

    def take_once(self, batch: Any, spec: Any) -> Any:
        with tf.device(HOST_HERE):
            return self._traced_for(spec).step(batch)


class _TracedStep:
    """A step traced for a placement and a kind of batch."""

    def __init__(self, step: Callable[[Any], Any], spec: Any):
        def run(batch: Any) -> Any:
            result = step(
                tf.nest.map_structure(
                    lambda x: (
                        None if isinstance(x, tf.experimental.Optional) else x
                    ),
                    batch,
                )
            )
            with tf.device(HOST_HERE):
                return tf.nest.map_structure(_here, result)

        function = tf.function(run, autograph=False)
        self._step = function.get_concrete_function(spec)
        self._begun = tf.function(
            lambda batches: self._step(_next(batches, spec)), autograph=False
        )
        variables = list(self._step.variables)

        def keep() -> list[tf.Tensor]:
            return [tf.identity(v.read_value()) for v in variables]

        def put_back(values: list[tf.Tensor]) -> None:
            for variable, value in zip(variables, values):
                variable.assign(value)

        self.keep = tf.function(keep, autograph=False)
        self.put_back = tf.function(put_back, autograph=False)

    def step(self, batch: Any) -> Any:
        """What the step says of a batch, or of an iterator's next.

        It begins before there is one.
        """
        if isinstance(batch, tf.data.Iterator):
            return self._begun(batch)
        return self._step(batch)


def run_out(take: Callable[[Any, Any], Any], spec: Any) -> None:
    """Takes the step that Keras begins at the end of data whose length is open.

    It has no batch, and does what takes none: seeds move on, an optimizer counts
    a step.

    Args:
      take: of a `RepeatedStep`.
      spec: of the batches that there were.
    """
    leaves = tuple(tf.nest.flatten(spec))
    none = tf.data.Dataset.from_generator(list, output_signature=leaves)
    with contextlib.suppress(tf.errors.OutOfRangeError):
        take(iter(none), spec)


def _next(batches: Any, spec: Any) -> Any:
    """An iterator's next leaves, as a batch."""
    return tf.nest.pack_sequence_as(spec, batches.get_next())


def _here(leaf: Any) -> Any:
    return tf.identity(leaf) if isinstance(leaf, tf.Tensor) else leaf


def _tensor(leaf: Any) -> Any:
    if leaf is None or isinstance(
        leaf, (tf.Tensor, tf.RaggedTensor, tf.SparseTensor)
    ):
        return leaf
    return tf.convert_to_tensor(leaf)


def _open(leaf: Any) -> Any:
    """Of any number of rows, so that a last small batch is no other kind."""
    return specs.of(leaf, None)
