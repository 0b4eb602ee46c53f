"""pictures: every model of the list, drawn by Graphviz where there is one."""

import collections
import os
import re
import shutil
import tempfile

import keras
import pytest
from absl.testing import parameterized
from models import DEVICES, NAMED, cnn, inputs, make, placement

import towers
from towers.foreign.patches import patched


def built(model):
    model = make(model)
    model(inputs(model, 2))
    return model


class PlacementTest(parameterized.TestCase):
    @parameterized.named_parameters(*NAMED)
    def test_every_layer_is_in_every_tower(self, model):
        model = built(model)
        text = towers.plot_placement(model, placement(3), "", fold=False)
        towers_drawn = re.findall(r'label="(tower_\d) on (/CPU:\d)', text)
        self.assertEqual(
            towers_drawn, [(f"tower_{i}", DEVICES[i]) for i in range(3)]
        )
        nodes = collections.Counter(
            re.findall(r'label="(\S+)\\n\w+, /CPU', text)
        )
        self.assertEqual(set(nodes.values()), {3})
        layers = {name.split("/")[-1] for name in nodes}
        for layer in model.layers:
            holds = isinstance(layer, (keras.Sequential, keras.Function))
            if not holds and not isinstance(layer, keras.layers.InputLayer):
                self.assertIn(layer.name, layers)

    def test_what_is_alike_is_drawn_once(self):
        def block(x):
            y = keras.layers.Dense(4, activation="relu")(x)
            y = keras.layers.Dense(4, name=f"down_{len(downs)}")(y)
            downs.append(y)
            return keras.layers.Add()([x, y])

        x, downs = keras.Input([4]), []
        y = block(block(block(keras.layers.Dense(4, name="first")(x))))
        model = keras.Model(x, keras.layers.Dense(2, name="last")(y))
        text = towers.plot_placement(model, placement(4), "")
        self.assertLen(re.findall(r'label="(\S+)\\n\w+, /CPU:0', text), 5)
        wrapped = towers.TowerModel(model, placement(4))
        self.assertEqual(towers.plot_placement(wrapped, placement(4), ""), text)
        self.assertIn('label="3 times"', text)
        self.assertIn(
            "tower_0, tower_1, tower_2, tower_3, alike, on /CPU:0, /CPU:1, "
            "/CPU:2, /CPU:3, 25% of the rows each",
            text,
        )
        # One of them is on another device.
        here = placement(4, [1, 1, 1, 2], layer_devices={"down_1": "/CPU:3"})
        text = towers.plot_placement(model, here, "")
        self.assertNotIn("alike", text)
        self.assertIn("tower_3 on /CPU:3, 40% of the rows", text)
        self.assertNotIn("times", text)

    def test_one_tower_shows_all_its_layers(self):
        text = towers.plot_placement(built(cnn), placement(1), "")
        self.assertNotIn("invis", text)

    def test_devices_that_are_not_here(self):
        where = towers.Placement(
            ["/GPU:0", "/GPU:1"],
            weights=[3, 1],
            parameter_device="/GPU:5",
            layer_devices={"conv2d.*": "/GPU:7"},
            available="any",
        )
        text = towers.plot_placement(built(cnn), where, "")
        self.assertIn("tower_0 on /GPU:0, 75% of the rows", text)
        self.assertRegex(text, r"variables, \d+ B\\n/GPU:5")
        self.assertLen(re.findall(r"Conv2D, /GPU:7", text), 2)
        self.assertIn(r'"split\n/CPU:0"', text)
        colours = dict(re.findall(r'(/\w+:\d)", fillcolor="(#\w+)"', text))
        self.assertLen(set(colours.values()), len(colours))
        path = os.path.join(tempfile.mkdtemp(), "placement.dot")
        towers.plot_placement(built(cnn), where, path)
        with open(path) as file:
            self.assertIn("digraph", file.read())

    def test_pieces_are_where_they_will_be(self):
        layers = [keras.layers.Dense(4, name=name) for name in ("up", "down")]
        model = keras.Sequential([keras.Input([3]), *layers])
        pins = {"up": towers.column_wise(["/CPU:1", "/CPU:2"])}
        where = placement(1, layer_devices=pins)
        whole = towers.plot_placement(model, where, "")
        self.assertIn(r'"up\nDense, /CPU:1, /CPU:2, column_wise"', whole)
        for device in pins["up"].devices:
            self.assertIn(rf'"variables, 32 B\n{device}"', whole)
        towers.place_variables(model, where)
        cut = towers.plot_placement(model, where, "")
        self.assertCountEqual(whole.splitlines(), cut.splitlines())

    def test_what_is_missing_is_said(self):
        model = built(cnn)
        with patched((shutil, "which", lambda name: None)):
            with self.assertRaisesRegex(ImportError, "install graphviz"):
                towers.plot_placement(model, placement(2))
            drawn = towers.plot_placement(model, placement(2), "")
            self.assertIsNone(drawn._repr_svg_())  # in a notebook: its source
        with self.assertRaisesRegex(ValueError, "without an ending"):
            towers.plot_placement(model, placement(2), "placement")
        with self.assertRaisesRegex(TypeError, "keras.Model"):
            towers.plot_placement(3, placement(2))

    @pytest.mark.skipif(
        not shutil.which("dot"), reason="apt-get install graphviz"
    )
    def test_a_format_that_there_is_not_is_refused(self):
        with self.assertRaisesRegex(ValueError, "to_file.*xyz.* png "):
            towers.plot_placement(built(cnn), placement(2), "a.xyz")
        drawn = towers.plot_placement(built(cnn), placement(2), "")
        self.assertIn("<svg", drawn._repr_svg_())
        self.assertFalse(os.path.exists("a.xyz"))

    @pytest.mark.rare
    @pytest.mark.skipif(
        not shutil.which("dot"), reason="apt-get install graphviz"
    )
    def test_by_graphviz(self):
        folder = tempfile.mkdtemp()
        for name, model in NAMED:
            path = os.path.join(folder, f"{name}.png")
            towers.plot_placement(built(model), placement(3), path)
            with open(path, "rb") as file:
                self.assertEqual(file.read(4), b"\x89PNG")
        with self.assertRaisesRegex(ValueError, "cannot draw.*xyz"):
            towers.plot_placement(built(cnn), placement(2), "placement.xyz")
