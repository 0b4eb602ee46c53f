"""A wait ends when what it waits for does, or a worker is lost."""

import threading

from absl.testing import absltest

from towers.cluster.waiting import ended_before


class EndedBeforeTest(absltest.TestCase):
    def test_its_end_its_error_and_a_loss(self):
        lost, called = threading.Event(), []
        self.assertTrue(ended_before(lambda: called.append(1), lost.is_set))
        with self.assertRaisesRegex(ZeroDivisionError, "division"):
            ended_before(lambda: 1 / 0, lost.is_set)

        def lose():
            lost.set()
            threading.Event().wait()  # without end

        self.assertFalse(ended_before(lose, lost.is_set))
        self.assertFalse(ended_before(lambda: called.append(2), lost.is_set))
        self.assertEqual(called, [1])
