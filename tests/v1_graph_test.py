"""Towers in tf.compat.v1 graphs: Sessions, collections, Savers."""

import collections
import os
import re
import subprocess
import sys
import tempfile

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import absltest, parameterized
from executed import HEAVY, nodes_of, short
from models import attention, close, inputs, make, placement, recurrent, targets

import towers

v1 = tf.compat.v1
KEYS = v1.GraphKeys
layers = keras.layers


def convolutional():
    """With batch norm and dropout, whose state moves."""
    return keras.Sequential(
        [
            keras.Input([8, 8, 2]),
            layers.Conv2D(4, 3, kernel_regularizer="l2"),
            layers.BatchNormalization(momentum=0.5),
            layers.ReLU(),
            layers.Dropout(0.3),
            layers.Flatten(),
            layers.Dense(3),
        ]
    )


def batch(model, rows=7):
    """To be called outside of graphs, where models can be."""
    return inputs(model, rows), targets(model, rows)


def strict():
    """Four CPU devices, and nothing but what was asked for."""
    return v1.ConfigProto(device_count={"CPU": 4}, allow_soft_placement=False)


class Program:
    """What a Session program of 2017 makes of a model."""

    def __init__(self, model, where, data):
        self.x, self.y = data
        self.px = v1.placeholder(self.x.dtype, [None, *self.x.shape[1:]])
        self.py = v1.placeholder(tf.float32, [None, *self.y.shape[1:]])
        self.training = towers.build_towers(model, self.px, where, True)
        self.graph = towers.build_towers(model, self.px, where, False)
        self.loss = tf.reduce_mean((self.training.outputs - self.py) ** 2)
        self.loss += v1.losses.get_regularization_loss()
        minimize = v1.train.MomentumOptimizer(0.05, 0.5).minimize(self.loss)
        self.step = tf.group(minimize, *v1.get_collection(KEYS.UPDATE_OPS))
        self.feed = {self.px: self.x, self.py: self.y}

    def predict(self, session):
        return session.run(self.graph.outputs, {self.px: self.x})


class SessionTest(parameterized.TestCase):
    @parameterized.parameters(convolutional, attention)
    @pytest.mark.slow(after=1)
    def test_a_session_trains_saves_and_copies(self, model):
        self.check(model)

    @pytest.mark.rare
    def test_so_with_loops(self):
        self.check(recurrent)

    def check(self, model):
        model = make(model)
        x, y = batch(model)
        before = model(x).numpy()
        with tf.Graph().as_default():
            program = Program(model, placement(3), (x, y))
            saver = v1.train.Saver()
            with v1.Session(config=strict()) as session:
                session.run(v1.global_variables_initializer())
                close(program.predict(session), before, 1e-4)
                self.check_places(session, program)
                losses = [
                    session.run([program.loss, program.step], program.feed)[0]
                    for _ in range(20)
                ]
                self.assertLess(losses[-1], losses[0])
                trained = program.predict(session)
                path = os.path.join(tempfile.mkdtemp(), "model")
                saver.save(session, path)

                session.run(v1.global_variables_initializer())
                close(program.predict(session), before, 1e-4)
                saver.restore(session, path)
                close(program.predict(session), trained)
                program.graph.copy_to_model(session)

                session.run(v1.global_variables_initializer())
                v1.get_default_graph().finalize()
                program.graph.copy_from_model(session)
                close(program.predict(session), trained)
        close(model(x), trained, 1e-4)

    def check_places(self, session, program):
        """Takes a step, and looks that every heavy op ran on its tower."""
        metadata = v1.RunMetadata()
        session.run(
            [program.loss, program.step],
            program.feed,
            options=v1.RunOptions(output_partition_graphs=True),
            run_metadata=metadata,
        )
        results = collections.defaultdict(set)
        for device, name, node in nodes_of(metadata.partition_graphs):
            if HEAVY.search(node.op):
                tower = re.search(r"tower_\d", name)
                results[tower.group() if tower else name].add(device)
        self.assertEqual(
            dict(results), {f"tower_{i}": {f"/CPU:{i}"} for i in range(3)}
        )

    def test_weights_after_steps_are_the_plain_model_s(self):
        expected, model = make(recurrent), make(recurrent)
        optimizer = keras.optimizers.SGD(0.05, momentum=0.5)
        data = batch(model, 2)
        with tf.Graph().as_default():
            program = Program(model, placement(3, [2, 1, 0]), data)
            with v1.Session(config=strict()) as session:
                session.run(v1.global_variables_initializer())
                self.check_places(session, program)
                for _ in range(4):
                    session.run(program.step, program.feed)
                program.graph.copy_to_model(session)
        for _ in range(5):
            with tf.GradientTape() as tape:
                outputs = expected(program.x)
                loss = tf.reduce_mean((outputs - program.y) ** 2)
            gradients = tape.gradient(loss, expected.trainable_variables)
            optimizer.apply(gradients, expected.trainable_variables)
        close(model.get_weights(), expected.get_weights())

    def test_moving_statistics_and_dropout_move(self):
        model = make(convolutional)
        eager = make(convolutional)
        x = inputs(model, 7)
        with tf.Graph().as_default():
            px = v1.placeholder(tf.float32, [None, 8, 8, 2])
            graph = towers.build_towers(model, px, placement(3), True)
            with v1.Session(config=strict()) as session:
                session.run(v1.global_variables_initializer())
                one = session.run(graph.outputs, {px: x})
                two = session.run(graph.outputs, {px: x})
                # Without UPDATE_OPS too, as for a dropout of 2017.
                self.assertGreater(np.abs(one - two).max(), 0.01)
                session.run(v1.get_collection(KEYS.UPDATE_OPS), {px: x})
                graph.copy_to_model(session)
        eager(x, training=True)
        for a, b in zip(model.layers[1].weights, eager.layers[1].weights):
            close(a, b)

    def test_a_monitored_session_trains(self):
        model = make(convolutional)
        x, y = inputs(model, 6), targets(model, 6)
        folder = tempfile.mkdtemp()
        with tf.Graph().as_default():
            count = v1.train.get_or_create_global_step()
            graph = towers.build_towers(
                model, tf.constant(x), placement(2), True
            )
            loss = tf.reduce_mean((graph.outputs - y) ** 2)
            with tf.control_dependencies(v1.get_collection(KEYS.UPDATE_OPS)):
                optimizer = v1.train.AdamOptimizer(0.01)
                step = optimizer.minimize(loss, global_step=count)
            losses = []
            with v1.train.MonitoredTrainingSession(
                config=strict(),
                hooks=[v1.train.StopAtStepHook(last_step=15)],
                checkpoint_dir=folder,
            ) as session:
                graph.copy_from_model(session)
                while not session.should_stop():
                    losses.append(session.run([loss, step])[0])
                graph.copy_to_model(session)  # after the last step, too
        self.assertLen(losses, 15)
        self.assertLess(losses[-1], losses[0])
        saved = tf.train.load_checkpoint(folder)
        for variable in model.variables:
            close(variable, saved.get_tensor(variable.path))


