"""host: what belongs to the host of a device: assertions, strings, seeds, rows.

The kernels of a GPU take bounds, seeds and conditions from the host's memory. What
computes them on the GPU makes the host wait for it, once a step or more; and of
strings a GPU knows nothing. So they are computed beside the GPU, on its host.
"""

import contextlib
from collections.abc import Iterator

import tensorflow as tf

# Of what is on the host for a tower, or for a verb; a report tells them apart.
SCOPE = "host"


def is_host(device: str) -> bool:
    """Whether a device is a host, or none at all."""
    kind = tf.DeviceSpec.from_string(device or "").device_type
    return kind in (None, "CPU")


def host_of(device: str) -> str:
    """The host of a device, in as much of a name; a CPU is its own."""
    if is_host(device):
        return device
    spec = tf.DeviceSpec.from_string(device)
    return spec.replace(device_type="CPU", device_index=0).to_string()


def device_here() -> str:
    """The device of what is made here and now; "" in the body of a loop."""
    with tf.control_dependencies(None):
        return tf.no_op().device


@contextlib.contextmanager
def on_host(device: str) -> Iterator[None]:
    """While open, what is made is on the host of a device, in `host/...`.

    On a CPU nothing changes.
    """
    if is_host(device):
        yield
        return
    here = tf.compat.v1.get_default_graph().get_name_scope()
    inside = f"{here}/".startswith(f"{SCOPE}/")
    scope = f"{here}/" if inside else f"{SCOPE}/{here}/"
    with tf.device(host_of(device)), tf.name_scope(scope):
        yield
