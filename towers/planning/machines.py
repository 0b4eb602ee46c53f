"""machines: those that a plan is for: one, or the workers of a cluster and this one."""

import collections
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import tensorflow as tf

from towers.foreign.tf_nodes import all_nodes
from towers.placement.device_names import process_of
from towers.report.summary import HERE

Machine = Mapping[str, int]  # how many devices there are of each type


def checked_machine(
    machine: Machine | Sequence[Machine] | None,
) -> dict[str, int] | tuple[dict[str, int], ...]:
    """A machine, or one per worker, each with a CPU.

    Raises:
      TypeError, ValueError: it is none that could be.
    """
    if machine is None:
        return {"CPU": 1, "GPU": 4}
    if not isinstance(machine, (list, tuple)):
        return _checked(machine, "machine")
    if not machine:
        raise ValueError(
            "`machine` is an empty list. Expected a dict for each worker, as in "
            'machine=[{"CPU": 1, "GPU": 8}] * 4.'
        )
    return tuple(_checked(m, f"machine[{i}]") for i, m in enumerate(machine))


def _checked(machine: Any, argument: str) -> dict[str, int]:
    expected = f'`{argument}` must be a dict such as {{"CPU": 1, "GPU": 4}}'
    if not isinstance(machine, Mapping):
        raise TypeError(
            f"{expected}, or `machine` a list of one for each worker; got "
            f"{machine!r}."
        )
    unknown = set(machine) - {"CPU", "GPU"}
    if unknown or not all(
        isinstance(n, int) and not isinstance(n, bool) and n >= 0
        for n in machine.values()
    ):
        raise ValueError(
            f"{expected}, with numbers of devices; got {dict(machine)!r}."
        )
    devices = {"CPU": 1, "GPU": 0, **machine}
    if not devices["CPU"]:
        raise ValueError(
            f"{expected}; got {dict(machine)!r}, but no machine is without a "
            "CPU. Leave it out, or say 1."
        )
    return devices


def have_gpus(machine: Machine | Sequence[Machine]) -> bool:
    """Whether any of them has."""
    several = [machine] if isinstance(machine, Mapping) else machine
    return any(one["GPU"] for one in several)


def by_task(
    machine: Machine | Sequence[Machine], graph: Any
) -> dict[str, Machine]:
    """The machine of each task; of this process what a graph names, beside workers.

    Args:
      machine: as `checked_machine` gives it.
      graph: a `GraphDef`.

    Raises:
      ValueError: the graph has ops on other tasks.
    """
    named = {node.device for node in all_nodes(graph)}
    if isinstance(machine, Mapping):
        tasks = {HERE: machine}
        expected = (
            "but `machine` is one machine, and its devices are of this process. "
            'Expected a placement on that alone, as Placement(["/CPU:0", '
            '"/CPU:1"], available="any"); or a list of machines, one for each '
            'worker, as in machine=[{"CPU": 1, "GPU": 8}] * 4'
        )
    else:
        here = least_machine(d for d in named if d and not process_of(d))
        workers = (
            f"/job:worker/replica:0/task:{i}" for i in range(len(machine))
        )
        tasks = {HERE: here, **dict(zip(workers, machine))}
        expected = (
            f"but `machine` has {len(machine)} of them: tasks 0 to "
            f"{len(machine) - 1} of the job worker"
        )
    others = sorted({process_of(d) for d in named} - {"", *tasks})
    if others:
        raise ValueError(
            f"`fn_or_model` has ops on {', '.join(others)}, {expected}."
        )
    return tasks


def least_machine(devices: Iterable[str]) -> dict[str, int]:
    """The least machine that has these devices, and a CPU."""
    counts: collections.Counter = collections.Counter(CPU=1, GPU=0)
    for name in devices:
        spec = tf.DeviceSpec.from_string(name)
        if spec.device_type:
            index = spec.device_index or 0
            counts[spec.device_type] = max(counts[spec.device_type], index + 1)
    return dict(counts)
