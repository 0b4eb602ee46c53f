"""tf_cluster: other tasks of a cluster, without giving up the connection.

`tf.config.experimental_connect_to_cluster` connects anew when the tasks differ,
which it cannot with the chief's own address among them, as its port is taken by
the chief. TensorFlow updates what is connected, so that variables stay good and
functions reach new tasks, by `context.get_server_def` and `update_server_def`.
"""

import copy
from collections.abc import Mapping

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
    (known,) = (found for found in server.cluster.job if found.name == job)
    known.tasks.clear()
    for number, address in tasks.items():
        known.tasks[number] = address
    context.update_server_def(server)


def own_address() -> str | None:
    """Where this process is, if it has connected to a cluster."""
    server = context.get_server_def()
    if server is None:
        return None
    (own,) = (job for job in server.cluster.job if job.name == server.job_name)
    return own.tasks[server.task_index]