class GraphTest(absltest.TestCase):
    def test_variables_are_made_once_and_found_in_collections(self):
        model = make(convolutional)
        where = placement(2, parameter_device="/CPU:3")
        data = batch(model)
        with tf.Graph().as_default() as graph:
            with tf.device("/CPU:2"), v1.variable_scope("mine"):
                program = Program(model, where, data)
            trainable = v1.trainable_variables()
            model_s = [v for v in v1.global_variables() if "Mome" not in v.name]
            self.assertEqual(
                [v.op.name for v in trainable],
                [v.path for v in model.trainable_variables],
            )
            self.assertCountEqual(
                [v.op.name for v in model_s], [v.path for v in model.variables]
            )
            for variable in v1.global_variables():
                self.assertEqual(short(variable.device), "/CPU:3")
                self.assertEqual(variable.op.type, "VarHandleOp")
            (penalty,) = v1.get_collection(KEYS.REGULARIZATION_LOSSES)
            self.assertIs(program.training.losses[-1], penalty)
            self.assertIs(program.graph.losses[-1], penalty)
            # Two moving statistics and the seed, of the training towers only.
            self.assertLen(v1.get_collection(KEYS.UPDATE_OPS), 3)
            v1.train.export_meta_graph(graph=graph)  # holds nothing odd

    def test_loops_and_functions_may_hold_the_towers(self):
        model = make(recurrent)
        x = inputs(model, 5)
        expected = model(x).numpy()
        with tf.Graph().as_default():

            def body(i, total):
                graph = towers.build_towers(model, x, placement(2), False)
                return i + 1, total + tf.reduce_sum(graph.outputs)

            looped = tf.while_loop(lambda i, _: i < 3, body, [0, 0.0])[1]
            function = tf.function(
                lambda x: towers.build_towers(model, x, placement(2)).outputs
            )(tf.constant(x))
            self.assertLen(v1.trainable_variables(), 5)
            with v1.Session(config=strict()) as session:
                session.run(v1.global_variables_initializer())
                close(session.run(looped), 3 * expected.sum())
                close(session.run(function), expected)

    @pytest.mark.slow
    def test_per_tower_losses_and_gradients(self):
        model = make(recurrent)
        x, y = inputs(model, 5), targets(model, 5)
        with tf.Graph().as_default():
            graph = towers.build_towers(
                model,
                (tf.constant(x), tf.constant(y)),
                placement(3),
                merge="mean",
                tower_fn=lambda m, s: tf.reduce_mean((m(s[0]) - s[1]) ** 2),
            )
            each = [tf.gradients(t.outputs, t.parameters) for t in graph.towers]
            mean = towers.average_gradients(each, rows=graph.rows)
            whole = tf.gradients(graph.outputs, v1.trainable_variables())
            with v1.Session(config=strict()) as session:
                session.run(v1.global_variables_initializer())
                mean, whole, loss = session.run([mean, whole, graph.outputs])
        close(mean, whole)
        close(loss, np.mean((model(x) - y) ** 2))

    def test_an_unbuilt_model_is_built(self):
        model = keras.Sequential([layers.Dense(2), layers.Dense(1)])
        x = np.ones([4, 3], "float32")
        with tf.Graph().as_default():
            graph = towers.build_towers(model, x, placement(2))
            with v1.Session(config=strict()) as session:
                session.run(v1.global_variables_initializer())
                outputs = session.run(graph.outputs)
        close(outputs, model(x))


class RefusalTest(absltest.TestCase):
    def test_a_program_without_eager_execution_is_told_what_to_do(self):
        code = (
            "import keras, tensorflow as tf, towers\n"
            "model = keras.Sequential([keras.Input([3]),"
            " keras.layers.Dense(2)])\n"
            "tf.compat.v1.disable_eager_execution()\n"
            "where = towers.Placement(['/CPU:0'])\n"
            "towers.build_towers(model, tf.ones([4, 3]), where)\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
        )
        self.assertRegex(done.stderr, "RuntimeError: .*disable_v2_behavior")
