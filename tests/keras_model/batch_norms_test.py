"""batch_norms: with `synchronized=True` they are the plain model's, on demand."""

import copy
import os
import tempfile
import zipfile
from unittest import mock

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import absltest, parameterized
from executed import Executed
from models import close, make, placement

import towers
from towers.engine import lockstep

layers = keras.layers
ROWS = 31  # five steps of 7 rows, the last of 3
RATE = 0.3  # of the dropout beside batch norms


def norm(**kwargs):
    return layers.BatchNormalization(momentum=0.8, **kwargs)


def stack(*shape, of, dtype=None, policy="float32"):
    """A factory of a Sequential; `of` makes its layers."""

    def model():
        before = keras.config.dtype_policy()
        keras.config.set_dtype_policy(policy)
        try:
            return keras.Sequential([keras.Input(shape, dtype=dtype), *of()])
        finally:
            keras.config.set_dtype_policy(before)

    return model


def convolutions():
    return [
        *(layers.Conv2D(4, 3), norm(), layers.ReLU(), layers.Flatten()),
        *(layers.Dense(3), norm(scale=False)),
    ]


def of_tokens(width, axis):
    embedding = layers.Embedding(11, width, mask_zero=True)
    return [embedding, norm(axis=axis), layers.Dense(2)]


def renormalized():
    clipped = {"rmax": 1.5, "rmin": 0.5, "dmax": 0.3}
    return [
        layers.Dense(3),
        norm(renorm=True, renorm_clipping=clipped),
        layers.Dense(2),
    ]


def partly_frozen():
    return [
        layers.Dense(4, activity_regularizer="l2"),
        norm(trainable=False),
        layers.Dense(4, "tanh"),
        norm(gamma_regularizer="l2"),
        layers.Dropout(RATE),
        layers.Dense(2),
    ]


def frozen(**kwargs):
    return [layers.Dense(4), norm(trainable=False, **kwargs), layers.Dense(2)]


def nested():
    """A model inside, that is called twice."""
    inside = [keras.Input([4]), layers.Dense(4, "tanh"), norm()]
    inner = keras.Sequential(inside, name="inner")
    x = keras.Input([4])
    return keras.Model(x, layers.Dense(2)(inner(inner(x)) + x))


class Cell(layers.Layer):
    """Of an RNN, with a batch norm inside."""

    state_size = output_size = 4

    def __init__(self):
        super().__init__()
        self.dense, self.norm = layers.Dense(4), norm(name="inside")

    def build(self, shape):
        self.dense.build((None, shape[-1] + 4))
        self.norm.build((None, 4))

    def call(self, x, states, training=None):
        x = self.dense(keras.ops.concatenate([x, states[0]], -1))
        x = keras.ops.tanh(self.norm(x, training=training))
        return x, [x]


def recurrent(unroll):
    return lambda: [layers.RNN(Cell(), unroll=unroll), layers.Dense(2)]


class Told(keras.Model):
    """With a batch norm that is told its phase."""

    def __init__(self, phase):
        super().__init__()
        self.phase = phase
        self.norm, self.out = norm(), layers.Dense(2)

    def call(self, x):
        return self.out(self.norm(x, training=self.phase))


def in_phase(phase):
    def model():
        model = Told(phase)
        model(np.zeros([2, 4], "float32"))
        return model

    return model


class Coder(keras.Model):
    """With a step of its own, that calls its parts."""

    def __init__(self):
        super().__init__()
        code = [layers.Dense(6), norm(), layers.Dropout(RATE), layers.Dense(2)]
        self.encoder = keras.Sequential([keras.Input([4]), *code])
        back = [layers.Dense(6), norm(), layers.Dense(4)]
        self.decoder = keras.Sequential([keras.Input([2]), *back])

    def call(self, x):
        return self.decoder(self.encoder(x))

    def train_step(self, data):
        x, _ = data
        with tf.GradientTape() as tape:
            code = self.encoder(x, training=True)
            back = self.decoder(code, training=True)
            loss = tf.reduce_mean((back - x) ** 2) + tf.reduce_mean(code**2)
        variables = self.trainable_variables
        gradients = tape.gradient(loss, variables)
        self.optimizer.apply_gradients(zip(gradients, variables))
        return {"loss": loss}


