"""Every test sees four logical CPU devices, made before TensorFlow starts."""

import collections
import gc
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras  # noqa: E402
import pytest  # noqa: E402
import tensorflow as tf  # noqa: E402

tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0],
    [tf.config.LogicalDeviceConfiguration()] * 4,
)
tf.config.list_logical_devices()  # starts it
gc.freeze()  # what is imported stays: collections need not look at it
gc.set_threshold(50_000, 20, 20)  # graphs are large, and looked at more seldom


@pytest.fixture(autouse=True)
def same_numbers():
    """What a test draws without a seed is the same, after whichever others."""
    keras.utils.set_random_seed(0)


@pytest.fixture(autouse=True, scope="module")
def garbage_of_a_file():
    """Collected at its end: that of hundreds of tests took half a minute at once."""
    yield
    gc.collect()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Takes from items the marks `slow` and `rare` that are of others.

    A mark may be of those of a test's parameters only which come `after` the first
    so many, or whose names end as one of those that it is `of`. What is rare is not
    slow, too.
    """
    seen: collections.Counter[int] = collections.Counter()
    for item in items:
        for mark in [m for m in item.own_markers if m.name in ("slow", "rare")]:
            seen[id(mark)] += 1  # one object for all parameters
            after, of = mark.kwargs.get("after", 0), mark.kwargs.get("of")
            if seen[id(mark)] <= after or (
                of is not None and not item.name.endswith(tuple(of))
            ):
                item.own_markers.remove(mark)
        if item.get_closest_marker("rare"):
            item.own_markers = [m for m in item.own_markers if m.name != "slow"]
