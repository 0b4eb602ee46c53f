"""Two towers with no wrapper: a training loop of one's own.

python examples/two_towers.py
"""

import keras
import numpy as np
import tensorflow as tf
from absl import app

import towers


def main(_: list[str]) -> None:
    placement = towers.Placement.cpus(2, weights=[2, 1])
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input([4]),
            keras.layers.Dense(16, activation="tanh"),
            keras.layers.BatchNormalization(),
            keras.layers.Dense(1),
        ]
    )
    optimizer = keras.optimizers.SGD(0.1)
    optimizer.build(model.trainable_variables)

    @tf.function
    def step(x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            graph = towers.build_towers(model, x, placement, training=True)
            loss = tf.reduce_mean(tf.square(graph.outputs - y))
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply(gradients, model.trainable_variables)
        graph.apply_updates()
        return loss

    rng = np.random.default_rng(0)
    x = rng.normal(size=[32, 4]).astype("float32")
    y = x.sum(1, keepdims=True)
    for i in range(101):
        loss = step(x, y)
        if i % 20 == 0:
            print(f"step {i:3d}  loss {loss.numpy():.5f}")


if __name__ == "__main__":
    app.run(main)
