"""scopes: towers and layers by the names of ops."""

from absl.testing import absltest

from towers.placement.scopes import is_backward, layer_of, tower_of


class ScopesTest(absltest.TestCase):
    def test_towers_and_layers(self):
        for name, tower, layer in (
            ("tower_0/dense/MatMul", 0, "dense"),
            ("model/tower_12/encoder/dense/MatMul", 12, "encoder/dense"),
            ("tower_1_1/dense/MatMul", 1, "dense"),  # a second call
            ("tower_1/lstm/while/body/_9/tower_1/lstm/while/add", 1, "lstm"),
            ("gradients/tower_1/a/MatMul_grad/MatMul_1", 1, "a"),
            ("tower_1/gru/TensorArrayUnstack/TensorListFromTensor", 1, "gru"),
            ("tower_1/add", 1, ""),
            ("tower_1/PartitionedCall", 1, ""),
            ("gather/concat", None, None),
            ("ivory_tower_1/dense/MatMul", None, None),
        ):
            result = tower_of(name)
            self.assertEqual(result[0] if result else None, tower, name)
            if result:
                self.assertEqual(layer_of(result[1]), layer, name)

    def test_backward(self):
        self.assertTrue(is_backward("x/gradients_1/tower_0/a/b"))
        self.assertTrue(is_backward("tower_0/a/MatMul_grad/MatMul"))
        self.assertFalse(is_backward("tower_0/a/MatMul"))
