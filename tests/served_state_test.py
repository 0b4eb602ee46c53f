"""What a SavedModel keeps besides weights: seeds, state, tables, structure."""

import os
import pathlib
import tempfile

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import parameterized
from chiefs import said
from models import close, placement

import towers

layers = keras.layers
THREE = placement(3, [2, 1, 1], parameter_device="/CPU:2")
ONE = placement(1, parameter_device="/CPU:2")


class Noise(layers.Layer):
    """Noise that is on at inference, and counts of how often it was."""

    def __init__(self):
        super().__init__()
        self.seed = keras.random.SeedGenerator(3)

    def build(self, _):
        zero = {"initializer": "zeros", "trainable": False}
        self.total = self.add_weight(shape=[], name="total", **zero)
        self.calls = self.add_weight(
            shape=[], name="calls", dtype="int32", **zero
        )

    def call(self, x):
        self.total.assign_add(2.0)
        self.calls.assign_add(1)
        shape = keras.ops.shape(x)
        return x + keras.random.normal(shape, seed=self.seed) + self.total


def noisy():
    return keras.Sequential([keras.Input([3]), layers.Dense(4), Noise()])


def folder():
    return os.path.join(tempfile.mkdtemp(), "model")


def exported(model, where, **kwargs):
    path = folder()
    towers.export_towers(model, path, where, **kwargs)
    return tf.saved_model.load(path)


def plain(model):
    path = folder()
    model.export(path, verbose=False)
    return tf.saved_model.load(path)


class StateTest(parameterized.TestCase):
    @parameterized.named_parameters(("one", ONE), ("no_devices", None))
    def test_draws_are_those_of_keras_s_own_export(self, where):
        model, x = noisy(), np.ones([5, 3], "float32")
        ours, theirs = exported(model, where), plain(model)
        before = [v.numpy() for v in model.variables]
        signature = ours.signatures["serving_default"]
        for serve in (
            ours.serve,
            ours.serve,
            lambda x: signature(inputs=tf.constant(x))["output_0"],
        ):
            close(serve(x), theirs.serve(x))
        close(
            [v.numpy() for v in ours.parameters],
            [v.numpy() for v in theirs.variables],
        )
        close([v.numpy() for v in model.variables], before)

    @parameterized.parameters((None,), ("save_variable_devices",))
    @pytest.mark.slow(after=1)
    def test_towers_draw_anew_and_their_state_moves_on_once(self, policy):
        model, x, path = noisy(), np.ones([5, 3], "float32"), folder()
        towers.export_towers(model, path, THREE)
        loaded = tf.saved_model.load(
            path,
            options=tf.saved_model.LoadOptions(
                experimental_variable_policy=policy
            ),
        )
        where = "CPU:2$" if policy else "CPU:0$"
        for variable in loaded.parameters:
            self.assertRegex(variable.device, where)
        signature = loaded.signatures["serving_default"]
        results = [
            loaded.serve(x).numpy() - 2.0,
            signature(inputs=tf.constant(x))["output_0"].numpy() - 4.0,
        ]
        rest = np.tile(model.layers[0](x[:1]), [5, 1])
        noise = np.concatenate(results) - np.concatenate([rest] * 2)
        self.assertLen(np.unique(noise.round(4)), 40)  # of rows, towers, calls
        self.assertLess(np.abs(noise).max(), 5)
        names = [v.path.split("/")[-1] for v in model.variables]
        values = dict(zip(names, [v.numpy() for v in loaded.parameters]))
        self.assertEqual(values["total"], 4.0)
        self.assertEqual(values["calls"], 2)
        with tf.GradientTape() as tape:
            total = tf.reduce_sum(loaded.serve(x))
        weights = [v for v in loaded.parameters if v.trainable][:2]
        for gradient in tape.gradient(total, weights):
            self.assertIsNotNone(gradient)

    @parameterized.named_parameters(("towers", THREE), ("no_devices", None))
    def test_a_stateful_rnn_goes_on_from_call_to_call(self, where):
        model = keras.Sequential(
            [
                keras.Input(batch_shape=(4, 2, 3)),
                layers.LSTM(3, stateful=True, return_sequences=True),
                layers.GRU(2, stateful=True),
            ]
        )
        loaded = exported(model, where)
        x = np.random.default_rng(0).normal(size=[4, 2, 3]).astype("float32")
        results = [loaded.serve(x) for _ in range(3)]
        close(results, [model(x) for _ in range(3)])
        self.assertGreater(np.abs(results[0] - results[1]).max(), 1e-3)
        for rows in (1, 5):  # one row would be taken for four
            with self.assertRaisesRegex(TypeError, r"shape=\(4, 2, 3\)"):
                loaded.serve(np.ones([rows, 2, 3], "float32"))