def coder():
    model = Coder()
    model(np.zeros([1, 4], "float32"))
    return model


# By name the factory, and how far the weights may be.
TRAINED = {
    "images": (stack(8, 8, 2, of=convolutions), 1e-5),
    "masked": (stack(5, of=lambda: of_tokens(3, -1), dtype="int32"), 1e-5),
    "partly_frozen": (stack(4, of=partly_frozen), 1e-5),
    "own_step": (coder, 1e-5),
    "renormalized": (stack(4, of=renormalized), 1e-5),
    "nested": (nested, 1e-5),
    "masked_one": (stack(5, of=lambda: of_tokens(1, -1), dtype="int32"), 1e-5),
    "masked_axis": (stack(5, of=lambda: of_tokens(3, 1), dtype="int32"), 1e-5),
    "axis": (
        stack(4, 5, of=lambda: [norm(axis=1), layers.Flatten()]),
        1e-5,
    ),
    "timed": (
        stack(3, 4, of=lambda: [layers.TimeDistributed(norm())]),
        1e-5,
    ),
    "unrolled": (stack(3, 4, of=recurrent(True)), 1e-5),
    "all_frozen": (stack(4, of=frozen), 1e-5),
    "told": (in_phase(True), 1e-5),
    "doubles": (stack(8, 8, 2, of=convolutions, policy="float64"), 1e-6),
    "halves": (stack(8, 8, 2, of=convolutions, policy="mixed_float16"), 5e-3),
}
# How those are trained that are quick.
QUICK = {
    "images": {},
    "masked": {},
    "partly_frozen": {"loss_on_towers": True},
    "own_step": {},
}


def inputs(model, rows):
    rng = np.random.default_rng(rows)
    if isinstance(model, (Told, Coder)):
        return rng.normal(size=[rows, 4]).astype("float32")
    x = model.inputs[0]
    if "int" in x.dtype:
        return rng.integers(0, 11, [rows, *x.shape[1:]]).astype("int32")
    return rng.normal(size=[rows, *x.shape[1:]]).astype("float32")


def fitted(model, like, **kwargs):
    """Weights and losses of five steps."""
    x = inputs(like, ROWS)
    y = np.random.default_rng(1).normal(size=like(x[:3]).shape[1:])
    y = np.broadcast_to(y, [ROWS, *y.shape]).astype("float32")
    model.compile(keras.optimizers.SGD(0.05, 0.9), "mse", **kwargs)
    history = model.fit(x, y, batch_size=7, shuffle=False, verbose=0)
    return [*model.get_weights(), history.history["loss"]]


def meetings(call):
    """How often towers were built to meet."""
    with mock.patch.object(
        lockstep, "run_in_step", wraps=lockstep.run_in_step
    ) as built:
        call()
    return built.call_count


