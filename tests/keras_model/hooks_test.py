"""hooks: put on layers and taken off again."""

import keras
import numpy as np
from absl.testing import absltest
from models import cnn, make, placement

import towers

SHADOWED = (
    "call",
    "quantized_call",
    "assign",
    "activity_regularizer",
    "synchronized",
    "_moments",
    "_get_call_context",
    "_expected_batch_size",
)


class HooksTest(absltest.TestCase):
    def test_a_replay_leaves_the_layers_as_they_were(self):
        def stateful():
            return keras.Sequential(
                [
                    keras.Input(batch_shape=(2, 5, 3)),
                    keras.layers.GRU(3, stateful=True),
                    keras.layers.BatchNormalization(synchronized=True),
                ]
            )

        for model, x in (
            (make(cnn), np.ones([2, 8, 8, 2])),
            (make(stateful), np.ones([2, 5, 3])),
        ):
            parts = [*model._flatten_layers(), *model.variables]
            parts += getattr(model.layers[0], "states", None) or []
            before = [dict(vars(part)) for part in parts]
            towers.build_towers(model, x, placement(2), training=True)
            for part, was in zip(parts, before):
                for name in SHADOWED:
                    self.assertIs(vars(part).get(name), was.get(name), name)
