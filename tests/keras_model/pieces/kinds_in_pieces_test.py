"""Each kind of layer that can be cut, and what it is called with."""

import functools

import keras
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from models import DEVICES, chain, make, placement
from same import pair, same_fit

import towers

L = keras.layers
column, row = towers.column_wise, towers.row_wise
RNG = np.random.default_rng(0)
IDS = RNG.integers(-20, 20, [5, 6])
IDS[:, -1] = 0
# In three pieces, of which one is larger.
CUT = {"cut": column(DEVICES[:3])}
ROWS = {"cut": row(DEVICES[:3])}


def of(layer, *shape, **call):
    """A model of one layer between others, and what to call it with."""

    def model() -> keras.Model:
        x = keras.Input(shape)
        y = L.Flatten()(layer()(L.Dense(shape[-1])(x), **call))
        return keras.Model(x, L.Dense(2)(y))

    return model, RNG.normal(size=[5, *shape]).astype("float32")


def words(mask=False, after=None):
    """A table of which some ids are looked up from its end, and some twice."""

    def model() -> keras.Model:
        x = keras.Input([6], dtype="int64")
        y = L.Embedding(20, 4, mask_zero=mask, name="cut")(x)
        y = after()(y) if after else L.GlobalAveragePooling1D()(y)
        return keras.Model(x, L.Dense(2)(y))

    return model, IDS


def attention(**kwargs):
    """Masked, and added to what it is of; of more heads than fit evenly."""
    call = kwargs.pop("call", {})

    def model() -> keras.Model:
        x = keras.Input([6], dtype="int64")
        y = L.Embedding(20, 8, mask_zero=True)(x)
        layer = L.MultiHeadAttention(4, 3, name="cut", **kwargs)
        result = layer(y, y, **call)
        if isinstance(result, (list, tuple)):
            result, scores = result
            y += keras.ops.mean(scores, [1, 2, 3], keepdims=True)[..., 0]
        return keras.Model(
            x, L.Dense(2)(L.GlobalAveragePooling1D()(y + result))
        )

    return model, IDS % 20


class Unmasked(keras.Model):
    """Attention takes the mask from its inputs, which are used after it."""

    def __init__(self):
        super().__init__()
        self.words = L.Embedding(20, 8, mask_zero=True)
        self.attention = L.MultiHeadAttention(4, 3, name="cut")
        self.pool, self.out = L.GlobalAveragePooling1D(), L.Dense(2)

    def call(self, ids):
        y = self.words(ids)
        result = self.attention(y, y)
        return self.out(self.pool(result) + self.pool(y))


def unmasked() -> keras.Model:
    model = Unmasked()
    model(IDS % 20)
    return model


def everything() -> keras.Model:
    """One layer of each kind."""
    x = keras.Input([6], dtype="int64")
    y = L.Embedding(20, 8, mask_zero=True, name="rows_words")(x)
    heads = L.MultiHeadAttention(
        4, 3, dropout=0.3, seed=3, name="columns_heads"
    )
    y = y + heads(y, y)
    y = L.Conv1D(5, 3, padding="causal", name="columns_conv")(y)
    y = L.Conv1DTranspose(4, 2, activation="relu", name="rows_conv")(y)
    y = L.EinsumDense("abc,cd->abd", (7, 5), None, "d", name="columns_eins")(y)
    return keras.Model(x, L.Dense(2, name="rows_out")(L.Flatten()(y)))


KINDS = {
    "table": (words(), ROWS),
    "masked": (words(True, lambda: L.LSTM(3)), ROWS),
    "width": (words(), CUT),
    "heads": (attention(), CUT),
    "heads_dropped": (attention(dropout=0.5, seed=3), CUT),
    "heads_causal": (attention(call={"use_causal_mask": True}), CUT),
    "heads_scored": (attention(call={"return_attention_scores": True}), CUT),
    "heads_then_unmasked": ((unmasked, IDS % 20), CUT),
    # As of attention that is whole, on a device of its own.
    "heads_pinned": ((unmasked, IDS % 20), {"cut": DEVICES[3]}),
    "heads_bare": (
        attention(value_dim=5, output_shape=8, use_bias=False),
        CUT,
    ),
    "einsum_heads": (
        of(
            lambda: L.EinsumDense(
                *("abc,cde->abde", (4, 5, 3)),
                activation="relu",
                bias_axes="de",
                name="cut",
            ),
            *(4, 6),
        ),
        CUT,
    ),
    "einsum_one_bias_for_all": (
        of(
            lambda: L.EinsumDense(
                "abc,cde->abde", (4, 5, 3), bias_axes="e", name="cut"
            ),
            *(4, 6),
        ),
        CUT,
    ),
    "einsum_any": (
        of(
            lambda: L.EinsumDense(
                "...x,xy->...y", 5, bias_axes="y", name="cut"
            ),
            *(4, 6),
        ),
        ROWS,
    ),
    "dense_of_more_axes": (of(lambda: L.Dense(5, name="cut"), 2, 3, 6), ROWS),
    "spatial_dropout": (
        of(
            lambda: keras.Sequential(
                [
                    L.Conv1D(6, 1, activation="elu", name="cut"),
                    L.SpatialDropout1D(0.5, seed=3),
                    L.Conv1D(4, 2, name="then"),
                ]
            ),
            *(4, 6),
        ),
        {".*/cut": column(DEVICES[:2]), ".*/then": row(DEVICES[2:])},
    ),
}
for by, pins in (("columns", CUT), ("rows", ROWS)):
    for n, plain, back in (
        (1, L.Conv1D, L.Conv1DTranspose),
        (2, L.Conv2D, L.Conv2DTranspose),
        (3, L.Conv3D, L.Conv3DTranspose),
    ):
        sizes = [3] * n + [4]
        for name, kind in (("conv", plain), ("transposed", back)):
            KINDS[f"{name}{n}_{by}"] = (
                of(
                    lambda kind=kind: kind(
                        4, 2, padding="same", activation="gelu", name="cut"
                    ),
                    *sizes,
                ),
                pins,
            )


