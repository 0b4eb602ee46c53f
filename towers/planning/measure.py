"""measure_weights: shares under which unequal devices take equally long."""

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from towers.builder import build_towers
from towers.keras_model.checks import check_model
from towers.placement.layer_devices import devices_of
from towers.placement.placement import Placement, check_placement
from towers.verbs.batch import checked_batch
from towers.verbs.scatter import first_rows

_ROUNDS = 5


@dataclasses.dataclass(frozen=True)
class Speed:
    """How long steps of a device take: `start + rows * per_row`, in seconds."""

    start: float
    per_row: float

    def rows_in(self, seconds: float) -> float:
        """The number of rows that a step of so many seconds has."""
        return max(0.0, (seconds - self.start) / self.per_row)


def measure_weights(
    model: Any, placement: Placement, inputs: Any, targets: Any = None
) -> Placement:
    """The placement, with shares under which its towers take equally long.

    Each device computes a few batches, of different numbers of rows, alone and
    in turn; what it takes is fitted by a line in its rows. The shares are those
    at which all lines meet. A device that takes longer to start than others for
    the whole batch gets no rows. No variable is changed.

    >>> model = keras.Sequential([keras.Input([3]), keras.layers.Dense(2)])
    >>> placement = towers.Placement(["/CPU:0", "/CPU:1"])
    >>> measured = towers.measure_weights(model, placement, np.ones([64, 3]))
    >>> abs(sum(measured.weights) - 1) < 1e-6
    True
    >>> print(measured)  # doctest: +ELLIPSIS
    tower_0 on /CPU:0 ... ms and ... ms for each 1,000 rows...

    Devices that share cores, as logical CPU devices do, look faster alone than
    they are together.

    Args:
      model: a built `keras.Model`, or a `TowerModel`.
      placement: whose towers are measured; its weights are not asked.
      inputs: a batch of the size that is meant, [rows, ...] tensors or arrays.
      targets: [rows, ...], for a training step: with the loss that the model is
        compiled with, else the mean square of the outputs. Without, only the
        forward pass is measured.

    Returns:
      A `Placement` with `weights`, which sum to 1, and `reasons`.

    Raises:
      TypeError: the model or the placement is of the wrong kind.
      ValueError: there are fewer rows than towers.
    """
    check_model(model)
    check_placement(placement)
    arguments = (inputs,) if targets is None else (inputs, targets)
    batch = checked_batch(arguments).nest
    rows = min(x.shape[0] for x in tf.nest.flatten(batch) if x is not None)
    n = len(placement.devices)
    if rows < n:
        raise ValueError(
            f"`inputs` has {rows} rows for {n} towers, too few to measure "
            "shares. Give a batch of the size that you train with."
        )
    alike = [_place_of(placement, i) for i in range(n)]
    places = [*dict.fromkeys(alike)]
    sizes = sorted({max(1, rows // k) for k in (4 * n, 2 * n, n)} | {rows})
    steps = [_step(model, _only(placement, alike.index(p))) for p in places]
    with _uncounted(model):
        speeds = _speeds(steps, batch, sizes)
    shares, seconds = _shares(speeds, rows)
    # Towers that are on one device share what that gets.
    weights = [shares[places.index(p)] / alike.count(p) for p in alike]
    reasons = [
        f"{' and '.join(dict.fromkeys(p))} takes {1e3 * s.start:.3g} ms and "
        f"{1e6 * s.per_row:.3g} ms for each 1,000 rows"
        + (
            f": {share:.1%} of {rows:,} rows"
            if share
            else f": no rows, as the others take {1e3 * seconds:.3g} ms for all "
            f"{rows:,}"
        )
        for p, s, share in zip(places, speeds, shares)
    ]
    return dataclasses.replace(
        placement, weights=weights, reasons=tuple(reasons)
    )


@contextlib.contextmanager
def _uncounted(model: Any) -> Iterator[None]:
    """While open, metrics may count, as a loss does, and are then as before."""
    counted = {
        id(v): (v, v.numpy()) for m in model.metrics for v in m.variables
    }
    try:
        yield
    finally:
        for metric in model.metrics:
            if any(id(v) not in counted for v in metric.variables):
                metric.reset_state()  # made meanwhile
        for variable, value in counted.values():
            variable.assign(value)


def _place_of(placement: Placement, tower: int) -> tuple[str, ...]:
    """The devices that a tower uses, and others of its kind."""
    pins = [
        device
        for pin in placement.layer_devices.values()
        if isinstance(pin, tuple)
        for device in devices_of(pin[tower])
    ]
    return (placement.devices[tower], *pins)


def _only(placement: Placement, tower: int) -> Placement:
    """The placement with one of its towers."""
    return dataclasses.replace(
        placement,
        devices=[placement.devices[tower]],
        weights=None,
        layer_devices={
            key: pin[tower] if isinstance(pin, tuple) else pin
            for key, pin in placement.layer_devices.items()
        },
    )


def _step(model: Any, placement: Placement) -> Callable[..., Any]:
    """A step of one tower that changes nothing, and returns one number."""
    template = getattr(model, "template", model)

    def outputs_of(inputs: Any, training: bool) -> Any:
        graph = build_towers(template, inputs, placement, training)
        _ = graph.updates  # or it is warned that nobody applies them
        return graph.outputs

    def loss_of(inputs: Any, outputs: Any, targets: Any) -> tf.Tensor:
        if model.compiled:
            loss = model.compute_loss(x=inputs, y=targets, y_pred=outputs)
            return tf.convert_to_tensor(loss)
        return mean_square(outputs)

    def step(inputs: Any, *targets: Any) -> tf.Tensor:
        with tf.device(str(placement.output_device)):
            if not targets:
                return mean_square(outputs_of(inputs, False))
            with tf.GradientTape() as tape:
                outputs = outputs_of(inputs, True)
                loss = loss_of(inputs, outputs, *targets)
            gradients = tape.gradient(loss, template.trainable_variables)
            dense = [
                tf.convert_to_tensor(g) for g in gradients if g is not None
            ]
            # What nobody takes would not be computed.
            return tf.add_n(
                [tf.reduce_sum(tf.cast(g, tf.float32)) for g in dense]
            )

    return tf.function(step, autograph=False, reduce_retracing=True)


def mean_square(outputs: Any) -> tf.Tensor:
    """The sum of the outputs' mean squares, where no loss is known."""
    return tf.add_n(
        [
            tf.reduce_mean(tf.square(tf.cast(y, tf.float32)))
            for y in tf.nest.flatten(outputs)
            if y is not None
        ]
    )


def _speeds(
    steps: Sequence[Callable[..., Any]], batch: Any, sizes: Sequence[int]
) -> list[Speed]:
    """What each step takes by rows, fitted to medians of interleaved rounds."""
    cut = {size: [_first(part, size) for part in batch] for size in sizes}
    taken: dict[tuple[int, int], list[float]] = {}
    for k in range(_ROUNDS + 1):
        for size in sizes:
            for i, step in enumerate(steps):
                start = time.perf_counter()
                float(step(*cut[size]))
                if k:  # not the round in which steps are traced
                    taken.setdefault((i, size), []).append(
                        time.perf_counter() - start
                    )
    speeds = []
    for i in range(len(steps)):
        seconds = [statistics.median(taken[i, size]) for size in sizes]
        per_row, start = (
            np.polyfit(sizes, seconds, 1)
            if len(sizes) > 1
            else (seconds[0] / sizes[0], 0.0)
        )
        if start < 0 or per_row <= 0:  # a line through the origin
            start = 0.0
            per_row = np.dot(sizes, seconds) / np.dot(sizes, sizes)
        speeds.append(Speed(float(start), max(float(per_row), 1e-12)))
    return speeds


def _first(nest: Any, rows: int) -> Any:
    return tf.nest.map_structure(
        lambda x: None if x is None else first_rows(x, rows), nest
    )


def _shares(speeds: Sequence[Speed], rows: int) -> tuple[list[float], float]:
    """Each device's part of the rows, and the seconds in which all are ready.

    By bisection: the longer a step, the more rows it has.
    """
    low, high = 0.0, min(s.start + rows * s.per_row for s in speeds)
    for _ in range(100):
        middle = (low + high) / 2
        if sum(s.rows_in(middle) for s in speeds) < rows:
            low = middle
        else:
            high = middle
    counts = [s.rows_in(high) for s in speeds]
    # Less than one row would not be worth the start.
    counts = [x if x >= 1 else 0.0 for x in counts]
    return [x / sum(counts) for x in counts], high
