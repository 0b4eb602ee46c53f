"""Layers in pieces, on workers."""

import sys

import pytest
from absl.testing import absltest
from chiefs import said


@pytest.mark.skipif(sys.platform != "linux", reason="Workers end by prctl.")
@pytest.mark.slow
class InPiecesTest(absltest.TestCase):
    def test_numbers_bytes_and_files_of_pieces_on_workers(self):
        answer = said("in_pieces.py")
        self.assertTrue(answer["table"])
        for name in ("trained", "read", "going on"):
            self.assertLess(answer[name], 1e-6, name)
        numbers = 2 * 3 * 4  # of the optimizer
        self.assertEqual(answer["bytes"], answer["least"] + numbers)
        self.assertIn("Lost 127.0.0.1:", answer["lost"])
