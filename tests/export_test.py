"""SavedModels with towers, served where neither towers nor Keras is."""

import os
import pathlib
import subprocess
import sys
import tempfile

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import absltest, parameterized
from chiefs import said
from models import (
    attention,
    chain,
    close,
    cnn,
    inputs,
    make,
    placement,
    recurrent,
    subclassed,
    two_by_two,
)

import towers
from towers.foreign import keras_machine

layers = keras.layers
GPUS = towers.Placement(
    [f"/GPU:{i}" for i in range(4)],
    parameter_device="/GPU:3",
    available="any",
)


def new_folder():
    return tempfile.mkdtemp()


def named(x):
    """Inputs as the signature has them."""
    x = x if isinstance(x, dict) else {"inputs": x}
    return {
        k: v.astype("int32") if v.dtype == "int64" else v for k, v in x.items()
    }


class ServeTest(absltest.TestCase):
    @pytest.mark.slow
    def test_another_process_serves_the_towers(self):
        self.check_served([cnn, two_by_two])

    @pytest.mark.rare
    def test_so_of_other_models(self):
        self.check_served([recurrent, attention, subclassed])

    def check_served(self, models):
        """One process for all, as TensorFlow takes seconds to start."""
        root = new_folder()
        where = placement(3, [2, 1, 1], parameter_device="/CPU:2")
        plain = {model.__name__: make(model) for model in models}
        plain |= {"for_gpus": make(cnn), "for_no_devices": make(cnn)}
        for name, model in plain.items():
            folder = os.path.join(root, name)
            os.mkdir(folder)
            for rows in (1, 7):
                file = os.path.join(folder, f"inputs_{rows}.npz")
                np.savez(file, **named(inputs(model, rows)))
            kwargs = {
                "for_gpus": {"placement": GPUS},
                "for_no_devices": {"placement": None},
            }
            towers.TowerModel(model, where).export(
                os.path.join(folder, "model"), **kwargs.get(name, {})
            )
        answer = said("serve.py", root, "3")
        for name, model in plain.items():
            folder = pathlib.Path(root, name)
            with self.subTest(name=name):
                self.check_answers(folder, model)
                if name in ("for_gpus", "for_no_devices"):
                    continue
                self.assertEqual(
                    answer[name]["executed"],
                    {str(i): [f"/CPU:{i}"] for i in range(3)},
                )
                for device in answer[name]["variables"]:
                    self.assertRegex(device, "CPU:2$")
                self.assertTrue(answer[name]["differentiable"])
                written = (folder / "model" / "saved_model.pb").read_bytes()
                # What Keras calls its objects.
                self.assertNotIn(b"_tf_keras", written)
        self.assertEqual(
            answer["for_gpus"]["asked"],
            ["", "/device:CPU:0"] + [f"/device:GPU:{i}" for i in range(4)],
        )
        self.assertEqual(answer["for_no_devices"]["asked"], [""])

    def check_answers(self, folder, model):
        for rows in (1, 7):
            actual = dict(np.load(folder / f"outputs_{rows}.npz"))
            expected = model(inputs(model, rows))
            if not isinstance(expected, dict):
                expected = {"output_0": expected}
            self.assertCountEqual(actual, expected)
            for key, value in expected.items():
                close(actual[key], value, 1e-4)

    @pytest.mark.slow
    def test_the_command_line_runs_it(self):
        folder, model = new_folder(), make(cnn)
        path = os.path.join(folder, "model")
        towers.export_towers(model, path, placement(3))
        x = os.path.join(folder, "x.npy")
        np.save(x, inputs(model, 7))
        command = pathlib.Path(sys.executable).parent / "saved_model_cli"
        subprocess.run(
            [
                str(command),
                *("run", "--dir", path, "--tag_set", "serve"),
                *("--signature_def", "serving_default"),
                *("--inputs", f"inputs={x}", "--outdir", folder),
            ],
            check=True,
            capture_output=True,
            cwd=folder,
        )
        actual = np.load(os.path.join(folder, "output_0.npy"))
        close(actual, model(inputs(model, 7)), 1e-4)

    def test_state_is_not_written_by_serving(self):
        model = chain(
            [3],
            layers.BatchNormalization(),
            layers.Dropout(0.5),
            layers.Dense(2),
        )
        x = inputs(model, 5)
        path = os.path.join(new_folder(), "model")
        for where in (placement(2), None):  # the second over the first
            towers.export_towers(model, path, where)
            self.assertEqual(os.listdir(os.path.dirname(path)), ["model"])
            loaded = tf.saved_model.load(path)
            before = [v.numpy() for v in loaded.parameters]
            close(loaded.serve(x), model(x))
            close([v.numpy() for v in loaded.parameters], before)
        with self.assertRaisesRegex(ValueError, "concat"):  # leaves it alone
            towers.export_towers(
                model, path, placement(2), tower_fn=lambda m, x: 1.0
            )
        loaded = tf.saved_model.load(path)
        close(loaded.serve(x), model(x))

    @pytest.mark.slow
    def test_a_function_per_tower_and_several_models(self):
        models = {"a": make(cnn), "b": make(cnn, seed=8)}

        def both(models, x):
            a, b = models["a"](x["left"]), models["b"](x["right"])
            return {"best": tf.maximum(a, b), "a": a}

        spec = tf.TensorSpec([None, 8, 8, 2])
        x = {k: inputs(models["a"], 5) for k in ("left", "right")}
        for where in (placement(3), None):
            path = os.path.join(new_folder(), "model")
            towers.export_towers(
                models,
                path,
                where,
                input_signature={"left": spec, "right": spec},
                tower_fn=both,
            )
            loaded = tf.saved_model.load(path)
            signature = loaded.signatures["serving_default"]
            actual = signature(**{k: tf.constant(v) for k, v in x.items()})
            expected = both(models, x)
            self.assertCountEqual(actual, expected)
            for key, value in expected.items():
                close(actual[key], value)

    def test_what_is_for_gpus_runs_where_there_are_none(self):
        where = towers.Placement(["/GPU:0", "/GPU:1"], available="any")

        def of_layer(**kwargs):
            x = keras.Input([5, 3])
            return keras.Model(x, layers.LSTM(4, **kwargs)(x))

        def exported(model):
            towers.export_towers(model, folder := new_folder(), where)
            return tf.saved_model.load(folder)

        model = make(of_layer)
        x = tf.constant(
            np.random.default_rng(0).normal(size=[7, 5, 3]), "float32"
        )
        loaded = exported(model)
        close(loaded.serve(x), model(x))
        asked = exported(make(lambda: of_layer(use_cudnn=True)))
        served = asked.serve.concrete_functions[0].graph.as_graph_def()
        self.assertIn("CudnnRNNV3", str(served))
        # As does a machine with GPUs, where no device is meant.
        with keras_machine.with_gpus(True):
            towers.export_towers(model, folder := new_folder(), None)
        loaded = tf.saved_model.load(folder)
        close(loaded.serve(x), model(x))

    def test_a_model_that_is_called_with_several_tensors(self):
        class Two(keras.Model):
            def __init__(self):
                super().__init__()
                self.a, self.b = layers.Dense(2), layers.Dense(2)

            def build(self, more_shape, x_shape):
                self.a.build(x_shape)
                self.b.build(more_shape["y"])
                self.built = True

            def call(self, x, scale=2.0, more=None):
                return self.a(x) * scale + self.b(more["y"])

        class Unsaid(Two):
            def build(self, x_shape):
                pass

        x, y = tf.ones([7, 3]), tf.reshape(tf.range(28.0), [7, 4])
        specs = [tf.TensorSpec([None, 3]), tf.TensorSpec([None, 4])]
        for where in (placement(3, [3, 2, 1]), None):
            model = make(Two)
            outputs = model(x, more={"y": y})
            towers.export_towers(model, folder := new_folder(), where)
            loaded = tf.saved_model.load(folder)
            close(loaded.serve(x, {"y": y}), outputs)
            served = loaded.signatures["serving_default"](x=x, more_y=y)
            close(served["output_0"], outputs)

        class Plain(Unsaid):
            def call(self, x, y):
                return self.a(x) + self.b(y)

        model = make(Plain)
        outputs = model(x, y)
        with self.assertRaisesRegex(ValueError, "`input_signature`.* x, y"):
            towers.export_towers(model, folder, None)
        towers.TowerModel(model, placement(2)).export(
            folder, input_signature=specs
        )
        loaded = tf.saved_model.load(folder)
        close(loaded.serve(x, y), outputs)

    def test_a_function_of_one_s_own_is_saved_by_tensorflow(self):
        model = make(cnn)
        module = tf.Module()
        module.variables_of_model = [v.value for v in model.variables]

        @tf.function(input_signature=[tf.TensorSpec([None, 8, 8, 2])])
        def classes(x):
            graph = towers.build_towers(model, x / 2, placement(3))
            return tf.argmax(graph.outputs, 1)

        module.classes = classes
        path = os.path.join(new_folder(), "model")
        tf.saved_model.save(module, path)
        x = inputs(model, 7)
        loaded = tf.saved_model.load(path)  # functions do not keep variables
        np.testing.assert_array_equal(
            loaded.classes(x), tf.argmax(model(x / 2), 1)
        )

    def test_a_session_is_saved_by_tensorflow(self):
        v1, model = tf.compat.v1, make(cnn)
        path = os.path.join(new_folder(), "model")
        x = inputs(model, 7)
        expected = model(x)
        with tf.Graph().as_default():
            px = v1.placeholder(tf.float32, [None, 8, 8, 2])
            graph = towers.build_towers(model, px, placement(3))
            with v1.Session() as session:
                session.run(v1.global_variables_initializer())
                v1.saved_model.simple_save(
                    session, path, {"x": px}, {"y": graph.outputs}
                )
        loaded = tf.saved_model.load(path)
        signature = loaded.signatures["serving_default"]
        close(signature(x=tf.constant(x))["y"], expected)


