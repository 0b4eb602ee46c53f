"""feeding: `fit`, `evaluate` and `predict` given what each tower reads itself."""

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from towers.foreign import keras_data
from towers.inputs_per_tower import PerTower, per_tower
from towers.reading import Reading, check_fits
from towers.verbs.batch import is_per_tower, refuse_per_tower

_KIND = "towers.per_tower"
# What datasets tell themselves: what it is, by the argument's name.
_OF_DATASETS = {
    "y": "the targets",
    "sample_weight": "the sample weights",
    "batch_size": "the size of batches",
    "validation_batch_size": "the size of batches",
}


def fed(
    model: Any, method: str, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Any, Any]:
    """Arguments of a method of Keras's, with what it can loop over in the place
    of what `per_tower` made, which is among them.

    Raises:
      ValueError: the method takes no such inputs, or not with these arguments.
    """
    values = _parts([*args, *kwargs.values()])
    if method not in ("fit", "evaluate", "predict"):
        refuse_per_tower(values, method)
    names = list(inspect.signature(getattr(keras.Model, method)).parameters)
    arguments = {**dict(zip(names[1:], args)), **kwargs}
    if is_per_tower(arguments.get("x")):
        _check_alone(arguments)
        weights = arguments.pop("class_weight", None)
        arguments["x"] = _epochs(model, arguments["x"], method, weights)
    if is_per_tower(arguments.get("validation_data")):
        if arguments.get("validation_batch_size"):
            raise _not_beside("validation_batch_size")
        data = arguments["validation_data"]
        arguments["validation_data"] = _epochs(model, data, method)
    refuse_per_tower(_parts(arguments.values()), method)
    return (), arguments


def _parts(values: Iterable[Any]) -> list[Any]:
    """The values, and what is in tuples, as `validation_data` may be one."""
    return [
        part
        for value in values
        for part in (
            value
            if isinstance(value, tuple) and not is_per_tower(value)
            else [value]
        )
    ]


class _Feed:
    """What an epoch loops over."""

    def __init__(self, model: Any, data: PerTower):
        self._whole, self._recovery = model.whole, model.tower_recovery
        self._data = data
        self._now: Reading | None = None
        recovery = self._recovery
        check_fits(data, recovery.whole_placement, recovery.towers_now())

    def __iter__(self) -> Iterator[Any]:
        recovery = self._recovery
        recovery.catch_up()
        self._now = Reading(
            self._data,
            recovery.whole_placement,
            recovery.towers_now(),
            self._whole,
        )
        return self._now

    def count(self) -> int | None:
        """How many batches there are, until the last tower ends."""
        recovery = self._recovery
        read = self._data.read_for(
            recovery.whole_placement, recovery.towers_now()
        )
        lengths = [x for x in read.lengths if x is not None]
        return max(lengths) if len(lengths) == len(read.lengths) else None

    def begin(self) -> None:
        """Has towers that have come back read on, in what goes on for epochs."""
        if self._now is not None:
            self._now.begin(self._recovery.towers_now())


def _epochs(
    model: Any, data: Any, method: str, class_weight: Any = None
) -> keras_data.Epochs:
    refuse_per_tower([] if isinstance(data, PerTower) else [data], method)
    if class_weight is not None:
        data = _weighted(data, class_weight)
    feed = _Feed(model, data)
    return keras_data.Epochs(feed, feed.count, feed.begin)


def _weighted(data: PerTower, class_weight: Any) -> PerTower:
    """The same, with the weights of classes, made where it is read."""

    def dataset_fn(tower: Any) -> tf.data.Dataset:
        weights = keras_data.weighted_by_class(class_weight)
        return data.dataset_fn(tower).map(weights)

    return per_tower(dataset_fn)


def _check_alone(arguments: Mapping[str, Any]) -> None:
    """Raises if there is an argument beside of which the datasets say all."""
    for name in _OF_DATASETS:
        if arguments.get(name) is not None and name != "validation_batch_size":
            raise _not_beside(name)
    if arguments.get("shuffle"):
        raise ValueError(
            f"`shuffle=True` was passed, but the data `x` was provided as a {_KIND}. "
            "Its datasets are expected to already be shuffled (via "
            "`.shuffle(buffer_size)`)."
        )
    if arguments.get("validation_split"):
        raise ValueError(
            "Argument `validation_split` is only supported for tensors or NumPy "
            f"arrays. Found incompatible type in the input: {_KIND}. Pass "
            f"`validation_data`, another {_KIND}."
        )


def _not_beside(name: str) -> ValueError:
    return ValueError(
        f"When providing `x` as a {_KIND}, `{name}` should not be passed. "
        f"Instead, {_OF_DATASETS[name]} should be included as part of its "
        "datasets."
    )
