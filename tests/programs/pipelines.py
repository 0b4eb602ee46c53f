"""Pipelines over workers that have a core each: run by pipeline_test.

Prints, as JSON, the largest differences of weights from the plain model's, and
how many times as fast as one worker a pipeline over two is.
"""

import json
import os

from chiefs import interleaved, pin
from cluster_workers import Workers

WORKERS = Workers(4)  # before TensorFlow starts

import keras  # noqa: E402
import numpy as np  # noqa: E402

import towers  # noqa: E402

ROWS, WIDTH = 1024, 512


def model() -> keras.Model:
    """Two halves that compute as much, with little between them."""
    keras.utils.set_random_seed(0)
    hidden = [keras.layers.Dense(WIDTH, "relu") for _ in range(8)]
    return keras.Sequential([keras.Input([WIDTH]), *hidden])


def trained(m: keras.Model) -> keras.Model:
    m.compile(keras.optimizers.SGD(0.01), "mse")
    return m


def main() -> None:
    cluster = towers.Cluster(WORKERS.addresses)
    devices = cluster.devices("CPU")
    cores = sorted(os.sched_getaffinity(0))
    for i in range(4):
        pin(WORKERS.pids[i], cores[i % len(cores)])
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=[ROWS, WIDTH]).astype("float32") for _ in "xy")

    def piped(devices, micro_batches):
        template = model()
        placement = towers.pipeline(template, devices, micro_batches)
        return trained(towers.TowerModel(template, placement))

    plain, network = trained(model()), {}
    one = piped(devices[:1], 1)
    two = piped(devices[:2], 8)
    both = piped([devices[:2], devices[2:]], 4)
    for m in (plain, two, both):
        m.fit(x, y, batch_size=200, verbose=0, shuffle=False)
    for name, m in (("one pipeline", two), ("two pipelines", both)):
        network[f"difference of {name}"] = max(
            float(np.abs(a - b).max())
            for a, b in zip(m.get_weights(), plain.get_weights())
        )
    for m in (one, two):
        m.train_on_batch(x, y)
    alone, together = interleaved(
        [lambda m=m: m.train_on_batch(x, y) for m in (one, two)]
    )
    network["times as fast as one worker"] = alone / together
    print(json.dumps(network))


if __name__ == "__main__":
    main()
