"""Which layers cannot be cut: refused by name and path, and with the placement."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import parameterized
from models import DEVICES, placement

import towers

layers = keras.layers
PAIR = DEVICES[:2]


class OwnCall(layers.Dense):
    def call(self, x):
        return super().call(x) + 1


class OwnWeight(layers.Layer):
    def build(self, shape):
        self.scale = self.add_weight(shape=[shape[-1]])

    def call(self, x):
        return x * self.scale


def with_lora() -> keras.layers.Layer:
    layer = layers.Dense(4)
    layer.build([None, 6])
    layer.enable_lora(2)
    return layer


def quantized() -> keras.layers.Layer:
    layer = layers.Dense(4)
    layer.build([None, 6])
    layer.quantize("int8")
    return layer


CASES = {
    "a_call_of_its_own": (lambda: OwnCall(4), [6], "has a `call` of its own"),
    "lora": (with_lora, [6], "LoRA"),
    "quantized": (quantized, [6], "is quantized .int8"),
    "groups": (lambda: layers.Conv1D(4, 1, groups=2), [5, 6], "2 groups"),
    "recurrent": (lambda: layers.LSTM(4), [5, 6], "is recurrent"),
    "in_a_loop": (
        lambda: layers.TimeDistributed(layers.Dense(4)),
        [5, 6],
        "a TimeDistributed calls",
    ),
    "normalizing": (layers.BatchNormalization, [6], "variables of its own"),
    "a_weight_of_its_own": (OwnWeight, [6], "OwnWeight, with variables"),
    "a_norm": (
        lambda: layers.Dense(
            4, kernel_constraint=keras.constraints.UnitNorm(1)
        ),
        [6],
        "UnitNorm on .*along axis 1",
    ),
    "no_sum": (
        lambda: layers.Dense(4, kernel_regularizer="orthogonal_regularizer"),
        [6],
        "OrthogonalRegularizer on .*no sum",
    ),
    "too_few": (lambda: layers.Dense(1), [6], "fewer than 2 pieces"),
    "no_axis": (
        lambda: layers.EinsumDense("abc,c->abc", output_shape=(None, 6)),
        [5, 6],
        "no axis for that",
    ),
}


def holding(layer, shape) -> keras.Model:
    x = keras.Input(shape)
    inner = keras.Sequential([keras.Input(shape), layer], name="inner")
    return keras.Model(x, inner(x))


class RefusedTest(parameterized.TestCase):
    @parameterized.named_parameters(
        (name, *case) for name, case in CASES.items()
    )
    def test_by_path_when_the_placement_meets_the_model(
        self, layer, shape, words
    ):
        model = holding(layer(), shape)
        where = placement(
            2, layer_devices={"inner/.*": towers.column_wise(PAIR)}
        )
        before = model.get_weights()
        with self.assertRaisesRegex(ValueError, f"asks for 'inner/.*{words}"):
            towers.TowerModel(model, where)
        for one, other in zip(model.get_weights(), before, strict=True):
            np.testing.assert_array_equal(one, other)  # nothing is cut

    @parameterized.parameters(
        keras.optimizers.SGD(clipnorm=1.0),
        keras.optimizers.Adafactor(),
        keras.optimizers.Lamb(),
    )
    def test_an_optimizer_that_looks_at_whole_variables_is(self, optimizer):
        where = placement(2, layer_devices={"up": towers.column_wise(PAIR)})
        model = holding(layers.Dense(4, name="up"), [6])
        model = towers.TowerModel(model, where)
        with self.assertRaisesRegex(ValueError, "cannot train a layer in pie"):
            model.compile(optimizer, "mse")

    def test_what_is_whole_is_not_built_in_pieces(self):
        where = placement(1, layer_devices={"up": towers.column_wise(PAIR)})
        model = holding(layers.Dense(4, name="up"), [6])
        with self.assertRaisesRegex(ValueError, "'inner/up'.*is still whole"):
            towers.build_towers(model, np.ones([2, 6], "float32"), where)
        towers.place_variables(model, where)
        three = placement(1, layer_devices={"up": towers.row_wise(DEVICES[:3])})
        with self.assertRaisesRegex(ValueError, "is in 2 pieces along axis 1"):
            towers.build_towers(model, np.ones([2, 6], "float32"), three)

    def test_outputs_of_what_is_inside_are(self):
        x = keras.Input([5, 6])
        heads = layers.MultiHeadAttention(2, 3, name="heads")
        model = keras.Model(x, heads(x, x))
        where = placement(1, layer_devices={"heads": towers.column_wise(PAIR)})
        towers.place_variables(model, where)
        ask = functools.partial(
            *(towers.build_towers, model, np.ones([2, 5, 6]), where),
            layer_outputs=["heads/query"],
        )
        with self.assertRaisesRegex(ValueError, "'heads/query', but 'heads'"):
            ask()

    def test_what_is_not_dense_is(self):
        where = placement(1, layer_devices={"up": towers.column_wise(PAIR)})
        x = keras.Input([6], sparse=True)
        model = keras.Model(x, layers.Dense(4, name="up")(x))
        towers.place_variables(model, where)
        rows = tf.sparse.from_dense(np.eye(3, 6, dtype="float32"))
        with self.assertRaisesRegex(ValueError, "'up'.*a SparseTensor"):
            towers.build_towers(model, rows, where)

    @pytest.mark.rare
    def test_xla_is(self):
        where = placement(1, layer_devices={"up": towers.column_wise(PAIR)})
        model = holding(layers.Dense(4, name="up"), [6])
        model = towers.TowerModel(model, where)
        with self.assertRaisesRegex(ValueError, "'up' runs on .*column_wise"):
            model.compile("sgd", "mse", jit_compile=True)
