"""A training loop of 2017, with towers in it: tf.compat.v1, a Session, feeds.

python examples/session_loop.py
"""

import os
import tempfile

import keras
import numpy as np
import tensorflow as tf
from absl import app

import towers

v1 = tf.compat.v1


def main(_: list[str]) -> None:
    placement = towers.Placement.cpus(2)
    keras.utils.set_random_seed(0)
    # The model is built eagerly, as always with Keras 3.
    model = keras.Sequential(
        [
            keras.Input([8, 8, 1]),
            keras.layers.Conv2D(8, 3, kernel_regularizer="l2"),
            keras.layers.BatchNormalization(),
            keras.layers.ReLU(),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dropout(0.1),
            keras.layers.Dense(2),
        ]
    )
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 512)
    images = rng.normal(size=[512, 8, 8, 1]).astype("float32")
    images[labels == 1] = images[labels == 1].cumsum(1)  # stripes

    with tf.Graph().as_default():
        x = v1.placeholder(tf.float32, [None, 8, 8, 1])
        y = v1.placeholder(tf.int32, [None])
        training = towers.build_towers(model, x, placement, training=True)
        serving = towers.build_towers(model, x, placement, training=False)

        loss = v1.losses.sparse_softmax_cross_entropy(y, training.outputs)
        total = loss + v1.losses.get_regularization_loss()
        with tf.control_dependencies(
            v1.get_collection(v1.GraphKeys.UPDATE_OPS)
        ):
            step = v1.train.AdamOptimizer(0.01).minimize(total)
        right = tf.equal(tf.argmax(serving.outputs, 1, tf.int32), y)
        accuracy = tf.reduce_mean(tf.cast(right, tf.float32))

        saver = v1.train.Saver()
        path = os.path.join(tempfile.mkdtemp(), "model.ckpt")
        config = v1.ConfigProto(
            device_count={"CPU": 2}, allow_soft_placement=False
        )
        with v1.Session(config=config) as session:
            session.run(v1.global_variables_initializer())
            for i in range(101):
                rows = rng.integers(0, 512, 64)
                feed = {x: images[rows], y: labels[rows]}
                value, _ = session.run([loss, step], feed)
                if i % 20 == 0:
                    print(f"step {i:3d}  loss {value:.4f}")
            saver.save(session, path)
            everything = {x: images, y: labels}
            print(f"Session: {session.run(accuracy, everything):.4f}")
            training.copy_to_model(session)

    guesses = model.predict(images, verbose=0).argmax(1)
    print(f"Keras: {np.mean(guesses == labels):.4f}")


if __name__ == "__main__":
    app.run(main)