class EqualityTest(parameterized.TestCase):
    @parameterized.named_parameters((name, name) for name in QUICK)
    def test_fit_is_the_plain_model_s(self, name):
        self.check(name, 3, [2, 1, 1], **QUICK[name])

    @parameterized.product(
        name=list(TRAINED),
        case=[
            (1, None, {}),
            (2, None, {"loss_on_towers": True}),
            (2, [1, 3], {"quick_start": True}),
            (4, [3, 1, 0, 2], {}),
        ],
    )
    @pytest.mark.rare
    def test_and_in_any_number_of_towers(self, name, case):
        n, weights, kwargs = case
        own = name == "own_step"
        self.check(name, n, weights, **({} if own else kwargs))

    def check(self, name, n, weights, **kwargs):
        model, tolerance = TRAINED[name]
        plain, like = make(model), make(model)
        expected = fitted(plain, like, run_eagerly=name in QUICK)
        where = placement(n, weights)
        towered = towers.TowerModel(
            make(model), where, synchronized=True, **kwargs
        )
        close(fitted(towered, like), expected, tolerance)
        for layer in towered.template._flatten_layers():
            if isinstance(layer, layers.BatchNormalization):
                self.assertFalse(layer.synchronized)

    @parameterized.parameters("masked_one", "masked_axis")
    def test_moving_statistics_are_the_batch_s_either_way(self, name):
        plain, model = (make(TRAINED[name][0]) for _ in range(2))
        x = inputs(plain, 7)
        plain(x, training=True)
        graph = towers.build_towers(model, x, placement(3), training=True)
        graph.apply_updates()
        close(model.get_weights(), plain.get_weights(), 1e-6)

    def test_eager_calls_go_by_what_is_frozen_now(self):
        models = [make(TRAINED["partly_frozen"][0]) for _ in range(2)]
        models[1] = towers.TowerModel(
            models[1], placement(2), synchronized=True
        )
        x = inputs(models[0], 7)
        for trainable in (True, False, True):
            models[0].trainable = models[1].template.trainable = trainable
            close(models[1](x, training=True), models[0](x, training=True))
        close(models[1].get_weights(), models[0].get_weights())

    def test_what_trains_at_every_call_is_exported_so(self):
        x = inputs(make(in_phase(True)), 7)
        expected = make(in_phase(True)).predict_on_batch(x)
        model = towers.TowerModel(
            make(in_phase(True)), placement(3), synchronized=True
        )
        folder = tempfile.mkdtemp()
        spec = tf.TensorSpec([None, 4])
        model.export(folder, verbose=False, input_signature=spec)
        served = tf.saved_model.load(folder)
        close(served.serve(tf.constant(x)), expected)
        close(model.predict_on_batch(x), expected)


class MeetingTest(parameterized.TestCase):
    def build(self, model, training=None, **kwargs):
        model = make(model)
        x = inputs(model, 7)

        def run():
            towers.build_towers(
                model, x, placement(3), training, synchronized=True, **kwargs
            )

        return meetings(run)

    @parameterized.named_parameters(
        ("frozen", stack(4, of=frozen), True),
        ("frozen_by_itself", stack(4, of=lambda: frozen(synchronized=True))),
        ("told_not_to_train", in_phase(False), True),
        ("evaluation", TRAINED["partly_frozen"][0], False),
        ("no_phase", TRAINED["partly_frozen"][0], None),
        (
            "function",
            *(TRAINED["partly_frozen"][0], None),
            lambda model, x: model(x, training=False),
        ),
    )
    def test_what_does_not_train_makes_no_towers_meet(
        self, model, training=True, tower_fn=None
    ):
        self.assertEqual(self.build(model, training, tower_fn=tower_fn), 0)

    @parameterized.named_parameters(
        ("partly_frozen", TRAINED["partly_frozen"][0], True),
        ("always", in_phase(True), False),
        (
            "function",
            *(TRAINED["partly_frozen"][0], False),
            lambda model, x: model(x, training=True),
        ),
    )
    def test_what_trains_does(self, model, training, tower_fn=None):
        self.assertEqual(self.build(model, training, tower_fn=tower_fn), 1)

    def test_an_outer_call_tells_the_phase(self):
        inner = make(nested)
        x = inputs(inner, 5)

        class Outer(keras.Model):
            def call(self, x, training=None):
                return towers.build_towers(
                    inner, x, placement(2), synchronized=True
                ).outputs

        for training in (True, False):
            run = tf.function(Outer(), autograph=False)
            self.assertEqual(
                meetings(lambda run=run, t=training: run(x, training=t)),
                training,
            )
            close(run(x, training=training), make(nested)(x, training=training))

    def test_evaluate_and_predict_do_not_nor_one_tower(self):
        model, x = make(nested), inputs(make(nested), 7)
        for n in (1, 2):
            towered = towers.TowerModel(model, placement(n), synchronized=True)
            towered.compile("sgd", "mse")

            def ask(towered=towered, n=n):
                towered.evaluate(x, x[:, :2], verbose=0)
                towered.predict(x, verbose=0)
                if n == 1:
                    towered.train_on_batch(x, x[:, :2])

            self.assertEqual(meetings(ask), 0)

    def test_few_vectors_cross(self):
        """Where no tower is where they meet, nor the variables."""
        sends = []
        for model, synchronized in (
            (stack(4, of=frozen), False),
            (stack(4, of=frozen), True),
            (TRAINED["images"][0], False),
            (TRAINED["images"][0], True),
        ):
            towered = towers.TowerModel(
                make(model),
                placement(2, parameter_device="/CPU:3"),
                synchronized=synchronized,
            )
            towered.compile("sgd", "mse")
            x = inputs(towered.template, 6)
            y = np.zeros([6, towered.output_shape[-1]])
            step = Executed(
                lambda model=towered, x=x, y=y: model.train_on_batch(x, y)
            )
            sends.append(len(step.sends()))
        self.assertEqual(sends[1], sends[0])
        # Of each of two layers and towers the moments up and down, and the
        # gradients of both; where those of both layers went up at once.
        self.assertEqual(sends[3] - sends[2], 2 * (4 * 2 - 1))


