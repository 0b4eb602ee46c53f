"""tf_cluster: other tasks of a cluster, without giving up the connection.

`tf.config.experimental_connect_to_cluster` connects anew when the tasks differ,
which it cannot with the chief's own address among them, as its port is taken by
the chief. TensorFlow updates what is connected, so that variables stay good and
functions reach new tasks, by `context.get_server_def` and `update_server_def`.

Keras ends each `fit`, `evaluate` and `predict`, and TensorFlow each checkpoint, with
a wait for what all processes of the cluster have begun, `Context.sync_executors`.
It has no end when one of them is lost, and no public way to leave that one out.
Before a step it is needed too: a function that runs on another process takes what
is there, and does not wait for a large value that is still on its way to a variable.
`tf_cluster_test.py` fails when one of the names changes.
"""

import copy
import functools
from collections.abc import Callable, Mapping

from tensorflow.python.eager import context


def update_tasks(job: str, tasks: Mapping[int, str]) -> None:
    """Makes these the tasks of a job of the connected cluster.

    Args:
      job: one that the cluster has.
      tasks: `host:port`, by number.

    Raises:
      tf.errors.OpError: one does not answer.
    """
    server = copy.deepcopy(context.get_server_def())
    (definition,) = (x for x in server.cluster.job if x.name == job)
    definition.tasks.clear()
    for number, address in tasks.items():
        definition.tasks[number] = address
    context.update_server_def(server)


def connected_address() -> str | None:
    """Where this process is, if it has connected to a cluster."""
    server = context.get_server_def()
    if server is None:
        return None
    (own,) = (job for job in server.cluster.job if job.name == server.job_name)
    return own.tasks[server.task_index]


def wait_by(waits: Callable[[Callable[[], None]], None]) -> None:
    """Has TensorFlow's wait for all processes done by `waits(wait)`, from now on.

    `wait` has the wait's own end, or its error.
    """
    kind = context.Context
    original = getattr(kind.sync_executors, "__wrapped__", kind.sync_executors)

    @functools.wraps(original)
    def sync_executors(self: context.Context) -> None:
        waits(functools.partial(original, self))

    kind.sync_executors = sync_executors


def wait_for_all() -> None:
    """Waits until all that this process has begun, on others too, is done."""
    context.context().sync_executors()
