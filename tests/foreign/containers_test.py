"""Containers that hold each other, as Keras takes them."""

from absl.testing import absltest

from towers.foreign.containers import named_leaves


class LeavesTest(absltest.TestCase):
    def test_each_container_is_looked_into_once_and_its_leaves_are_named(self):
        blocks: list = [1, {"norm": (2, 3)}]
        blocks.append(blocks)
        self.assertEqual(
            list(named_leaves([blocks, 4], "x")),
            [
                ("x[0][0]", 1),
                ("x[0][1]['norm'][0]", 2),
                ("x[0][1]['norm'][1]", 3),
                ("x[1]", 4),
            ],
        )
