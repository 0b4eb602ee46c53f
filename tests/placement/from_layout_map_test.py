"""from_layout_map: Keras's words for layers in pieces, read; and what is no such."""

import warnings

import keras
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from models import chain, make
from same import same_fit

import towers

layers, D = keras.layers, keras.distribution
RNG = np.random.default_rng(0)
FOUR = ["cpu:0", "cpu:1", "cpu:2", "cpu:3"]
COLUMNS, ROWS = towers.column_wise, towers.row_wise


def perceptron():
    """As in Keras's documentation."""
    x = keras.Input([6])
    hidden = layers.Dense(8, "relu", name="up")(x)
    return keras.Model(x, layers.Dense(4, name="down")(hidden))


MLP = {
    "up.*kernel": (None, "model"),
    "up.*bias": ("model",),
    "down.kernel": ("model", None),
}


def gemma():
    """The layers that Gemma's map names, and an embedding."""
    ids = keras.Input([5], dtype="int32")
    x = layers.Embedding(12, 8, name="token_embedding")(ids)
    dense = layers.EinsumDense
    q = dense("btd,ndh->btnh", (None, 4, 2), name="query")(x)
    o = dense("btnh,nhd->btd", (None, 8), name="attention_output")(q)
    g = dense("btd,df->btf", (None, 6), name="ffw_gating", activation="gelu")
    o = dense("btf,fd->btd", (None, 8), name="ffw_linear")(g(o))
    return keras.Model(ids, o)


GEMMA = {
    "token_embedding/embeddings": ("model", "batch"),
    "query.*kernel": ("model", "batch", None),
    "attention_output.*kernel": ("model", None, "batch"),
    "ffw_gating.*kernel": ("batch", "model"),
    "ffw_linear.*kernel": ("model", "batch"),
}


def attention():
    x = keras.Input([3, 8])
    return keras.Model(x, layers.MultiHeadAttention(4, 2, name="heads")(x, x))


HEADS = {
    "heads/(query|key|value)/kernel": (None, "model", None),
    "heads/(query|key|value)/bias": ("model", None),
    "heads/attention_output/kernel": ("model", None, None),
}


def mapped(layouts, shape=(2, 2), names=("batch", "model")):
    n = int(np.prod(shape))
    layout_map = D.LayoutMap(D.DeviceMesh(shape, list(names), FOUR[:n]))
    for key, layout in layouts.items():
        layout_map[key] = layout
    return layout_map


def read(factory, layouts, shape=(2, 2), names=("batch", "model"), **kwargs):
    layout_map = mapped(layouts, shape, names)
    return towers.Placement.from_layout_map(make(factory), layout_map, **kwargs)


def each(by):
    return by(FOUR[:2]), by(FOUR[2:])


class ReadTest(parameterized.TestCase):
    def test_towers_along_the_batch_and_pieces_along_the_other(self):
        result = read(perceptron, MLP, weights=[3, 1], reasons=["mine"])
        expected = towers.Placement(
            ["/CPU:0", "/CPU:2"],
            layer_devices={"up": [*each(COLUMNS)], "down": [*each(ROWS)]},
        )
        self.assertEqual(result.devices, expected.devices)
        self.assertEqual(result.layer_devices, expected.layer_devices)
        self.assertEqual(result.weights, (3, 1))
        self.assertEqual(result.reasons, ["mine"])
        turned = read(perceptron, MLP, (2, 2), ("model", "batch"))
        self.assertEqual(turned.devices, ("/CPU:0", "/CPU:1"))
        one = read(perceptron, MLP, (3,), ["model"])
        self.assertEqual(one.devices, ("/CPU:0",))
        self.assertEqual(
            one.layer_devices["up"], COLUMNS([f"/CPU:{i}" for i in range(3)])
        )
        self.assertEqual(one.parameter_device, "/CPU:0")
        data = read(perceptron, {"up/bias": ("batch",)}, (4,), ["batch"])
        self.assertLen(data.devices, 4)
        self.assertEmpty(data.layer_devices)

    @parameterized.parameters(
        (
            gemma,
            GEMMA,
            {
                "token_embedding": ROWS,
                "query": COLUMNS,
                "attention_output": ROWS,
                "ffw_gating": COLUMNS,
                "ffw_linear": ROWS,
            },
            5,
        ),
        (attention, HEADS, {"heads": COLUMNS}, 0),
        (perceptron, {**MLP, "down.bias": ("model",)}, None, 1),
        (perceptron, {"up/bias": ("model",)}, {}, 1),
    )
    def test_which_way_layers_are_cut(self, factory, layouts, cut, reasons):
        result = read(factory, layouts, (1, 2))
        if cut is not None:
            expected = {path: by(FOUR[:2]) for path, by in cut.items()}
            expected = towers.Placement(FOUR[:1], layer_devices=expected)
            self.assertEqual(result.layer_devices, expected.layer_devices)
        self.assertLen(result.reasons, reasons)

    @parameterized.parameters(
        (perceptron, MLP), (gemma, GEMMA), (attention, HEADS)
    )
    @pytest.mark.rare
    def test_the_numbers_are_plain(self, factory, layouts):
        plain = make(factory)
        model = make(factory)
        layout_map = mapped(layouts)
        placement = towers.Placement.from_layout_map(model, layout_map)
        model = towers.TowerModel(model, placement)
        shape = plain.inputs[0].shape[1:]
        x = RNG.integers(0, 2, [6, *shape]).astype(plain.inputs[0].dtype)
        y = np.zeros_like(plain.predict(x, verbose=0))
        how = {"batch_size": 4, "epochs": 2, "tolerance": 1e-6}
        same_fit((plain, model), x, y, **how)