def check(model, x, pins, tolerance=1e-6, **how):
    models = pair(model, placement(2, layer_devices=pins))
    how["optimizer"] = lambda: keras.optimizers.SGD(0.05, 0.9)
    how |= {"batch_size": 3, "tolerance": tolerance}
    same_fit(models, x, np.ones([len(x), 2]), **how)


class TableTest(absltest.TestCase):
    def test_all_that_crosses_has_a_size_where_a_tower_has_a_piece_too(self):
        """Those of ids and rows only data tell: the step is computed again."""
        where = towers.Placement(
            ["/CPU:0", "/CPU:1", "/CPU:2"],
            layer_devices={"words": towers.row_wise(["/CPU:2", "/CPU:3"])},
        )
        words = keras.layers.Embedding(20, 3, name="words")
        rest = [keras.layers.Flatten(), keras.layers.Dense(1)]
        given = keras.Input([4], dtype="int32")
        model = towers.TowerModel(
            keras.Sequential([given, words, *rest]), where
        )
        model.compile("sgd", "mse")
        ids = np.arange(24).reshape(6, 4) % 20
        report = towers.execution_report(
            model.train_on_batch, ids, np.ones([6, 1])
        )
        self.assertEqual(report.unknown, ())
        self.assertEqual(report.total_bytes, report.least_bytes)


class KindsTest(parameterized.TestCase):
    def test_all_of_them_in_one_model(self):
        pins = {"rows_.*": row(DEVICES[:2]), "columns_.*": column(DEVICES[2:])}
        check(everything, IDS % 20, pins)

    @pytest.mark.rare
    def test_gpus_can_run_all_of_it_strictly(self):
        gpus = ["/GPU:0", "/GPU:1"]
        where = towers.Placement(
            gpus,
            parameter_device="/GPU:0",
            layer_devices={"rows_.*": row(gpus), "columns_.*": column(gpus)},
            available="any",
        )
        model = towers.TowerModel(make(everything), where)
        model.compile("adam", "mse")
        plan = towers.placement_plan(
            *(model, IDS % 20, np.ones([5, 2])),
            machine={"CPU": 1, "GPU": 2},
            strict=True,
        )
        self.assertEmpty([*plan.moved, *plan.refused])
        for path in ("rows_words", "columns_heads", "rows_conv"):
            for j, device in enumerate(gpus):
                plan.assert_runs_on(f"tower_1/{path}/piece_{j}", device)

    @parameterized.named_parameters(
        (name, *model, pins) for name, (model, pins) in KINDS.items()
    )
    @pytest.mark.rare
    def test_numbers_are_the_plain_model_s(self, model, x, pins):
        check(model, x, pins, predict=True)

    @parameterized.parameters("mixed_bfloat16", "mixed_float16")
    @pytest.mark.rare
    def test_in_half_they_are_within_its_rounding(self, policy):
        model, x = attention()
        with_policy = keras.mixed_precision.dtype_policy()
        keras.mixed_precision.set_dtype_policy(policy)
        try:
            check(model, x, CUT, 1e-2, histories=1e-2)
        finally:
            keras.mixed_precision.set_dtype_policy(with_policy)


class LookupTest(parameterized.TestCase):
    @parameterized.parameters(row, column)
    @pytest.mark.slow(after=1)
    def test_only_rows_are_read_and_cross_of_any_table(self, cut):
        def reported(count):
            model = chain(
                [6],
                L.Embedding(count, 4, name="words"),
                L.GlobalAveragePooling1D(),
                dtype="int32",
            )
            where = placement(1, layer_devices={"words": cut(DEVICES[1:3])})
            model = towers.TowerModel(model, where)
            model.compile("sgd", "mse")
            step = functools.partial(model.train_on_batch, IDS % 20)
            return towers.execution_report(step, np.ones([5, 4]))

        small, large = reported(20), reported(320)
        self.assertEqual(large.total_bytes, small.total_bytes)
        kinds = [op for _, name, op in large.nodes if "words" in name]
        self.assertNotIn("ReadVariableOp", kinds)
        self.assertEqual(kinds.count("ResourceGather"), 2)
        # What an optimizer does carries its own name.
        kinds = [op for _, _, op in large.nodes]
        self.assertEqual(kinds.count("ResourceScatterSub"), 2)

    def table(self):
        layer = L.Embedding(5, 3, name="words")
        model = chain([None], layer, dtype="int32")
        where = placement(1, layer_devices={"words": row(DEVICES[:3])})
        towers.place_variables(model, where)
        return model, where

    def test_fewer_ids_than_pieces(self):
        model, where = self.table()
        for ids in ([[4]], [[-1]], np.zeros([1, 0], "int32"), [[2, 2, 0]]):
            ids = np.asarray(ids, "int32")
            graph = towers.build_towers(model, ids, where).outputs
            table = model.layers[0].get_weights()[0]
            np.testing.assert_array_equal(graph, table[ids])

    @parameterized.parameters(5, -6)
    def test_an_id_that_is_out_of_range_is_told(self, wrong):
        model, where = self.table()
        with self.assertRaisesRegex(Exception, "is not in"):
            towers.build_towers(model, np.array([[1, wrong]], "int32"), where)
