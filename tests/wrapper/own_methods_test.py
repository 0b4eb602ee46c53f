"""Templates whose steps call methods of their class: plain Keras's numbers."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import parameterized
from executed import Executed
from models import close, make, placement

import towers

layers = keras.layers
RNG = np.random.default_rng(0)
X = RNG.normal(size=[11, 6]).astype("float32")
Y = RNG.normal(size=[11, 1]).astype("float32")
WHERE = [placement(2), placement(3, [3, 2, 1])]


def sgd():
    return keras.optimizers.SGD(0.05, momentum=0.5)


class Mine(keras.Model):
    """Two layers and a metric of its own."""

    def __init__(self):
        super().__init__()
        self.hidden = layers.Dense(5, activation="tanh")
        self.hidden.kernel_regularizer = keras.regularizers.L2(0.01)
        self.out = layers.Dense(1)
        self.mine = keras.metrics.Mean(name="mine")

    def build(self, shape):
        self.hidden.build(shape)
        self.out.build((None, 5))

    def call(self, x):
        return self.out(self.hidden(x))

    def taken(self, data, loss_of):
        """A step, as most of those below take it."""
        x, y = data[:2]
        with tf.GradientTape() as tape:
            loss = loss_of(x, y)
        self.apply_to(self.trainable_variables, tape, loss)
        self.mine.update_state(loss)
        return self.logs()

    def apply_to(self, variables, tape, loss, optimizer=None):
        gradients = tape.gradient(loss, variables)
        (optimizer or self.optimizer).apply_gradients(zip(gradients, variables))

    def logs(self):
        return {m.name: m.result() for m in self.metrics if m.variables}


class Accumulating(Mine):
    """The usual recipe of gradient accumulation."""

    def build(self, shape):
        super().build(shape)
        self.steps = tf.Variable(0, trainable=False)
        self.sums = [
            tf.Variable(tf.zeros(v.shape), trainable=False)
            for v in self.trainable_variables
        ]

    def train_step(self, data):
        self.steps.assign_add(1)
        x, y = data[:2]
        with tf.GradientTape() as tape:
            y_pred = self(x, training=True)
            loss = self.compute_loss(x, y, y_pred)
        gradients = tape.gradient(loss, self.trainable_variables)
        for kept, gradient in zip(self.sums, gradients):
            kept.assign_add(gradient)
        tf.cond(tf.equal(self.steps, 2), self.apply_sums, lambda: None)
        self.mine.update_state(loss)
        return self.logs()

    def apply_sums(self):
        pairs = zip(self.sums, self.trainable_variables)
        self.optimizer.apply_gradients(pairs)
        self.steps.assign(0)
        for kept in self.sums:
            kept.assign(tf.zeros_like(kept))


class Mixin:
    """What holds nothing, and finds all in `self`."""

    def penalty(self, x):
        return sum(self.losses) + tf.reduce_mean(self.call(x)) ** 2


class Kinds(Mixin, Mine):
    """Methods of every kind, that call each other."""

    scale = 1.0

    @property
    def rate(self):
        return self.optimizer.learning_rate

    @staticmethod
    def square(x):
        return tf.reduce_mean(x * x)

    @classmethod
    def distance(cls, x, y):
        return cls.square(x - y)

    @functools.cached_property
    def factor(self):
        return 2.0 if self.compiled else 1.0

    @tf.function
    def encoded(self, x):
        return self.hidden(x)

    def call(self, x):
        return super().call(x) * self.scale * getattr(self, "_late", 1.0)

    def _loss(self, x, y):
        y_pred = self(x, training=True) + self.out(self.encoded(x))
        loss = self.distance(y, y_pred) * self.factor
        return loss + self.penalty(x) + self.compute_loss(x, y, y_pred)

    def train_step(self, data):
        self.scale, self._late = 0.5, 0.3
        logs = self.taken(data, self._loss)
        return {**logs, "rate": tf.convert_to_tensor(self.rate)}

    def test_step(self, data):
        return {**super().test_step(data), "n": self.number()}

    def predict_step(self, data):
        return super(Mine, self).predict_step(data) * self.number()

    def number(self):
        return tf.constant(float(len(self.metrics)))


class Holding(Mine):
    """Functions kept as attributes hold the model, as another object does."""

    def __init__(self):
        super().__init__()
        self.step = lambda data: self.taken(data, self.doubled)
        self.doubled = functools.partial(self.loss_of, factor=2.0)

    def loss_of(self, x, y, factor):
        return factor * self.compute_loss(x, y, self(x, training=True))

    def train_step(self, data):
        logs = self.step(data)
        self.stop_training = True
        return logs


class Named(Mine):
    """Attributes and methods that have the names of ours."""

    def __init__(self):
        super().__init__()
        self.merge = layers.Add()
        self.whole = self.placement = 0.5
        self._fit = 3.0

    def _place(self, x, y):
        y_pred = self.merge([self(x), self.out(self.hidden(x))])
        return self.compute_loss(x, y, y_pred) * self.whole * self.placement

    def train_step(self, data):
        self._step = self._fit
        return {**self.taken(data, self._place), "s": tf.constant(self._step)}


class Alternating(Mine):
    """A `compile` of its own, and a step for each of its optimizers."""

    def compile(self, first, second, **kwargs):
        super().compile(**kwargs)
        self.first, self.second = first, second
        self.loss_fn = keras.losses.MeanSquaredError()

    @property
    def metrics(self):
        return [self.mine]

    def train_step(self, data):
        x, y = data[:2]
        loss = self._step(x, y, self.hidden, self.first)
        self.mine.update_state(self._step(x, y, self.out, self.second))
        return {"loss": loss, **self.logs()}

    def _step(self, x, y, layer, optimizer):
        with tf.GradientTape() as tape:
            loss = self.loss_fn(y, self.out(self.hidden(x)))
        self.apply_to(layer.trainable_variables, tape, loss, optimizer)
        return loss


class Driving(Mine):
    """What it does around the steps, and which of its parts Keras sees."""

    def fit(self, x, y, **kwargs):
        return super().fit(self.prepared(x), y, **kwargs)

    def evaluate(self, x, y, **kwargs):
        return super().evaluate(self.prepared(x), y, **kwargs)

    def predict(self, x, **kwargs):
        return 2.0 * super().predict(self.prepared(x), **kwargs)

    def train_on_batch(self, x, y, **kwargs):
        return super().train_on_batch(self.prepared(x), y, **kwargs)

    def make_train_function(self, force=False):
        super().make_train_function(force)
        step = self.train_function
        self.train_function = lambda data: {**step(data), "more": 1.0}

    def prepared(self, x):
        return 2.0 * x if self.optimizer else x

    @property
    def losses(self):
        return [3.0 * loss for loss in super().losses]

    @property
    def trainable_weights(self):
        return self.out.trainable_weights


class Phased(Mine):
    """Its `call`, which runs in towers, asks what it was compiled with."""

    def call(self, x):
        return super().call(x) * self.factor()

    def factor(self):
        return 2.0 if self.compiled and self.loss == "mse" else 1.0

    def compute_loss(self, x, y, y_pred, sample_weight=None, training=True):
        loss = super().compute_loss(x, y, y_pred, sample_weight)
        return loss + self.extra(x) * self.optimizer.learning_rate

    def extra(self, x):
        return tf.reduce_mean(self.out(self.hidden(2.0 * x)))


ALL = [
    Kinds,
    Driving,
    Accumulating,
    Holding,
    Named,
    Alternating,
    Phased,
]


def compiled(model, **kwargs):
    if isinstance(model, Alternating):
        model.compile(sgd(), sgd(), **kwargs)
    else:
        model.compile(sgd(), "mse", **kwargs)


def trained(kind, where, **kwargs):
    """What is said of batches of 4, 4 and 3 rows, and the weights."""
    model = plain = make(kind)
    model.build((None, 6))
    if where is not None:
        model = towers.TowerModel(model, where)
    compiled(model, **kwargs)
    options = {"batch_size": 4, "verbose": 0}
    history = model.fit(X, Y, epochs=2, shuffle=False, **options).history
    loss = {}
    if kind is not Alternating:  # which has none of Keras's
        loss = model.evaluate(X, Y, return_dict=True, **options)
    outputs = model.predict(X, **options)
    batch = model.train_on_batch(X[:5], Y[:5], return_dict=True)
    names = [metric.name for metric in model.metrics]
    numbers = [history, loss, outputs, batch, plain.get_weights()]
    return [*history, *loss, *batch, *names], numbers


class OwnMethodsTest(parameterized.TestCase):
    @parameterized.parameters(*ALL)
    @pytest.mark.slow
    @pytest.mark.rare(of=["s1", "s2", "s3", "s5", "s6"])
    def test_numbers_are_the_plain_model_s(self, kind):
        self.check(kind, WHERE[1])

    @parameterized.product(kind=ALL, where=WHERE[:1], run_eagerly=[False, True])
    @pytest.mark.rare
    def test_eagerly_too_and_in_two_towers(self, kind, where, run_eagerly):
        self.check(kind, where, run_eagerly=run_eagerly)

    def check(self, kind, where, **kwargs):
        # In a graph plain Keras gives `Phased` one of two numbers, by chance.
        plain = {"run_eagerly": True} if kind is Phased else {}
        names, numbers = trained(kind, None, **{**kwargs, **plain})
        actual, values = trained(kind, where, **kwargs)
        self.assertEqual(actual, names)
        close(values, numbers)

    def test_what_is_called_outside_of_a_step_runs_in_towers(self):
        expected, actual = make(Holding), make(Holding)
        model = towers.TowerModel(actual, WHERE[1])
        expected.build((None, 6))
        actual.build((None, 6))
        for one in (expected, model):
            compiled(one)
        close(
            model.loss_of(X, Y, factor=3.0), expected.loss_of(X, Y, factor=3.0)
        )
        close(
            model.taken((X, Y), actual.doubled),
            expected.taken((X, Y), expected.doubled),
        )
        close(actual.get_weights(), expected.get_weights())
        step = tf.function(model.loss_of, autograph=False)
        ran = Executed(lambda: step(X, Y, factor=1.0))
        ran_on = {f"tower_{i}": {f"/CPU:{i}"} for i in range(3)}
        self.assertEqual(ran.heavy(), ran_on)
        self.assertFalse(actual.compiled)

    def test_attributes_are_those_of_the_model_s(self):
        model = towers.TowerModel(make(Kinds), WHERE[0])
        model.build((None, 6))
        compiled(model, run_eagerly=True)
        model.fit(X, Y, verbose=0)
        self.assertEqual((model.scale, model._late), (0.5, 0.3))
        self.assertEqual(model.template._late, 0.3)
        close(model(X), model.template(X))
        model._late = 2.0
        close(model(X), model.template(X))
        self.assertEqual(model.factor, 2.0)
        self.assertEqual(model.rate, model.optimizer.learning_rate)
        with self.assertRaisesRegex(AttributeError, "'Kinds'.*'absent'"):
            model.absent()
