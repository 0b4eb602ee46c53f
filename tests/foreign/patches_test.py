"""patches: attributes are other ones, and then as they were."""

import contextlib
import contextvars
import math

from absl.testing import absltest

from towers.foreign.patches import CountedPatches, bound, patched


class Tracked:
    """Keeps what its attributes are set to, as Keras does."""

    kind = "class's"

    def __init__(self):
        vars(self)["set"] = []
        self.own = 1

    def __setattr__(self, name, value):
        self.set.append(name)
        super().__setattr__(name, value)


class PatchedTest(absltest.TestCase):
    def test_instances_classes_and_modules_are_as_they_were(self):
        one, pi = Tracked(), math.pi
        with patched(
            (one, "own", 2),
            (one, "kind", "its own"),
            (one, "own", 3),
            (Tracked, "more", 4),
            (math, "pi", 3),
        ):
            self.assertEqual((one.own, one.kind, one.more), (3, "its own", 4))
            self.assertEqual((Tracked.kind, math.pi), ("class's", 3))
        self.assertEqual(vars(one), {"set": ["own"], "own": 1})
        self.assertFalse(hasattr(Tracked, "more"))
        self.assertEqual(math.pi, pi)

    def test_an_error_puts_them_back(self):
        one = Tracked()
        with self.assertRaises(TypeError):
            with patched((one, "own", 2), (3, "real", 4)):
                self.fail("an int has no attributes of its own")
        self.assertEqual(one.own, 1)

    def test_a_variable_of_a_context_is_as_it_was(self):
        variable = contextvars.ContextVar("variable", default=1)
        with self.assertRaises(KeyError):
            with bound(variable, 2):
                self.assertEqual(variable.get(), 2)
                raise KeyError
        self.assertEqual(variable.get(), 1)

    def test_shared_ones_are_made_once_and_undone_by_the_last(self):
        one, results = Tracked(), []

        def patches(own):
            results.append(own)
            return [(one, "own", own)]

        shared = CountedPatches(patches)
        first, last = shared.opened(2), shared.opened(3)
        with contextlib.ExitStack() as stack:
            stack.enter_context(first)
            with last:
                stack.close()  # in another order than they were opened
                self.assertEqual((one.own, results), (2, [2]))
            self.assertEqual(one.own, 1)
        with shared.opened(4):
            self.assertEqual((one.own, results), (4, [2, 4]))
