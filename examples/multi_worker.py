"""What becomes of a program for MultiWorkerMirroredStrategy: `fit` on many machines.

Keras 3's `fit` does not run under that strategy (keras-team/keras#20585). As there,
this program is started on each machine, with a TF_CONFIG that says which of them it
is. Here the chief is a task of its own, which needs no GPU and may be on the machine
of a worker. Without a TF_CONFIG the program shows it on this machine:
`python examples/multi_worker.py`.
"""

import json
import os
import socket
import subprocess
import sys

import keras
import tensorflow as tf

import towers


def dataset() -> tf.data.Dataset:
    """As it was, of all rows: each tower reads its part of them."""
    x = tf.random.stateless_normal([640, 16], [1, 2])
    return tf.data.Dataset.from_tensor_slices((x, x[:, :1] * x[:, 1:2]))


def train() -> None:
    # Was: strategy = tf.distribute.MultiWorkerMirroredStrategy()
    cluster = towers.Cluster.from_environment()
    workers = cluster.devices()
    placement = towers.Placement.workers(
        cluster, parameter_device=towers.balanced(workers)
    )

    def read(tower: towers.Tower) -> tf.data.Dataset:
        # Was: options.experimental_distribute.auto_shard_policy
        return dataset().shard(len(placement.devices), tower.index).batch(32)

    # Was: with strategy.scope():
    model = keras.Sequential(
        [
            keras.Input([16]),
            keras.layers.Dense(64, activation="relu"),
            keras.layers.Dense(1),
        ]
    )
    model = towers.TowerModel(model, placement)  # and no more is new below
    model.compile(keras.optimizers.SGD(0.05), "mse")
    model.fit(towers.per_tower(read), epochs=3, verbose=2)


def main() -> None:
    config = json.loads(os.environ["TF_CONFIG"])
    task = config["task"]
    if task["type"] == "worker":
        address = config["cluster"]["worker"][task["index"]]
        towers.serve(int(address.split(":")[-1]), host="0.0.0.0")
    else:
        train()


def on_this_machine() -> None:
    """Starts all tasks here, as a scheduler would on each machine."""
    cluster = {
        "chief": [f"127.0.0.1:{free_port()}"],
        "worker": [f"127.0.0.1:{free_port()}" for _ in range(2)],
    }
    tasks = []
    for job, index in (("worker", 0), ("worker", 1), ("chief", 0)):
        task = {"type": job, "index": index}
        config = json.dumps({"cluster": cluster, "task": task})
        environment = {**os.environ, "TF_CONFIG": config}
        command = [sys.executable, __file__]
        tasks.append(subprocess.Popen(command, env=environment))
    *workers, chief = tasks
    chief.wait()
    for worker in workers:
        worker.terminate()
        worker.wait()
    sys.exit(chief.returncode)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    main() if "TF_CONFIG" in os.environ else on_this_machine()
