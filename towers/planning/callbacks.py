"""callbacks: report and timeline of one step in the middle of a `fit`."""

import contextlib
import functools
import itertools
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from towers.planning.timeline import Timeline, timeline
from towers.reading import Reading
from towers.report.execution import execution_report
from towers.report.report import ExecutionReport
from towers.wrapper.tower_model import TowerModel


class PlacementReport(keras.callbacks.Callback):
    """Reports once in a `fit` what a step ran where, and when, to TensorBoard.

    The step is repeated for it, and the variables that it changed are put back,
    those that it made among them, so training goes on as it would have; what
    cannot be measured is warned of. What else a step does, such as drawing from an
    iterator of its own, is done each time. `log_dir` gets the executed graph, bytes,
    transfers and busy shares as scalars, and for a browser `report.html`; with
    `timeline`, `step.html` and `step.json`, which Perfetto opens.

    >>> model = keras.Sequential([keras.Input([3]), keras.layers.Dense(2)])
    >>> model = towers.TowerModel(model, towers.Placement(["/CPU:0", "/CPU:1"]))
    >>> model.compile("sgd", "mse")
    >>> seen = towers.PlacementReport(tempfile.mkdtemp(), timeline=False)
    >>> history = model.fit(np.ones([12, 3]), np.ones([12, 2]), batch_size=6,
    ...                     verbose=0, callbacks=[seen])
    >>> seen.report.bytes_between["/CPU:0", "/CPU:1"]
    92

    Args:
      log_dir: the folder that TensorBoard looks at.
      batch: which call of the train function, counted from 1 on over all
        epochs.
      timeline: whether to measure when things ran, too.

    Attributes:
      report: the `ExecutionReport`; None before.
      timeline: the `Timeline`; None before, or if it is not asked for.

    Raises:
      ValueError: `batch` is no whole number from 1 on, or nothing can be written
        to `log_dir`.
    """

    def __init__(self, log_dir: Any, batch: int = 2, timeline: bool = True):
        super().__init__()
        if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
            raise ValueError(
                "`batch` must be a whole number from 1 on, the step to report; "
                f"got {batch!r}."
            )
        self.log_dir = _writable(os.fspath(log_dir))
        self.batch = batch
        self.report: ExecutionReport | None = None
        self.timeline: Timeline | None = None
        self._timed = timeline
        self._batches = 0

    def on_train_begin(self, logs: Any = None) -> None:
        self._batches = 0

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        # Keras begins another batch when a dataset of no known size has ended.
        if self._batches + 1 != self.batch:
            return
        if self.model.run_eagerly or tf.config.functions_run_eagerly():
            warnings.warn(
                "PlacementReport has nothing to tell of a model that runs "
                "eagerly: compile it without run_eagerly=True.",
                stacklevel=2,
            )
            return
        original = self.model.train_function

        def step(iterator: Any) -> Any:
            self.model.train_function = original
            return self._repeated(original, iterator)

        self.model.train_function = step

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self._batches += 1

    def on_train_end(self, logs: Any = None) -> None:
        if self._batches < self.batch:
            warnings.warn(
                f"PlacementReport was to report step {self.batch}, but there "
                f"were {self._batches}: expected a smaller `batch`.",
                stacklevel=2,
            )

    def _repeated(self, step: Any, iterator: Any) -> Any:
        """The logs of a step that is first measured, with the same batches."""
        if isinstance(iterator, Reading):
            again = iterator.put_back
        elif isinstance(iterator, tf.data.Iterator):
            again = functools.partial(_again, iterator.element_spec)
        else:
            warnings.warn(
                "PlacementReport repeats a step on the same batch, which "
                f"it cannot take from a {type(iterator).__name__}.",
                stacklevel=2,
            )
            return step(iterator)
        batches = self._drawn(iterator)
        if not batches:
            return step(iterator)

        def run() -> Any:
            return step(again(batches))

        scalars: dict[str, float] = {}
        with _only_warned("where a step runs"):
            scalars.update(self._where(run))
        with _only_warned("when a step runs"):
            scalars.update(self._when(run) if self._timed else {})
        with _only_warned("a step for TensorBoard"):
            _write(scalars, self.log_dir, self.batch)
        return run()

    def _drawn(self, iterator: Any) -> list[Any]:
        """The batches of a step, those that were read ahead first."""
        source = iterator
        if isinstance(self.model, TowerModel):
            source = self.model.read_ahead.rest_of(iterator)
        count = self.model.steps_per_execution
        try:
            return list(itertools.islice(source, count))
        except tf.errors.OutOfRangeError:  # as it was read ahead
            return []

    def _where(self, run: Callable[[], Any]) -> dict[str, float]:
        """Reports a step; the scalars of it."""
        self.report = execution_report(run)
        self.report.save(os.path.join(self.log_dir, "report.html"))
        self.report.write_graph(self.log_dir)
        scalars: dict[str, float] = {
            "placement/total_bytes": self.report.total_bytes,
            "placement/transfers": len(self.report.transfers),
        }
        for (source, target), count in self.report.bytes_between.items():
            scalars[f"placement/bytes{source} to {target}"] = count
        return scalars

    def _when(self, run: Callable[[], Any]) -> dict[str, float]:
        """Times a step; the scalars of it."""
        self.timeline = timeline(run)
        for name in ("step.html", "step.json"):
            self.timeline.save(os.path.join(self.log_dir, name))
        total = self.timeline.seconds
        parts = {**self.timeline.busy, **self.timeline.towers}
        return {
            f"placement/busy/{name.removeprefix('/')}": seconds / (total or 1.0)
            for name, seconds in parts.items()
        }


@contextlib.contextmanager
def _only_warned(what: str) -> Iterator[None]:
    """While open, errors are warnings; those of the step `fit` will raise."""
    try:
        yield
    except Exception as error:
        warnings.warn(
            f"PlacementReport could not tell {what}, and training goes on: "
            f"{type(error).__name__}: {error}",
            stacklevel=3,
        )


def _writable(folder: str) -> str:
    """The folder, made if it was not there.

    Raises:
      ValueError: nothing can be written there.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise ValueError(
            f"`log_dir` is {folder!r}, where nothing can be written: "
            f"{error.strerror}. Expected a folder for TensorBoard."
        ) from error


def _again(spec: Any, batches: list[Any]) -> Any:
    """An iterator over batches that were taken from another one.

    Of the same spec, so that the step is not traced for it.
    """
    experimental = tf.data.experimental
    parts = []
    for batch in batches:
        part = tf.data.Dataset.from_tensors(
            tf.nest.map_structure(_left_in, spec, batch)
        )
        variant = experimental.to_variant(part)
        parts.append(experimental.from_variant(variant, spec))
    return iter(functools.reduce(tf.data.Dataset.concatenate, parts))


def _left_in(spec: Any, leaf: Any) -> Any:
    """The leaf, or the empty Optional that Keras has for a None."""
    if leaf is None and isinstance(spec, tf.OptionalSpec):
        return tf.experimental.Optional.empty(None)
    return leaf


def _write(scalars: dict[str, float], folder: str, step: int) -> None:
    """Writes scalars for TensorBoard, which need not be here."""
    kind = tf.compat.v1.SummaryMetadata()
    kind.plugin_data.plugin_name = "scalars"
    writer = tf.summary.create_file_writer(folder)
    with writer.as_default(step=step):
        for name, value in scalars.items():
            tf.summary.write(name, np.float32(value), metadata=kind)
    writer.close()
