"""Ragged, sparse, whole and string inputs, and states of rows."""

import inspect
import os
import tempfile

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import absltest, parameterized
from models import close, make, placement
from same import pair, same_fit, same_step

import towers

layers = keras.layers
ROWS = (1, 2, 7)


class Bag(keras.Model):
    """The sum of the embeddings of each row's words."""

    def __init__(self):
        super().__init__()
        self.words, self.head = layers.Embedding(10, 4), layers.Dense(2)

    def call(self, x):
        words = tf.ragged.map_flat_values(self.words, x)
        return self.head(tf.reduce_sum(words, 1))


class Sums(keras.Model):
    """Of floats that are ragged twice."""

    def __init__(self):
        super().__init__()
        self.head = layers.Dense(3)

    def call(self, x):
        return self.head(tf.reduce_sum(tf.reduce_sum(x * x, 2), 1)[:, None])


def ragged():
    model = Bag()
    model(tf.ragged.constant([[1, 2], [3]]))
    return model


def twice_ragged():
    model = Sums()
    model(tf.ragged.constant([[[1.0], [2.0]], [[]]], ragged_rank=2))
    return model


def sparse():
    x = keras.Input([9], sparse=True)
    return keras.Model(x, layers.Dense(3)(layers.Dense(4, "relu")(x)))


def strings():
    x = keras.Input([2], dtype="string")
    ids = layers.StringLookup(vocabulary=["a", "b", "c"])(x)
    return keras.Model(x, layers.Dense(2)(layers.Embedding(4, 3)(ids)))


def texts():
    x = keras.Input([], dtype="string")
    ids = layers.TextVectorization(
        vocabulary=["a", "b", "c"], output_sequence_length=3
    )(x)
    return keras.Model(x, layers.Dense(2)(layers.Embedding(5, 3)(ids)))


def whole():
    """Rows against a table that is no batch, and a scalar."""
    x = keras.Input([4], name="a")
    table = keras.Input(batch_shape=(5, 4), name="table")
    scale = keras.Input(batch_shape=(), name="scale")
    near = keras.ops.matmul(layers.Dense(4)(x), keras.ops.transpose(table))
    return keras.Model(
        {"a": x, "table": table, "scale": scale}, layers.Dense(2)(near * scale)
    )


def batch(name, rows):
    rng = np.random.default_rng(rows)
    lengths = rng.integers(0, 4, rows)
    words = rng.choice(["a", "b", "c", "z"], [rows, 2])
    if name == "ragged":
        ids = rng.integers(0, 10, lengths.sum())
        return tf.RaggedTensor.from_row_lengths(ids, lengths)
    if name == "twice_ragged":
        inner = rng.integers(0, 3, lengths.sum())
        values = rng.normal(size=inner.sum()).astype("float32")
        return tf.RaggedTensor.from_nested_row_lengths(values, [lengths, inner])
    if name == "sparse":
        x = rng.normal(size=[rows, 9]) * (rng.random([rows, 9]) < 0.3)
        return tf.sparse.from_dense(x.astype("float32"))
    if name == "strings":
        return tf.constant(words)
    if name == "texts":
        return tf.constant([" ".join(pair) for pair in words])
    return {
        "a": tf.constant(rng.normal(size=[rows, 4]), tf.float32),
        "table": tf.constant(rng.normal(size=[5, 4]), tf.float32),
        "scale": tf.constant(1.5),
    }


NAMED = [
    (m.__name__, m)
    for m in (ragged, twice_ragged, sparse, strings, texts, whole)
]


RAGGED = (ragged, twice_ragged)
# These are checked in more ways than the others.
KNOWN = (ragged, sparse, whole)
HAS_RAGGED = "ragged" in inspect.signature(keras.KerasTensor).parameters


def wholes(model):
    return ["table", "scale"] if model is whole else []


def open_rows(x, model):
    """The spec of any number of rows."""
    if isinstance(x, dict):
        return {
            k: tf.TensorSpec(v.shape, v.dtype)
            if k in wholes(model)
            else open_rows(v, model)
            for k, v in x.items()
        }
    shape = [None, *x.shape[1:]]
    if isinstance(x, tf.RaggedTensor):
        return tf.RaggedTensorSpec(shape, x.dtype, x.ragged_rank)
    if isinstance(x, tf.SparseTensor):
        return tf.SparseTensorSpec(shape, x.dtype)
    return tf.TensorSpec(shape, x.dtype)


