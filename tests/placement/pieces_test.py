"""Layers in pieces, as a placement says them."""

import copy
import pickle

from absl.testing import parameterized

import towers

TWO = ["/CPU:0", "/CPU:1"]


class PiecesTest(parameterized.TestCase):
    def test_are_values_of_layer_devices(self):
        one = towers.Placement(
            TWO,
            layer_devices={
                "up": towers.column_wise(["cpu:0", "/device:CPU:1"]),
                "down": [towers.row_wise(TWO), towers.row_wise(TWO[::-1])],
            },
        )
        self.assertEqual(
            one.layer_devices,
            {
                "up": towers.column_wise(TWO),
                "down": (towers.row_wise(TWO), towers.row_wise(TWO[::-1])),
            },
        )
        self.assertIn("up on /CPU:0, /CPU:1, column_wise", str(one))
        for other in (copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
            self.assertEqual(other, one)
            self.assertEqual(hash(other), hash(one))
        self.assertNotEqual(towers.row_wise(TWO), towers.column_wise(TWO))

    @parameterized.parameters(towers.column_wise, towers.row_wise)
    def test_need_devices(self, cut):
        with self.assertRaisesRegex(
            TypeError, f"{cut.__name__} must be a list"
        ):
            cut("/CPU:0")
        with self.assertRaisesRegex(ValueError, f"{cut.__name__} is empty"):
            cut([])

    @parameterized.parameters(
        (towers.row_wise(["/CPU:77"]), r"\['up'\].devices\[0\]` is '/CPU:77'"),
        ([towers.row_wise(TWO)], "one for each of the 2 towers"),
        (["/CPU:0", towers.row_wise(TWO)], "the same for each tower"),
        ([towers.row_wise(TWO), towers.column_wise(TWO)], "cut the same way"),
        ([towers.row_wise(TWO), towers.row_wise(TWO[:1])], "as many pieces"),
    )
    def test_are_checked_with_the_placement(self, pin, words):
        with self.assertRaisesRegex(ValueError, words):
            towers.Placement(TWO, layer_devices={"up": pin})