def from_file():
    """A table whose vocabulary is a file, which a SavedModel holds."""
    file = os.path.join(tempfile.mkdtemp(), "vocabulary.txt")
    pathlib.Path(file).write_text("a\nb\n")
    x = keras.Input([3], dtype="string")
    ids = layers.StringLookup(vocabulary=file)(x)
    return keras.Model(x, layers.Embedding(4, 2)(ids))


def text():
    vectors = layers.TextVectorization(output_sequence_length=4)
    vectors.adapt(["a b c", "a d"])
    inner = keras.Sequential([keras.Input([], dtype="string"), vectors])
    x = keras.Input([], dtype="string")
    return keras.Model(x, layers.Embedding(9, 2)(inner(x)))


def weighted():
    x = keras.Input([], dtype="string")
    vectors = layers.TextVectorization(output_mode="tf_idf")
    vectors.adapt(["a b c", "a d"])
    return keras.Model(x, layers.Dense(2)(vectors(x)))


def integers():
    x = keras.Input([3], dtype="int64")
    ids = layers.IntegerLookup(vocabulary=[3, 4])(x)
    return keras.Model(x, layers.Embedding(4, 2)(ids))


class Kept(layers.Layer):
    """A table in a list, a mutable one, and a variable that is no Keras's."""

    def __init__(self):
        super().__init__()
        keys = tf.constant(["a", "b"])
        self.tables = [
            tf.lookup.StaticHashTable(
                tf.lookup.KeyValueTensorInitializer(keys, [5.0, 6.0]), 0.0
            )
        ]
        self.more = tf.lookup.experimental.MutableHashTable(
            tf.string, tf.float32, 7.0
        )
        self.more.insert(keys, [1.0, 2.0])
        self.offset = tf.Variable([0.5, 1.5, 2.5], trainable=False)

    def call(self, x):
        return self.tables[0].lookup(x) * self.more.lookup(x) + self.offset

    def compute_output_spec(self, x):
        return keras.KerasTensor(x.shape, "float32")


def kept():
    x = keras.Input([3], dtype="string")
    return keras.Model(x, Kept()(x))


WORDS = np.array([["a", "b", "?"], ["c", "a", "d"], ["b", "b", "b"]])
LINES = np.array(["a d", "c c b", "what"])
NUMBERS = np.array([[3, 4, 5], [4, 4, 3], [0, 1, 3]])
LOOKUPS = [
    (from_file, WORDS, None),
    (text, LINES, THREE),
    (weighted, LINES, THREE),
    (integers, NUMBERS, THREE),
    (kept, WORDS, THREE),
    (kept, WORDS, None),
]


