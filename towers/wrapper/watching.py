"""watching: methods of a `TowerModel` that end, in seconds, when a worker is lost."""

import contextlib
import functools
import inspect
from collections.abc import Iterator
from typing import Any

from towers.cluster import cluster as clusters
from towers.cluster.lost import WorkerLost, is_sign, tasks_named
from towers.foreign.tf_cluster import wait_for_all
from towers.keras_model.refusals import tower_errors
from towers.placement.placement import Placement, as_placement
from towers.verbs.batch import hold_per_tower
from towers.wrapper.feeding import fed


@contextlib.contextmanager
def watched(placement: Placement) -> Iterator[None]:
    """While open, a worker that is lost is a `WorkerLost`, in seconds.

    What was begun before, as an assignment to a variable there, is done first.

    Raises:
      WorkerLost: the placement names a worker that was lost before.
    """
    numbers = [clusters.task_of(device) for device in _devices_of(placement)]
    tasks = {task for task in numbers if task is not None}
    cluster = clusters.connected()
    if not tasks:
        yield
        return
    if cluster is not None:
        cluster.check(tasks)
        with cluster.watch():
            wait_for_all()
            yield
        return
    try:  # connected by other means, and without a heartbeat
        wait_for_all()
        yield
    except Exception as error:
        if not is_sign(error):
            raise
        named = [f"/job:worker/task:{i}" for i in tasks_named(error)]
        raise WorkerLost(named) from error


def watching(method: Any) -> Any:
    """`compile`, or `__init__`, which is given the placement: watched."""

    signature = inspect.signature(method)

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        values = vars(self)
        if "placement" not in values:  # it is being made
            values = signature.bind_partial(self, *args, **kwargs).arguments
        placement = as_placement(values.get("placement"))
        goes_on = values.get("on_lost") == "continue"
        if goes_on or not isinstance(placement, Placement):
            return method(self, *args, **kwargs)
        with watched(placement):
            return method(self, *args, **kwargs)

    return call


def watched_method(method: Any, of_weights: bool = False) -> Any:
    """A method of Keras's, watched; of weights, if some are on workers."""
    name = method.__name__

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if hold_per_tower((*args, *kwargs.values())):
            args, kwargs = fed(self, name, args, kwargs)
        with tower_errors(self.placement):
            return watched_call(self, *args, **kwargs)

    def watched_call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.on_lost == "continue":  # each step is watched
            return method(self, *args, **kwargs)
        if self.tower_recovery.lost_workers:
            raise WorkerLost(self.tower_recovery.lost_workers)
        if of_weights and _keeps_variables_here(self.placement):
            return method(self, *args, **kwargs)
        with watched(self.placement):
            result = method(self, *args, **kwargs)
            if of_weights:  # by a callback, the next step is of the same `fit`
                wait_for_all()
            return result

    return call


def _keeps_variables_here(placement: Placement) -> bool:
    pins = placement.pinned_devices
    devices = [placement.parameter_device, placement.output_device, *pins]
    return all(
        isinstance(device, str) and clusters.task_of(device) is None
        for device in devices
    )


def _devices_of(placement: Placement) -> Iterator[str]:
    """Devices that a placement names."""
    yield from placement.devices
    yield str(placement.output_device)
    yield placement.input_device
    if isinstance(placement.parameter_device, str):
        yield placement.parameter_device
    yield from placement.pinned_devices
