"""lost: what TensorFlow raises when a worker is lost, told in one way."""

import re
from collections.abc import Iterable

import tensorflow as tf

# What TensorFlow 2.16 to 2.21 say of a worker that was started again, and knows
# nothing.
_STARTED_ANEW = (
    "Unable to find a context_id",
    "contains an invalid device",
    "unknown device.",
)
# And of one that hung up, or cannot be called. Some of it they say of any error of
# an op there.
_NOT_REACHED = (
    "remote target /job:",
    "Socket closed",
    "failed to connect to all addresses",
    "Connection reset by peer",
    "Broken pipe",
    "RecvFromRemoteAsync is cancelled",
    "Remote RPC failed",
    "GrpcRemoteWorker",
)
# What ops raise of values, memory and data, which no connection does.
_OF_OPS = (
    tf.errors.InvalidArgumentError,
    tf.errors.OutOfRangeError,
    tf.errors.ResourceExhaustedError,
    tf.errors.UnimplementedError,
    tf.errors.NotFoundError,
    tf.errors.FailedPreconditionError,
    tf.errors.DataLossError,
)
_TASK = re.compile(r"/job:worker(?:/replica:\d+)?/task:(\d+)")


class WorkerLost(RuntimeError):
    """A worker died, was started anew, or does not answer any more.

    What was computed on it is gone, and so are variables that lived there. A loop
    that goes on from the last checkpoint, wherever parameters are, and also when it
    is this process that has died and is started again:

        while True:
            devices = cluster.devices()
            placement = towers.Placement(
                devices, parameter_device=towers.balanced(devices)
            )
            model = towers.TowerModel(make_model(), placement)  # a new one
            model.compile("sgd", "mse")
            try:
                backup = keras.callbacks.BackupAndRestore("backup")
                model.fit(data, epochs=9, callbacks=[backup])
                break
            except towers.WorkerLost:
                cluster.update()  # drop the dead, take back the returned

    >>> error = towers.WorkerLost(["10.0.0.2:2222"])
    >>> error.workers
    ('10.0.0.2:2222',)

    Attributes:
      workers: their addresses, as the `Cluster` was given them.

    Args:
      workers: the addresses.
      more: what else is to be said.
    """

    def __init__(self, workers: Iterable[str], more: str = ""):
        self.workers = tuple(workers)
        super().__init__(
            f"Lost {', '.join(self.workers) or 'a worker'}: killed, started "
            "anew, or not answering. "
            + (
                more
                or "Go on without it: call `update()` of the Cluster, then make "
                "a new model on `Placement.workers(cluster)` and `fit` again "
                "from a checkpoint, as with keras.callbacks.BackupAndRestore. "
                'With parameters on this process, TowerModel(on_lost="continue") '
                "does it by itself, without losing a step."
            )
        )

    def __reduce__(self) -> tuple:
        return type(self), (self.workers,)


def is_sign(error: BaseException) -> bool:
    """Whether an error of TensorFlow's is one of a connection to a worker."""
    if not isinstance(error, (tf.errors.OpError, ValueError, RuntimeError)):
        return False
    not_reached = () if isinstance(error, _OF_OPS) else _NOT_REACHED
    return any(sign in str(error) for sign in (*_STARTED_ANEW, *not_reached))


def tasks_named(error: BaseException) -> list[int]:
    """The workers' tasks that an error names."""
    return sorted({int(task) for task in _TASK.findall(str(error))})
