"""device_names: one spelling for each device, checked against those there are."""

import difflib
import functools
from collections.abc import Iterable, Sequence
from typing import Any

import tensorflow as tf

# This process's memory, where Python is.
HOST_HERE = "/job:localhost/replica:0/task:0/device:CPU:0"


def same_device(one: str, other: str) -> bool:
    """Whether two names of this process's devices mean the same one."""
    a, b = (tf.DeviceSpec.from_string(name) for name in (one, other))
    return (a.job or "localhost", a.task or 0, a.device_type) == (
        b.job or "localhost",
        b.task or 0,
        b.device_type,
    ) and (a.device_index or 0) == (b.device_index or 0)


@functools.lru_cache(maxsize=1024)  # graphs ask it for each of their nodes
def short(device: str) -> str:
    """The spelling that `Placement` uses: "/CPU:0" for one of this process."""
    if not device:
        return ""
    spec = tf.DeviceSpec.from_string(device)
    if not process_of(device):
        return f"/{spec.device_type}:{spec.device_index or 0}"
    return spec.replace(replica=spec.replica or 0).to_string()


@functools.lru_cache(maxsize=1024)
def process_of(device: str) -> str:
    """The task ("/job:worker/replica:0/task:1") of a device; "" of this process."""
    spec = tf.DeviceSpec.from_string(device)
    if (spec.job or "localhost") == "localhost" and not spec.task:
        return ""
    return tf.DeviceSpec(
        job=spec.job, replica=spec.replica or 0, task=spec.task or 0
    ).to_string()


def is_reached(device: str) -> bool:
    """Whether TensorFlow knows the process that a device is of."""
    process = process_of(device)
    return not process or any(
        process_of(other.name) == process
        for other in tf.config.list_logical_devices()
    )


def few(names: Sequence[str], most: int = 8) -> str:
    """Names with commas between them: of many the first ones and the last."""
    if len(names) > most:
        names = [*names[: most - 2], "...", names[-1]]
    return ", ".join(names)


def check_count(argument: str, n: Any, optional: bool = False) -> None:
    """Raises unless `n` is a whole number of at least 1 (or None)."""
    if n is None and optional:
        return
    if isinstance(n, bool) or not isinstance(n, int):
        raise TypeError(
            f"`{argument}` must be a whole number of devices, at least 1; "
            f"got {n!r} of type {type(n).__name__}."
        )
    if n < 1:
        raise ValueError(
            f"`{argument}` must be at least 1; got {n}. For devices of your "
            "own choice, write towers.Placement(devices=[...])."
        )


def own(kind: str) -> list[str]:
    """This process's devices of a kind, and not those of a cluster."""
    names = [device.name for device in tf.config.list_logical_devices(kind)]
    return [name for name in names if not process_of(name)]


def available(available: Sequence[str] | str | None) -> list[str] | None:
    """Full names to check against, or None to check the spelling only."""
    if available is None:
        return [d.name for d in tf.config.list_logical_devices()]
    if isinstance(available, str):
        if available == "any":
            return None
        raise ValueError(
            '`available` must be None, "any" or a list of device names; got '
            f"{available!r}."
        )
    return [
        _parsed(name, f"available[{i}]").to_string()
        for i, name in enumerate(available)
    ]


def _parsed(name: Any, argument: str) -> tf.DeviceSpec:
    """The parsed device, with a type and an index."""
    if isinstance(name, tf.config.LogicalDevice):
        name = name.name
    if isinstance(name, tf.DeviceSpec):
        name = name.to_string()
    if not isinstance(name, str):
        raise TypeError(
            f"`{argument}` must be a device name such as '/GPU:0'; got "
            f"{name!r} of type {type(name).__name__}."
        )
    try:
        spec = tf.DeviceSpec.from_string(name)
        malformed = spec.device_type is None or (spec.device_index or 0) < 0
    except ValueError:
        malformed = True
    if malformed:
        raise ValueError(
            f"`{argument}` is {name!r}, which is no device name. Expected a "
            "type and an index, such as '/CPU:0', '/GPU:1' or "
            "'/job:worker/task:1/GPU:0'."
        )
    return (
        spec if spec.device_index is not None else spec.replace(device_index=0)
    )


def resolve(name: Any, argument: str, visible: list[str] | None) -> str:
    """The one spelling by which this device is known from here on."""
    spec = _parsed(name, argument)
    if visible is None:
        return spelled(spec)
    here = tf.DeviceSpec(job="localhost", replica=0, task=0)
    devices = [
        here.make_merged_spec(tf.DeviceSpec.from_string(d)) for d in visible
    ]
    # With several processes in sight, "/CPU:0" means this one's, and only the
    # full name says so to TensorFlow's placer.
    several = len({(d.job, d.task) for d in devices}) > 1
    matches = [other for other in devices if agrees(spec, other)]
    if matches:
        ours = [d for d in matches if d.job == here.job] or matches
        if len({(d.job, d.task) for d in ours}) > 1:
            raise ValueError(
                f"`{argument}` is {name!r}, which may be "
                f"{', '.join(spelled(device) for device in ours)}. Expected "
                "one of those."
            )
        return ours[0].to_string() if several else spelled(ours[0])
    names = [spelled(other) for other in devices]
    near = difflib.get_close_matches(spelled(spec), names, n=1, cutoff=0.8)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    raise ValueError(
        f"`{argument}` is {name!r}, but TensorFlow sees only "
        f"{', '.join(names)}. {hint}Use one of those, make logical CPU "
        "devices with Placement.cpus(n) before TensorFlow starts, or pass "
        '`available="any"` if the graph will run on another machine.'
    )


def absent(names: Iterable[str]) -> list[str]:
    """Those of the names that TensorFlow sees no device of, each once."""
    here = tf.DeviceSpec(job="localhost", replica=0, task=0)
    devices = [
        here.make_merged_spec(tf.DeviceSpec.from_string(device.name))
        for device in tf.config.list_logical_devices()
    ]
    return [
        name
        for name in dict.fromkeys(map(short, names))
        if not any(agrees(tf.DeviceSpec.from_string(name), d) for d in devices)
    ]


def agrees(asked: tf.DeviceSpec, device: tf.DeviceSpec) -> bool:
    """Whether `device` has every part that the partial name `asked` gives."""
    return all(
        getattr(asked, part) in (None, getattr(device, part))
        for part in ("job", "replica", "task", "device_type", "device_index")
    )


def spelled(spec: tf.DeviceSpec) -> str:
    """ "/CPU:0" for a device of this process, the full name for others."""
    if (spec.job or "localhost") == "localhost" and not spec.task:
        return f"/{spec.device_type}:{spec.device_index}"
    return spec.to_string()