class RefusedTest(parameterized.TestCase):
    @parameterized.parameters(
        ({"up.kernel": (None, "heads")}, "axis names.*'model'.*'heads'"),
        ({"up.kernel": ("model",)}, r"'up/kernel' is \('model',\).*\(6, 8\)"),
        ({"upp/kernel": (None, "model")}, "'upp/kernel', .* no variable.*up/k"),
        ({"up/kernel": ("model", "model")}, "'up/kernel'.*two axes"),
        ({"up/kernel": (None, "batch")}, "axis of the batch.*name='model'"),
        ({"up/k.*": (None, "model"), "up/.*": (None, None)}, "multiple layout"),
    )
    def test_layouts_are_by_name(self, layouts, message):
        with self.assertRaisesRegex(ValueError, message):
            read(perceptron, layouts)

    def test_layers_are_by_path(self):
        def recurrent():
            return chain([3, 2], layers.LSTM(4, name="loops"))

        with self.assertRaisesRegex(
            ValueError, "'loops/lstm_cell', a LSTMCell"
        ):
            read(recurrent, {".*recurrent_kernel": (None, "model")})
        with self.assertRaisesRegex(ValueError, "'heads'.*cut by heads.*none"):
            read(attention, {"heads/query/kernel": (None, "model", None)})

    def test_meshes_and_arguments(self):
        with self.assertRaisesRegex(ValueError, "got the axes .*'a', 'b', 'c'"):
            read(perceptron, {}, (1, 2, 1), ["a", "b", "c"])
        other = D.DeviceMesh([2], ["x"], FOUR[:2])
        other = D.TensorLayout([None, "x"], other)
        with self.assertRaisesRegex(
            ValueError, "'up/kernel' is .*'x'.*'model'"
        ):
            read(perceptron, {"up/kernel": other})
        with self.assertRaisesRegex(ValueError, "'rows', but the mesh"):
            read(perceptron, MLP, batch_dim_name="rows")
        with self.assertRaisesRegex(TypeError, "keras.distribution.LayoutMap"):
            towers.Placement.from_layout_map(make(perceptron), MLP)
        with self.assertRaisesRegex(TypeError, "works out `devices` itself"):
            read(perceptron, MLP, devices=["/CPU:0"])
        with self.assertRaisesRegex(ValueError, "is not built"):
            read(lambda: keras.Sequential([layers.Dense(2)]), MLP)


class DistributionTest(absltest.TestCase):
    def test_a_towermodel_says_that_nothing_heeds_it(self):
        distribution = D.ModelParallel(
            layout_map=mapped(MLP), batch_dim_name="batch"
        )
        model = make(perceptron)
        with (
            distribution.scope(),
            self.assertWarnsRegex(
                UserWarning,
                "a ModelParallel, which Keras does not heed on TensorFl",
            ),
        ):
            towers.TowerModel(model, ["/CPU:0"])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", "Towers were")  # of garbage
            towers.TowerModel(model, ["/CPU:0"])
