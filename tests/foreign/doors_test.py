"""What is said where a private name is gone, and to whom."""

import pathlib
import re
import subprocess
import sys

import pytest
from absl.testing import absltest

from towers.foreign import doors

ROOT = pathlib.Path(doors.__file__).parents[2]
# As in a TensorFlow in which what only plans need has moved.
WITHOUT_PLANS = """
import sys
import keras, numpy as np
from tensorflow.python import framework

del framework.op_def_registry
sys.modules["tensorflow.python.framework.op_def_registry"] = None
import towers

model = keras.Sequential([keras.Input([3]), keras.layers.Dense(2)])
model = towers.TowerModel(model, ["/CPU:0", "/CPU:0"])
model.compile("sgd", "mse")
model.fit(np.ones([8, 3]), np.ones([8, 2]), verbose=0)
assert "placement_plan" in dir(towers)
try:
    from towers import placement_plan
except ImportError as error:
    print(error)
print(towers.execution_report(model.predict_on_batch, np.ones([8, 3])))
"""


class DoorsTest(absltest.TestCase):
    def test_what_is_needed_and_what_was_tested_is_said(self):
        words = (
            r"^towers.plan needs .*'nothing' from 'tensorflow.python.framework.ops'"
            r".* Expected TensorFlow 2\.\S+ to 2\.\S+ and Keras .*; got TensorFlow \d"
        )
        with self.assertRaisesRegex(ImportError, words):
            with doors.opened("towers.plan"):
                from tensorflow.python.framework.ops import nothing  # noqa: F401

    def test_a_mistake_of_ours_is_none_of_them(self):
        with self.assertRaisesRegex(AttributeError, "^'int' object"):
            with doors.opened("towers.plan"):
                (3).nothing  # noqa: B018

    def test_the_oldest_are_those_that_are_installed_with_it(self):
        needed = re.findall(
            r"(tensorflow|keras)>=([\d.]+)",
            (ROOT / "pyproject.toml").read_text(),
        )
        oldest = {x.lower(): old for x, (old, _) in doors.TESTED.items()}
        self.assertEqual(dict(needed), oldest)

    @pytest.mark.slow
    def test_a_fit_needs_no_door_of_a_plan(self):
        done = subprocess.run(
            [sys.executable, "-c", WITHOUT_PLANS],
            capture_output=True,
            text=True,
            cwd=ROOT,
        )
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertRegex(
            done.stdout, r"^towers.placement_plan needs .*op_def_registry"
        )
        self.assertIn("Crossed: 0 B", done.stdout)  # a report needs less
