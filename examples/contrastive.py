"""Learning from pairs: each row against all rows of the batch, of any tower.

In-batch losses need large batches, which is why they are trained on several
devices; but a tower sees only its shard, and would have fewer wrong answers to
tell from the right one. A layer that says `needs_all_towers` computes its loss
over the whole batch, and training equals the plain model's, as printed here.

python examples/contrastive.py
"""

import keras
import numpy as np
import tensorflow as tf
from absl import app

import towers

layers = keras.layers
TEMPERATURE = 0.2


def in_batch_loss(a: tf.Tensor, b: tf.Tensor) -> tf.Tensor:
    """The mean cross-entropy of finding row i of `b` by row i of `a`.

    InfoNCE of van den Oord, Li and Vinyals, "Representation learning with
    contrastive predictive coding", 2018.
    """
    a, b = tf.math.l2_normalize(a, -1), tf.math.l2_normalize(b, -1)
    logits = tf.matmul(a, b, transpose_b=True) / TEMPERATURE  # [rows, rows]
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(
        labels=tf.range(tf.shape(a)[0]), logits=logits
    )
    return tf.reduce_mean(losses)


class Contrastive(layers.Layer):
    """Adds the in-batch loss of two [rows, features], and returns the first."""

    needs_all_towers = True

    def call(self, pair: list[tf.Tensor]) -> tf.Tensor:
        self.add_loss(towers.all_towers(in_batch_loss, *pair))
        return pair[0]


def pairs() -> keras.Model:
    """Two noisy views of each row, through one encoder."""
    keras.utils.set_random_seed(0)
    encoder = keras.Sequential(
        [
            keras.Input([16]),
            layers.Dense(32),
            layers.BatchNormalization(synchronized=True),
            layers.ReLU(),
            layers.Dense(8),
        ]
    )
    views = {name: keras.Input([16], name=name) for name in ("a", "b")}
    both = [encoder(views["a"]), encoder(views["b"])]
    return keras.Model(views, Contrastive()(both))


def main(_: list[str]) -> None:
    placement = towers.Placement.cpus(3)
    rng = np.random.default_rng(0)
    x = rng.normal(size=[512, 16])
    views = {key: x + 0.3 * rng.normal(size=x.shape) for key in ("a", "b")}
    plain, template = pairs(), pairs()
    for model in (plain, towers.TowerModel(template, placement)):
        model.compile("sgd")
        history = model.fit(
            views, batch_size=64, epochs=5, shuffle=False, verbose=0
        )
        losses = ", ".join(f"{loss:.4f}" for loss in history.history["loss"])
        print(f"{type(model).__name__:10}  loss {losses}")
    weights = zip(plain.get_weights(), template.get_weights())
    apart = max(np.abs(a - b).max() for a, b in weights)
    print(f"weights differ by {apart:.1e}")


if __name__ == "__main__":
    app.run(main)
