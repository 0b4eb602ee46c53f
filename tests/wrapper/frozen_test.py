"""Frozen networks that a tower uses, but that belong to none of its models."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import parameterized
from models import chain, close, make, placement
from same import pair, same_fit

import towers

layers = keras.layers
RNG = np.random.default_rng(0)
X = RNG.normal(size=[8, 3]).astype("float32")  # batches of 6 and 2
Y = RNG.normal(size=[8, 4]).astype("float32")


def critic(trainable=False):
    """With a loop, statistics and a network inside."""
    keras.utils.set_random_seed(5)
    inner = chain([3], layers.BatchNormalization(), layers.Dense(2))
    net = chain(
        [4],
        layers.Dense(6, activation="tanh"),
        layers.Reshape([2, 3]),
        layers.GRU(3),
        inner,
    )
    inner.layers[0].moving_mean.assign([0.1, -0.2, 0.3])
    net.trainable = trainable
    return net


def student():
    return chain([3], layers.Dense(4, activation="tanh"), layers.Dense(4))


def perceptual(net):
    def loss(y, y_pred):
        apart = keras.ops.square(net(y) - net(y_pred))
        return keras.ops.mean(apart, -1)

    return loss


class Judged(layers.Layer):
    """Adds what a network says, which Keras does not know of."""

    def __init__(self, net, meets):
        super().__init__()
        self.net = lambda x: net(x)
        self.needs_all_towers = meets

    def call(self, x):
        y = self.net(x)
        if self.needs_all_towers:
            y = y - towers.all_towers(
                lambda v: tf.reduce_mean(self.net(v), 0), x
            )
        return x + tf.reduce_sum(tf.square(y), -1, keepdims=True)


class FrozenTest(parameterized.TestCase):
    @parameterized.parameters(True, False)
    @pytest.mark.rare
    def test_a_loss_may_use_one(self, on_towers):
        net = critic()
        where = placement(3, [2, 1, 1])
        models = _, towered = pair(student, where, loss_on_towers=on_towers)
        before = net.get_weights()
        how = {"loss": perceptual(net), "tolerance": 1e-4}
        how["optimizer"] = lambda: keras.optimizers.SGD(0.5)
        same_fit(models, X, Y, batch_size=6, epochs=2, **how)
        close(net.get_weights(), before)
        net.trainable = True
        towered.train_function = None
        if on_towers:
            with self.assertRaisesRegex(ValueError, "`trainable = False`"):
                towered.fit(X, Y, verbose=0)

    def gradients(self, call, model):
        @tf.function(
            autograph=False, input_signature=[tf.TensorSpec([None, 3])]
        )
        def run(x):
            with tf.GradientTape() as tape:
                tape.watch(x)
                loss = tf.reduce_sum(call(x))
            sources = [v.value for v in model.trainable_variables]
            return loss, tape.gradient(loss, [*sources, x])

        return [run(X), run(X[:2])]

    @pytest.mark.rare
    def test_a_tower_fn_may_use_one_that_the_tape_has_seen(self):
        net, model = critic(), make(student)

        def judged(model, x):
            return tf.square(net(model(x)))

        def towered(x):
            seen = net(model(x))  # so the tape follows its weights
            graph = towers.build_towers(model, x, placement(3), tower_fn=judged)
            return tf.concat([seen, graph.outputs], 0)

        def plain(x):
            return tf.concat([net(model(x)), judged(model, x)], 0)

        close(
            self.gradients(towered, model), self.gradients(plain, model), 1e-4
        )

    @parameterized.parameters(False, True)
    @pytest.mark.slow
    def test_a_layer_may_use_one(self, meets):
        model = keras.Sequential(
            [*make(student).layers, Judged(critic(), meets)]
        )
        model.build([None, 3])

        def towered(x):
            return towers.build_towers(model, x, placement(3)).outputs

        close(
            self.gradients(towered, model), self.gradients(model, model), 1e-4
        )

    def test_its_weights_are_read_where_they_are_once_a_tower(self):
        with tf.device("/CPU:3"):
            net = critic()
        model = make(student)

        @tf.function(autograph=False)
        def run(x):
            return towers.build_towers(
                model, x, placement(2), tower_fn=lambda m, x: net(m(x))
            ).outputs

        report = towers.execution_report(run, tf.ones([4, 3]))
        moved = [t for t in report.transfers if "ReadVariable" in t.tensor]
        moved = [t for t in moved if t.source.endswith("CPU:3")]
        self.assertLen(moved, 2 * len(net.weights))
        self.assertEqual({t.times for t in moved}, {1})

    def test_in_a_session_it_is_to_be_handed_over(self):
        net, model = critic(), make(student)
        expected = net(model(X))
        with tf.Graph().as_default():
            with self.assertRaisesRegex(ValueError, "Pass its model too"):
                towers.build_towers(
                    model, X, placement(2), tower_fn=lambda m, x: net(m(x))
                )
            graph = towers.build_towers(
                [model, net],
                X,
                placement(2),
                tower_fn=lambda m, x: m[1](m[0](x)),
            )
            with tf.compat.v1.Session() as session:
                session.run(tf.compat.v1.global_variables_initializer())
                close(session.run(graph.outputs), expected)
