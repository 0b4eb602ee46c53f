"""callbacks: report and timeline of one step in the middle of a `fit`."""

import itertools
import os
import warnings
from typing import Any

import keras
import tensorflow as tf

from towers.planning.timeline import Timeline, timeline
from towers.report.report import ExecutionReport, execution_report


class PlacementReport(keras.callbacks.Callback):
    """Reports once in a `fit` what a step ran where, and when, to TensorBoard.

    The step is repeated for it, and what it changed is put back, so training
    goes on as it would have. `log_dir` gets the executed graph, bytes,
    transfers and busy shares as scalars, and for a browser `report.html`; with
    `timeline`, `step.json`, which Perfetto opens.

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
        epochs. The first one includes tracing.
      timeline: whether to measure when things ran, too.

    Attributes:
      report: the `ExecutionReport`; None before.
      timeline: the `Timeline`; None before, or if it is not asked for.

    Raises:
      ValueError: `batch` is no whole number from 1 on.
    """

    def __init__(self, log_dir: Any, batch: int = 2, timeline: bool = True):
        super().__init__()
        if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
            raise ValueError(
                "`batch` must be a whole number from 1 on, the step to report; "
                f"got {batch!r}."
            )
        self.log_dir = os.fspath(log_dir)
        self.batch = batch
        self.report: ExecutionReport | None = None
        self.timeline: Timeline | None = None
        self._timed = timeline
        self._seen = 0

    def on_train_begin(self, logs: Any = None) -> None:
        self._seen = 0

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self._seen += 1
        if self._seen != self.batch:
            return
        if self.model.run_eagerly:
            warnings.warn(
                "PlacementReport has nothing to tell of a model that runs "
                "eagerly: compile it without run_eagerly=True.",
                stacklevel=2,
            )
            return
        original = self.model.train_function

        def step(iterator: Any) -> Any:
            self.model.train_function = original
            if not isinstance(iterator, tf.data.Iterator):
                warnings.warn(
                    "PlacementReport repeats a step on the same batch, which "
                    f"it cannot take from a {type(iterator).__name__}.",
                    stacklevel=2,
                )
                return original(iterator)
            count = self.model.steps_per_execution
            batches = list(itertools.islice(iterator, count))
            if batches:
                self._tell(original, batches)
            return original(_again(batches) if batches else iterator)

        self.model.train_function = step

    def _tell(self, step: Any, batches: list[Any]) -> None:
        def run() -> None:
            step(_again(batches))

        self.report = execution_report(run)
        self.report.save(self._path("report.html"))
        self.report.write_graph(self.log_dir)
        scalars: dict[str, float] = {
            "placement/total_bytes": self.report.total_bytes,
            "placement/transfers": len(self.report.transfers),
        }
        for (source, target), count in self.report.bytes_between.items():
            scalars[f"placement/bytes{source} to {target}"] = count
        if self._timed:
            self.timeline = timeline(run)
            self.timeline.save(self._path("step.json"))
            total = self.timeline.seconds
            parts = {**self.timeline.busy, **self.timeline.towers}
            for name, seconds in parts.items():
                share = seconds / total if total else 0.0
                scalars[f"placement/busy/{name.removeprefix('/')}"] = share
        writer = tf.summary.create_file_writer(self.log_dir)
        with writer.as_default(step=self.batch):
            for name, value in scalars.items():
                tf.summary.scalar(name, float(value))
        writer.close()

    def _path(self, name: str) -> str:
        os.makedirs(self.log_dir, exist_ok=True)
        return os.path.join(self.log_dir, name)


def _again(batches: list[Any]) -> Any:
    """An iterator over batches that were taken from another one."""
    data = tf.data.Dataset.from_tensors(batches[0])
    for batch in batches[1:]:
        data = data.concatenate(tf.data.Dataset.from_tensors(batch))
    return iter(data)
