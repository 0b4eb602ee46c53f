"""tf_kernels: which ops have a kernel for a kind of device.

TensorFlow's registry of kernels has no public name: it is read by
`get_registered_kernels_for_op`. Its Linux wheel registers the kernels for GPUs
wherever it is installed. `tf_kernels_test.py` fails when one of them changes.
"""

import functools
from typing import Any

import tensorflow as tf
from tensorflow.python.framework import kernels


def knows_gpus() -> bool:
    """Whether this TensorFlow was built with kernels for GPUs."""
    return any(k.device_type == "GPU" for k in _registered("MatMul"))


def kernel(op: tf.Operation, kind: str) -> Any:
    """The `KernelDef` by which a kind of device runs an op, or None."""
    fitting = [
        k
        for k in _registered(op.type)
        if k.device_type in (kind, "DEFAULT")
        and (kind != "CPU" or k.device_type == "CPU")
        and not k.label
        and all(_fits(op, limit) for limit in k.constraint)
    ]
    fitting.sort(key=lambda k: (k.device_type != kind, -k.priority))
    return fitting[0] if fitting else None


@functools.cache
def _registered(op_type: str) -> list[Any]:
    return list(kernels.get_registered_kernels_for_op(op_type).kernel)


def _fits(op: tf.Operation, limit: Any) -> bool:
    """Whether an attribute of an op is as a kernel wants it."""
    value = op.node_def.attr[limit.name]
    types = value.list.type if value.HasField("list") else [value.type]
    return set(types) <= set(limit.allowed_values.list.type)
