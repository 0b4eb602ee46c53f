"""Trains on workers that a scheduler has started, each of which reads its own rows.

    python examples/scheduled.py HOST:PORT ...

slurm.sh and kubernetes.yaml start the workers, and this with their addresses.
"""

import sys

import keras
import tensorflow as tf

import towers


def read(tower: towers.Tower) -> tf.data.Dataset:
    """Where the tower is: as a rule, files there, or its part of shared ones."""
    first = 1000 * tower.index
    rows = tf.data.Dataset.range(first, first + 320)
    return rows.map(example).batch(16)


def example(i: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    x = tf.random.stateless_normal([16], [0, i])
    return x, x[:1] * x[1:2]


def main() -> None:
    # Nodes may start in any order, and take a while.
    cluster = towers.Cluster(sys.argv[1:], timeout=600)
    model = keras.Sequential(
        [
            keras.Input([16]),
            keras.layers.Dense(64, activation="relu"),
            keras.layers.Dense(1),
        ]
    )
    placement = towers.Placement.workers(cluster)
    model = towers.TowerModel(
        model, placement, loss_on_towers="auto", on_lost="continue"
    )
    model.compile(keras.optimizers.SGD(0.05), "mse")
    history = model.fit(towers.per_tower(read), epochs=4, verbose=2).history
    print(f"{len(placement.devices)} towers  loss {history['loss'][-1]:.4f}")


if __name__ == "__main__":
    main()
