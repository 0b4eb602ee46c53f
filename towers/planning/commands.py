"""commands: what the command line does with a model, its devices and a step."""

import importlib
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from towers.cluster.cluster import task_of
from towers.keras_model import signature
from towers.placement.placement import Placement
from towers.placement.policies import POLICIES
from towers.planning import machines, pictures
from towers.report import figure
from towers.report.text import text_table
from towers.wrapper.tower_model import TowerModel

_ENDINGS = {"html": ".html", "json": ".json", "save": ".json"}


def device_table() -> str:
    """What TensorFlow sees: names, kinds, memory."""
    rows = [("device", "kind", "bytes in use", "most")]
    physical = {
        d.name.removeprefix("/physical_device:"): d
        for d in tf.config.list_physical_devices()
    }
    for device in tf.config.list_logical_devices():
        name = device.name.removeprefix("/device:")
        details = (
            tf.config.experimental.get_device_details(physical[name])
            if name in physical
            else {}
        )
        try:
            memory = tf.config.experimental.get_memory_info(name)
            used = [f"{memory[key]:,}" for key in ("current", "peak")]
        except (ValueError, tf.errors.OpError):  # it does not tell, on CPUs
            used = ["?", "?"]
        kind = details.get("device_name", device.device_type)
        rows.append((f"/{name}", kind, *used))
    return text_table(rows)


def placement_of(
    devices: Sequence[str],
    weights: Sequence[str] | None = None,
    parameters: str = "/CPU:0",
    available: str | None = None,
) -> Placement:
    """A placement, on logical CPU devices that are made if they are named.

    Args:
      devices, weights, available: as for `Placement`.
      parameters: a device, or the name of a policy.

    Raises:
      TypeError, ValueError, RuntimeError: as `Placement` does.
    """
    named = [*devices, parameters]
    matches = [re.fullmatch(r"/?(?:device:)?cpu:(\d+)", d, re.I) for d in named]
    count = max([int(match[1]) for match in matches if match], default=0) + 1
    if count > 1:
        Placement.cpus(count)
    if parameters not in POLICIES and ":" not in parameters:
        raise ValueError(
            f"--parameters={parameters} is neither a device, such as /CPU:0, nor "
            f"one of {', '.join(POLICIES)}."
        )
    return Placement(
        list(devices),
        weights=[_share(w) for w in weights] if weights else None,
        parameter_device=parameters,
        available=available,
    )


def _share(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(
            f"--weights must be numbers, one per device, such as 3,1; got {text}."
        ) from None


def machine_for(devices: Sequence[str], gpus: int | None = None) -> Any:
    """The least machine that has the devices, or a list of them if workers have.

    Args:
      devices: names.
      gpus: how many each machine has; by default as many as are named.

    Raises:
      ValueError: a name is of no CPU or GPU.
    """
    for name in devices:
        kind = tf.DeviceSpec.from_string(name).device_type
        if kind not in ("CPU", "GPU"):
            raise ValueError(
                f"{name!r} is no device of a machine. Expected /CPU:0 or /GPU:3."
            )
    last = max([t for t in map(task_of, devices) if t is not None], default=-1)
    of_each = [
        machines.least_machine(d for d in devices if task_of(d) == task)
        for task in ([None] if last < 0 else range(last + 1))
    ]
    for machine in of_each:
        machine["GPU"] = machine["GPU"] if gpus is None else gpus
    return of_each[0] if last < 0 else of_each


def loaded(source: str) -> keras.Model:
    """A model from a file, in Keras's safe mode, or of "module:function".

    What is a model already, "module:model", is taken as it is.

    Raises:
      ValueError: there is no such file or function, or it is no model.
    """
    if os.path.exists(source):
        try:
            return keras.saving.load_model(
                source, compile=False, safe_mode=True
            )
        except Exception as error:
            raise ValueError(
                f"{source} cannot be loaded as a Keras model: {_line(error)}"
            ) from error
    name, colon, function = source.partition(":")
    if not colon or not function:
        raise ValueError(
            f"There is no file {source}. Expected a saved model, or "
            "'module:function' that returns one."
        )
    sys.path.insert(0, os.getcwd())
    try:
        model = getattr(importlib.import_module(name), function)
        if not isinstance(model, keras.Model):  # a function or a class
            model = model()
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"{source} gave no model: {type(error).__name__}: {_line(error)}"
        ) from error
    if not isinstance(model, keras.Model):
        raise ValueError(
            f"{source} returned a {type(model).__name__}, not a keras.Model."
        )
    return model


def step_of(
    model: keras.Model,
    placement: Placement,
    rows: int,
    kind: str = "train",
    length: int = 16,
    optimizer: str = "sgd",
) -> tuple[Any, ...]:
    """A step of a model in towers, as a function and its arguments.

    Args:
      model: a built model.
      placement: where.
      rows: of the batch, of random values.
      kind: "train", on the mean squared error to random targets, or
        "predict".
      length: what stands for a dimension that the model leaves open.
      optimizer: its name.

    Raises:
      ValueError: the model is not built, or `rows` is below 1.
    """
    inputs = batch_of(model, rows, length)
    towered = TowerModel(model, placement)
    if kind == "predict":
        return towered.predict_on_batch, inputs
    targets = tf.nest.map_structure(
        lambda y: np.zeros(y.shape, "float32"), model(inputs)
    )
    towered.compile(optimizer, "mse")
    return towered.train_on_batch, inputs, targets


def batch_of(model: keras.Model, rows: int, length: int = 16) -> Any:
    """Random inputs of a built model.

    Args:
      model: whose.
      rows: how many.
      length: what stands for a dimension that the model leaves open.

    Raises:
      ValueError: the model is not built, or a number is below 1.
    """
    for flag, value in (("batch", rows), ("length", length)):
        if value < 1:
            raise ValueError(f"--{flag} must be at least 1; got {value}.")
    if not model.built:
        raise ValueError(
            "The model is not built, so its inputs are not known. Call it in "
            "the function that returns it."
        )
    specs = signature.input_specs(model, None, (), rows)
    return tf.nest.map_structure(lambda spec: _random(spec, length), specs)


def check_flag_ending(flag: str, path: str) -> None:
    """Raises unless what a flag asks for can be written to a file so named.

    Raises:
      ValueError: it ends otherwise.
      ImportError: what draws such pictures is missing.
    """
    if flag == "figure":
        figure.check_figure_ending(path, "--figure")
    elif flag == "picture":
        pictures.check_picture_ending(path, "--picture")
    elif not path.lower().endswith(_ENDINGS[flag]):
        raise ValueError(
            f"`--{flag}` is {path!r}, but must end in {_ENDINGS[flag]}."
        )


def _random(spec: Any, length: int) -> np.ndarray:
    if not isinstance(spec, tf.TensorSpec):
        raise ValueError(
            f"An input of the model is a {type(spec).__name__}, and random "
            "values are made for dense tensors only."
        )
    shape = [length if d is None else d for d in spec.shape]
    if spec.dtype == tf.string:
        return np.full(shape, "a")
    random = np.random.default_rng(0)
    if spec.dtype.is_floating:
        return random.normal(size=shape).astype(spec.dtype.as_numpy_dtype)
    # Ids that every vocabulary has.
    return random.integers(0, 2, shape).astype(spec.dtype.as_numpy_dtype)


def _line(error: BaseException) -> str:
    """The first line of what an error says."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