class RefusalTest(parameterized.TestCase):
    def test_bad_exports_are_refused(self):
        model, where = make(cnn), placement(2)
        last = model.layers[-1].name
        cut = towers.column_wise(where.devices)
        in_pieces = placement(2, layer_devices={last: cut})
        new = os.path.join(new_folder(), "model")
        never = keras.Sequential([layers.Dense(2)])
        for call, error, message in (
            (
                lambda: towers.export_towers(model, __file__, where),
                ValueError,
                "`path` is .*, which is a file",
            ),
            (
                lambda: towers.export_towers(model, new, ["/GPU:0"]),
                TypeError,
                "towers.Placement; got list",
            ),
            (
                lambda: towers.Placement(["/GPU:one"], available="any"),
                ValueError,
                "'/GPU:one', which is no device name",
            ),
            (
                lambda: towers.export_towers(model, new, in_pieces),
                ValueError,
                f"'{last}' in pieces, but it is still whole",
            ),
            (
                lambda: towers.export_towers(model, new, where, [3]),
                TypeError,
                "`input_signature` must be a nest of tf.TensorSpec",
            ),
            (
                lambda: towers.export_towers(
                    model, new, where, tf.TensorSpec([])
                ),
                ValueError,
                "an axis of rows",
            ),
            (
                lambda: towers.export_towers(never, new, where),
                ValueError,
                "`input_signature` is not given",
            ),
            (
                lambda: towers.export_towers([model], new, where),
                TypeError,
                "tower_fn",
            ),
            (
                lambda: towers.TowerModel(model, where).export(
                    new, format="onnx", placement=GPUS
                ),
                ValueError,
                "'onnx' can hold no `placement`",
            ),
            (
                lambda: tf.function(
                    lambda: towers.export_towers(model, new, where)
                )(),
                RuntimeError,
                "called eagerly",
            ),
        ):
            with self.assertRaisesRegex(error, message):
                call()
            self.assertFalse(os.path.exists(new))