class EqualityTest(parameterized.TestCase):
    @parameterized.named_parameters(NAMED)
    @pytest.mark.rare(of=["twice_ragged"])
    def test_outputs_and_gradients_are_the_plain_model_s(self, model):
        self.check(model, placement(3, [2, 1, 1]), rows_known=model in KNOWN)

    @parameterized.product(
        model=[m for _, m in NAMED],
        split=[(1, None), (2, [3, 1]), (3, None), (4, None)],
    )
    @pytest.mark.rare
    def test_and_in_any_number_of_towers(self, model, split):
        self.check(model, placement(*split), rows_known=True)

    def check(self, model, where, rows_known):
        plain = make(model)
        batches = [batch(model.__name__, rows) for rows in ROWS]
        spec = open_rows(batches[0], model)
        how = {"of": tf.reduce_sum, "inputs": True}
        how["options"] = {"whole": wholes(model)}
        same_step(plain, where, *batches, spec=spec, **how)
        if rows_known:
            same_step(plain, where, batches[-1], **how)

    @parameterized.named_parameters(NAMED)
    @pytest.mark.rare(of=["ragged", "strings", "sparse"])
    def test_fit_is_the_plain_model_s(self, model):
        self.check_fit(model, [False] + [True] * (model in KNOWN))

    @parameterized.parameters(twice_ragged, strings, texts)
    @pytest.mark.rare
    def test_fit_with_the_loss_on_towers(self, model):
        self.check_fit(model, [True])

    def check_fit(self, model, ways):
        plain = make(model)
        x = batch(model.__name__, 7)
        y = np.ones(plain(x).shape, "float32")
        if model is whole:
            data = tf.data.Dataset.from_tensors((x, y))
        else:
            data = tf.data.Dataset.from_tensor_slices((x, y)).batch(4)
        for on_towers in ways:
            if on_towers and model in RAGGED and not HAS_RAGGED:
                continue  # this Keras has no symbols for ragged tensors
            how = {"loss_on_towers": on_towers, "whole": wholes(model)}
            models = pair(model, placement(3), **how)
            same_fit(models, data, optimizer=keras.optimizers.SGD, epochs=3)
            if not on_towers:
                close(*(m(x) for m in models))

    # The tables of `strings` and `texts` are objects of Keras.
    @parameterized.parameters(ragged, sparse, whole, twice_ragged)
    @pytest.mark.rare(after=1)
    def test_a_saved_model_answers_as_the_plain_one(self, model):
        plain = make(model)
        x = batch(model.__name__, 5)
        path = os.path.join(tempfile.mkdtemp(), "saved")
        towers.export_towers(
            plain,
            path,
            placement(3),
            open_rows(x, model) if model in RAGGED else None,
            whole=wholes(model),
        )
        loaded = tf.saved_model.load(path)
        for rows in (1, 5):
            x = batch(model.__name__, rows)
            close(loaded.serve(x), plain(x))


class StatefulTest(parameterized.TestCase):
    second = layers.SimpleRNN

    def model(self, rows):
        return keras.Sequential(
            [
                keras.Input(batch_shape=(rows, 3, 2)),
                layers.LSTM(2, stateful=True, return_sequences=True),
                self.second(2, stateful=True),
                layers.Dense(2),
            ]
        )

    @pytest.mark.rare
    def test_each_tower_goes_on_from_the_state_of_its_rows(self):
        self.check(5, 3)

    def test_towers_without_rows_keep_no_state(self):
        x = np.random.default_rng(0).normal(size=[3, 3, 2])
        results = []
        for n in (0, 2):
            model = make(lambda: self.model(1))
            model = towers.TowerModel(model, placement(n)) if n else model
            results.append(model.predict(x, batch_size=1, verbose=0))
        close(results[1], results[0])

    @parameterized.parameters((7, 1), (3, 2), (1, 4), (7, 4))
    @pytest.mark.rare
    def test_and_in_any_number_of_towers(self, rows, n):
        self.second = lambda *args, **kwargs: layers.Bidirectional(
            layers.GRU(*args, **kwargs)
        )
        self.check(rows, n)

    def check(self, rows, n):
        rng = np.random.default_rng(0)
        x = rng.normal(size=[2 * rows, 3, 2]).astype("float32")
        y = rng.normal(size=[2 * rows, 2]).astype("float32")
        plain = make(lambda: self.model(rows))
        towered = towers.TowerModel(
            make(lambda: self.model(rows)), placement(n)
        )
        results = []
        for m in (plain, towered):
            sgd = keras.optimizers.SGD(0.1)
            m.compile(sgd, "mse", run_eagerly=m is plain)
            m.fit(x, y, batch_size=rows, epochs=2, shuffle=False, verbose=0)
            results.append(m.predict(x, batch_size=rows, verbose=0))
            m.layers[0].reset_state()
            results.append(m.predict(x, batch_size=rows, verbose=0))
        close(results[2:], results[:2])
        self.assertGreater(np.abs(results[0] - results[1]).max(), 1e-4)

    def test_other_numbers_of_rows_are_refused(self):
        model = make(lambda: self.model(4))
        call = tf.function(
            lambda: (
                towers.build_towers(
                    model, tf.ones([3, 3, 2]), placement(2)
                ).outputs
            )
        )
        towered = towers.TowerModel(model, placement(2))
        for refused in (
            call,
            lambda: towered.predict(
                np.ones([7, 3, 2]), batch_size=4, verbose=0
            ),
        ):
            with self.assertRaisesRegex(ValueError, "Expected batch size: 4"):
                refused()


class RefusalTest(absltest.TestCase):
    def test_whole_inputs_that_are_not_there(self):
        x = batch("whole", 3)
        for names, error, message in (
            (["tabel"], ValueError, r"'tabel', but the inputs have \['a'"),
            ("table", TypeError, "list of names"),
            (["a", "table", "scale"], ValueError, "at least one tensor"),
            (["table"], ValueError, "first axis of rows"),
            (["scale"], ValueError, "same number of rows"),
        ):
            with self.subTest(names=names):
                with self.assertRaisesRegex(error, message):
                    towers.build_towers(
                        make(whole), x, placement(2), whole=names
                    )

    def test_how_a_ragged_input_is_ragged_must_be_said(self):
        if not HAS_RAGGED:
            self.skipTest("This Keras has no symbols for ragged tensors.")
        x = keras.Input([None], ragged=True)
        model = keras.Model(x, layers.Embedding(3, 2)(x))
        path = os.path.join(tempfile.mkdtemp(), "saved")
        with self.assertRaisesRegex(ValueError, "RaggedTensorSpec"):
            towers.export_towers(model, path, placement(2))
