"""Trains on two workers, kills one, and goes on: `python examples/cluster.py`.

The workers are processes of this machine, as `python -m towers worker` starts them
on others; give their addresses in the place of `addresses` then.
"""

import os
import pathlib
import random
import socket
import subprocess
import sys

import keras
import numpy as np

import towers

ROOT = pathlib.Path(__file__).parents[1]


def start_worker() -> tuple[str, subprocess.Popen]:
    """A worker on a free port, and its address."""
    port = free_port()
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "towers", "worker", f"--port={port}"]
    environment = {**os.environ, "PYTHONPATH": path}
    return f"127.0.0.1:{port}", subprocess.Popen(
        command, env=environment, stderr=subprocess.DEVNULL
    )


def free_port() -> int:
    """One that nobody has, nor is given for a connection before it is used."""
    while True:
        port = random.randrange(10_000, 30_000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port


class Killing(keras.callbacks.Callback):
    """Kills a worker in the middle of the second epoch."""

    def __init__(self, worker: subprocess.Popen):
        super().__init__()
        self.worker = worker
        self.batches = 0

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        self.batches += 1
        if self.batches == 15:
            self.worker.kill()

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        towers_now = len(self.model.placement.devices)
        print(f"epoch {epoch}  loss {logs['loss']:.4f}  towers {towers_now}")


def main() -> None:
    addresses, workers = zip(start_worker(), start_worker())
    try:
        cluster = towers.Cluster(addresses)
        model = keras.Sequential(
            [
                keras.Input([16]),
                keras.layers.Dense(64, activation="relu"),
                keras.layers.Dense(1),
            ]
        )
        placement = towers.Placement.workers(cluster)
        model = towers.TowerModel(model, placement, on_lost="continue")
        model.compile(keras.optimizers.SGD(0.05), "mse")
        x = np.random.default_rng(0).normal(size=[320, 16]).astype("float32")
        y = x[:, :1] * x[:, 1:2]
        callbacks = [Killing(workers[1])]
        model.fit(x, y, 32, epochs=4, verbose=0, callbacks=callbacks)
        print(f"{int(model.optimizer.iterations.numpy())} steps, of 40")
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


if __name__ == "__main__":
    main()