class LookupTest(parameterized.TestCase):
    @parameterized.parameters(*LOOKUPS)
    @pytest.mark.slow(after=1)
    def test_tables_are_saved(self, make, x, where):
        model = make()
        expected = model(tf.constant(x))
        loaded = exported(model, where)
        close(loaded.serve(tf.constant(x)), expected)
        signature = loaded.signatures["serving_default"]
        close(signature(inputs=tf.constant(x))["output_0"], expected)

    @pytest.mark.rare
    def test_another_process_finds_the_vocabulary_in_the_folder(self):
        model = from_file()
        root = tempfile.mkdtemp()
        folder = os.path.join(root, "words")
        towers.export_towers(model, os.path.join(folder, "model"), THREE)
        vocabulary = model.layers[1].get_config()["vocabulary"]
        if isinstance(vocabulary, str) and os.path.exists(vocabulary):
            os.remove(vocabulary)
        np.savez(os.path.join(folder, "inputs_3.npz"), inputs=WORDS)
        answer = said("serve.py", root, "3")
        outputs = np.load(os.path.join(folder, "outputs_3.npz"))
        close(outputs["output_0"], model(tf.constant(WORDS)))
        self.assertTrue(answer["words"]["differentiable"])

    def test_a_table_that_no_layer_keeps_is_refused(self):
        table = tf.lookup.StaticHashTable(
            tf.lookup.KeyValueTensorInitializer(["a"], [1.0]), 0.0
        )
        model = keras.Sequential([keras.Input([3]), layers.Dense(2)])
        path = folder()
        for where in (THREE, None):
            with self.assertRaisesRegex(ValueError, "attribute of a layer"):
                towers.export_towers(
                    model,
                    path,
                    where,
                    tf.TensorSpec([None, 3], tf.string),
                    tower_fn=lambda model, x: model(table.lookup(x)),
                )
            self.assertFalse(os.path.exists(path))


class Pair(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(2)

    def call(self, pair):
        a, b = pair
        return self.dense(keras.ops.concatenate([a, b], 1))


def of_a_tuple():
    a, b = keras.Input([3]), keras.Input([2])
    return keras.Model((a, b), layers.Dense(1)(layers.Concatenate()([a, b])))


class StructureTest(parameterized.TestCase):
    @parameterized.parameters((of_a_tuple, THREE), (Pair, THREE), (Pair, None))
    def test_a_model_of_a_tuple_is_served_arrays(self, make, where):
        model = make()
        rng = np.random.default_rng(0)
        pair = rng.normal(size=[5, 3]), rng.normal(size=[5, 2])  # float64
        arrays = tuple(x.astype("float32") for x in pair)
        expected = model(arrays)
        loaded = exported(model, where)
        tensors = tuple(tf.constant(x) for x in arrays)
        for inputs in (pair, arrays, tensors):
            close(loaded.serve(inputs), expected)
        signature = loaded.signatures["serving_default"]
        a, b = tensors
        close(signature(inputs_0=a, inputs_1=b)["output_0"], expected)

    def test_a_signature_says_that_it_is_a_tuple(self):
        model = of_a_tuple()
        specs = (tf.TensorSpec([None, 3]), tf.TensorSpec([None, 2]))
        arrays = np.ones([5, 3], "float32"), np.ones([5, 2], "float32")
        loaded = exported(model, THREE, input_signature=[specs])
        close(loaded.serve(arrays), model(arrays))


class ErrorTest(parameterized.TestCase):
    @parameterized.parameters(
        ([3],), ([None],), ("a",), ([keras.InputSpec(shape=(None, 3))],)
    )
    def test_bad_signatures_are_refused_by_the_types_of_keras(self, signature):
        model = keras.Sequential([keras.Input([3]), layers.Dense(2)])
        kinds = []
        for one in (model, towers.TowerModel(model, THREE)):
            path = folder()
            with self.assertRaises((TypeError, ValueError)) as caught:
                one.export(path, verbose=False, input_signature=signature)
            kinds.append(type(caught.exception))
        self.assertIs(*kinds)
        self.assertRegex(str(caught.exception), "`input_signature` must")
        self.assertFalse(os.path.exists(path))

    def test_an_empty_signature_and_other_backends_arguments(self):
        model = keras.Sequential([keras.Input([3]), layers.Dense(2)])
        with self.assertRaisesRegex(TypeError, "which holds none"):
            towers.export_towers(model, folder(), THREE, [])
        wrapped = towers.TowerModel(model, THREE)
        with self.assertRaisesRegex(ValueError, "does not take is_static"):
            wrapped.export(folder(), is_static=True)
