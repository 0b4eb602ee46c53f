"""Two machines of this process's devices, for tests without others."""

import contextlib
from unittest import mock

import tensorflow as tf

from towers.keras_model import parameter_copies
from towers.verbs import departures, relays

# By device: of which machine.
MACHINE = {"/CPU:0": "a", "/CPU:1": "b", "/CPU:2": "b", "/CPU:3": "a"}


def machine_of(device):
    return MACHINE[f"/CPU:{tf.DeviceSpec.from_string(device).device_index}"]


@contextlib.contextmanager
def in_machines():
    """While open, towers are built for devices that are of two machines."""
    with contextlib.ExitStack() as stack:
        for module in (departures, parameter_copies, relays):
            patch = mock.patch.object(module, "process_of", machine_of)
            stack.enter_context(patch)
        yield


def between_machines(report):
    """Bytes by (source, target) machine."""
    results = {}
    for pair, size in report.bytes_between.items():
        ways = tuple(map(machine_of, pair))
        if ways[0] != ways[1]:
            results[ways] = results.get(ways, 0) + size
    return results
