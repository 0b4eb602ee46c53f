"""tf_ancestry: what a tensor is made of, one op at a time and in all."""

import tensorflow as tf
from absl.testing import absltest

from towers.foreign.tf_ancestry import (
    ancestors,
    around,
    identities,
    identity,
    parents,
)


def traced(call):
    spec = tf.TensorSpec([2])
    tf.function(call, autograph=False).get_concrete_function(spec, spec)


class TfAncestryTest(absltest.TestCase):
    def test_results_of_a_custom_gradient_are_told_apart(self):
        @tf.custom_gradient
        def both(x, y):
            return [x * 2.0, y * 3.0], lambda a, b: (a, b)

        def check(x, y):
            _, tensor = both(x, y)
            self.assertEqual(tensor.op.type, "IdentityN")
            names = [z.name for z in ancestors(tensor)]
            self.assertIn(y.name, names)
            self.assertNotIn(x.name, names)

        traced(check)

    def test_each_comes_once_and_nothing_behind_what_is_known(self):
        def check(x, y):
            constant = tf.sin(x)
            tensor = constant * constant + y * y
            results = [z.name for z in ancestors(tensor, stops=[constant])]
            self.assertCountEqual(results, {*results})
            self.assertIn(y.name, results)
            self.assertNoCommonElements(results, [x.name, constant.name])
            ends = [*ancestors(tensor, lambda z: parents(z) * (z is tensor))]
            self.assertLen(ends, 3)

        traced(check)

    def test_identities_go_back_to_the_first(self):
        def check(x, y):
            tensor = x + y
            *_, first = identities(tf.identity(tf.identity(tensor)))
            self.assertIs(first, tensor)
            (passed,) = tf.identity_n([tensor])
            self.assertEqual([*identities(passed)], [passed])

        traced(check)

    def test_what_is_captured_is_found_around(self):
        def check(x, y):
            outer = x + y

            @tf.function(autograph=False)
            def inner(z):
                inside = (outer * z).op.inputs[0]
                self.assertEmpty(parents(inside))
                self.assertIs(around(inside)[0], outer)
                self.assertNotEqual(identity(inside), identity(outer))
                self.assertEmpty(around(z))
                return z

            return inner(x)

        traced(check)
