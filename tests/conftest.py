"""Every test sees four logical CPU devices, made before TensorFlow starts."""

import collections
import gc
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import pytest  # noqa: E402
import tensorflow as tf  # noqa: E402

tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0],
    [tf.config.LogicalDeviceConfiguration()] * 4,
)
tf.config.list_logical_devices()  # starts it
gc.freeze()  # what is imported stays: collections need not look at it
gc.set_threshold(50_000, 20, 20)  # graphs are large, and looked at more seldom


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks as slow the parameters that `slow_after` and `slow_of` tell."""
    seen: collections.Counter[int] = collections.Counter()
    for item in items:
        mark = item.get_closest_marker("slow_after")
        if mark is not None:
            seen[id(mark)] += 1  # one object for all of them
            if seen[id(mark)] > mark.args[0]:
                item.add_marker(pytest.mark.slow)
        mark = item.get_closest_marker("slow_of")
        if mark is not None and item.name.endswith(mark.args):
            item.add_marker(pytest.mark.slow)