class FaceTest(absltest.TestCase):
    def test_it_is_the_plain_model_that_is_saved(self):
        plain = make(nested)
        model = towers.TowerModel(plain, placement(2), synchronized=True)
        configs = []
        for one in (plain, model):
            path = os.path.join(tempfile.mkdtemp(), "model.keras")
            one.save(path)
            with zipfile.ZipFile(path) as file:
                configs.append(file.read("config.json"))
        self.assertEqual(*configs)
        loaded = keras.saving.load_model(path)
        close(loaded.get_weights(), plain.get_weights())
        self.assertTrue(copy.deepcopy(model).synchronized)

    def test_one_line_has_it_too(self):
        with mock.patch.object(
            towers.Placement, "gpus", lambda n, **_: placement(n)
        ):
            model = towers.to_multi_gpu(make(nested), 2, synchronized=True)
        self.assertTrue(model.synchronized)


class RefusalTest(parameterized.TestCase):
    class Remat(layers.Layer):
        def __init__(self):
            super().__init__()
            self.norm = norm(name="inside")

        def build(self, shape):
            self.norm.build(shape)

        def call(self, x, training=None):
            call = keras.remat(lambda x: self.norm(x, training=training))
            return call(x)

    @parameterized.named_parameters(
        (
            "loop",
            stack(3, 4, of=recurrent(False)),
            {},
            r"cell.*/inside', which trains on .*\n?.* a loop",
        ),
        (
            "remat",
            stack(4, of=lambda: [RefusalTest.Remat()]),
            {},
            "/inside', which trains on .* inside a custom gradient",
        ),
        (
            "xla",
            stack(4, of=lambda: [norm(name="inside")]),
            {"jit_compile": True},
            "'inside' asks all towers.*synchronized=True",
        ),
        (
            "xla_of_what_always_trains",
            in_phase(True),
            {"jit_compile": True, "training": False},
            "'batch_norm.*' trains on the statistics of the whole batch",
        ),
    )
    def test_where_no_other_tower_can_be_asked(self, model, kwargs, expected):
        model = make(model)
        x = inputs(model, 4)
        with self.assertRaisesRegex(ValueError, expected):
            towers.build_towers(
                *(model, x, placement(2)),
                **{"training": True, "synchronized": True, **kwargs},
            )

    def test_compile_with_xla(self):
        model = towers.TowerModel(make(nested), placement(2), synchronized=True)
        with self.assertRaisesRegex(ValueError, "'batch_norm.* asks all"):
            model.compile("sgd", "mse", jit_compile=True)
        model.template.trainable = False
        model.compile("sgd", "mse", jit_compile=True)
