"""keras_machine: what Keras asks of the machine, answered for a device.

Keras asks whether the machine has a GPU where it should ask for the device that
it is on: `_is_gpu_available` decides whether recurrent layers take cuDNN,
`_cpu_only` whether convolutions with channels first are transposed. It draws
seeds (`draw_seed`, `_cast_seed`) on the device whose kernels then take them from
the host. TensorFlow makes the strings of an `Assert` where its condition is, but no
GPU has any; `tf.debugging` calls the `Assert` of the private `control_flow_assert`.
None of these has a public switch. `keras_machine_test.py` fails when one of them
changes.
"""

import contextlib
import importlib
from collections.abc import Callable
from typing import Any

import tensorflow as tf
from keras.src.backend.tensorflow import nn, random
from tensorflow.python.ops import control_flow_assert

from towers.foreign.patches import CountedPatches, patched

# Keras gives the name of this module to a function of it.
rnn = importlib.import_module("keras.src.backend.tensorflow.rnn")

Context = contextlib.AbstractContextManager

# Older Keras does not ask.
_OF_THE_NEW = tuple(name for name in ("_cpu_only",) if hasattr(nn, name))


def asks_device(
    device: Callable[[], str | None],
    aside: Callable[[str], Context],
    portable: Callable[[], bool] = lambda: False,
) -> Context:
    """While open, Keras goes by the device that it is on.

    It may be open several times, in several threads: there is one for all.

    Args:
      device: says which device that is; None where Keras goes by the machine.
      aside: the scope of what belongs to the host of a device.
      portable: says whether what is built is to run where there are no GPUs too,
        so that Keras takes no kernel that only those have.
    """
    return _ASKING.opened(device, aside, portable)


def with_gpus(there: bool) -> Context:
    """While open, Keras takes the machine for one with GPUs, or without."""
    return patched(
        (rnn, "_is_gpu_available", lambda: there),
        *((nn, name, lambda: not there) for name in _OF_THE_NEW),
    )


def _patches(
    device: Callable[[], str | None],
    aside: Callable[[str], Context],
    portable: Callable[[], bool],
) -> list[tuple[Any, str, Any]]:
    def kind() -> str | None:
        here = device()
        return tf.DeviceSpec.from_string(here).device_type if here else None

    def has_gpu(original: Callable[..., Any]) -> Callable[[], bool]:
        def answer() -> bool:
            here = kind()
            if portable():
                return False
            return original() if here is None else here == "GPU"

        return answer

    def is_cpu(original: Callable[..., Any]) -> Callable[[], bool]:
        def answer() -> bool:
            here = kind()
            if portable():
                return True
            return original() if here is None else here == "CPU"

        return answer

    def on_host(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            here = device()
            with aside(here) if here else contextlib.nullcontext():
                return original(*args, **kwargs)

        return call

    def asserted(original: Callable[..., Any]) -> Callable[..., Any]:
        def check(
            condition: Any,
            data: Any,
            summarize: int | None = None,
            name: str | None = None,
        ) -> Any:
            here = device()
            if not here or kind() == "CPU":
                return original(condition, data, summarize, name)
            shown = [_first(x, summarize) for x in data]
            with aside(here):
                return original(condition, shown, summarize, name)

        return check

    wrapped = [
        (rnn, "_is_gpu_available", has_gpu),
        *((nn, name, is_cpu) for name in _OF_THE_NEW),
        (random, "draw_seed", on_host),
        (random, "_cast_seed", on_host),
        (control_flow_assert, "Assert", asserted),
        (tf, "Assert", asserted),
        (tf.debugging, "Assert", asserted),
    ]
    return [
        (owner, name, wrap(getattr(owner, name)))
        for owner, name, wrap in wrapped
    ]


_ASKING = CountedPatches(_patches)


def _first(x: Any, summarize: int | None) -> Any:
    """The elements of a tensor that an `Assert` prints, and not all of it."""
    most = 3 if summarize is None else summarize
    if not isinstance(x, tf.Tensor) or most < 0 or x.dtype == tf.string:
        return x
    count = x.shape.num_elements()
    if count is not None and count <= most + 1:
        return x
    return tf.reshape(x, [-1])[: most + 1]  # one more, for the dots
