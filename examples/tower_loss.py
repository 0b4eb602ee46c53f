"""A segmentation model whose outputs, 32 numbers a pixel, never leave a tower.

Each tower computes the loss of its own shard and says two numbers: a sum, and
how many pixels it counted. Unlabelled pixels count for nothing, so means of
the towers' means would be wrong. In Keras's own `fit`, the same is
`TowerModel(..., loss_on_towers=True)`.

python examples/tower_loss.py
"""

from typing import Any

import keras
import numpy as np
import tensorflow as tf
from absl import app

import towers

layers = keras.layers
CLASSES = 32
UNLABELLED = 255


def segmenter() -> keras.Model:
    """Images [rows, 32, 32, 3] to logits [rows, 32, 32, CLASSES]."""
    x = keras.Input([32, 32, 3])
    down = layers.Conv2D(8, 3, padding="same", activation="relu")(x)
    deep = layers.Conv2D(16, 3, padding="same", activation="relu")(
        layers.MaxPooling2D()(down)
    )
    both = layers.Concatenate()([down, layers.UpSampling2D()(deep)])
    return keras.Model(x, layers.Conv2D(CLASSES, 1)(both))


def parts(model: keras.Model, shard: Any) -> dict[str, tf.Tensor]:
    """The tower's sum of losses, and how many pixels it is over."""
    images, labels = shard
    labelled = labels != UNLABELLED
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(
        tf.where(labelled, labels, 0), model(images)
    )
    return {
        "sum": tf.reduce_sum(tf.where(labelled, losses, 0.0)),
        "count": tf.reduce_sum(tf.cast(labelled, tf.float32)),
    }


def main(_: list[str]) -> None:
    placement = towers.Placement.cpus(2)
    keras.utils.set_random_seed(0)
    model = segmenter()
    optimizer = keras.optimizers.Adam(0.01)
    optimizer.build(model.trainable_variables)

    @tf.function
    def step(images: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            graph = towers.build_towers(
                model,
                (images, labels),
                placement,
                training=True,
                merge="sum",
                tower_fn=parts,
            )
            loss = graph.outputs["sum"] / graph.outputs["count"]
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply(gradients, model.trainable_variables)
        graph.apply_updates()
        return loss

    rng = np.random.default_rng(0)
    images = rng.uniform(size=[16, 32, 32, 3]).astype("float32")
    labels = (images.sum(-1) / 3 * CLASSES).astype("int32")
    labels[:, :8] = UNLABELLED
    for i in range(61):
        loss = step(images, labels)
        if i % 20 == 0:
            print(f"step {i:3d}  loss {loss.numpy():.4f}")


if __name__ == "__main__":
    app.run(main)
