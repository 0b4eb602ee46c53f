"""Models that nobody has thought of have the plain model's numbers.

Each run takes others, and prints their seed. `RANDOM_MODELS_SEED` takes those of
a run again, or one that failed; `RANDOM_MODELS_SECONDS` says for how long, or
`RANDOM_MODELS` how many, which with a seed are the same on every machine.
"""

import os
import secrets
import time
from typing import Any

import keras
import numpy as np
import pytest
from absl.testing import absltest
from models import close
from random_models import Drawn, drawn

import towers


def trained(case: Drawn, wrap: bool) -> Any:
    """(history, evaluation, predictions, weights)."""
    model = case.model()
    if wrap:
        model = towers.TowerModel(model, case.placement, **case.options)
    model.compile(**case.compile())
    history = model.fit(
        case.x,
        case.y,
        batch_size=case.batch_size,
        epochs=2,
        shuffle=False,
        sample_weight=case.sample_weight,
        verbose=0,
    )
    answer = model.evaluate(
        case.x, case.y, batch_size=5, verbose=0, return_dict=True
    )
    predictions = model.predict(case.x, batch_size=4, verbose=0)
    return history.history, answer, predictions, model.get_weights()


def check(case: Drawn) -> bool:
    """Compares; whether plain Keras takes the model at all."""
    try:
        expected = trained(case, wrap=False)
    except (ValueError, KeyError, TypeError, AttributeError):
        return False
    actual = trained(case, wrap=True)
    for a, e in zip(actual[:2], expected[:2], strict=True):
        np.testing.assert_array_equal(list(a), list(e))
        for key in e:
            close(a[key], e[key], 1e-4)
    for a, e in zip(actual[2:], expected[2:], strict=True):
        close(a, e, 1e-4)
    return True


class RandomModelsTest(absltest.TestCase):
    @pytest.mark.slow
    def test_random_models_have_the_plain_model_s_numbers(self) -> None:
        seed = int(
            os.environ.get("RANDOM_MODELS_SEED", secrets.randbelow(10**6))
        )
        seconds = float(os.environ.get("RANDOM_MODELS_SECONDS", "90"))
        most = int(os.environ.get("RANDOM_MODELS", "0"))
        print(f"RANDOM_MODELS_SEED={seed}")
        end, compared, failures = time.monotonic() + seconds, 0, []
        tried = 0
        while tried < most if most else tried == 0 or time.monotonic() < end:
            case = drawn(seed + tried)
            tried += 1
            keras.backend.clear_session()
            try:
                compared += check(case)
            except Exception as error:
                failures.append(f"{case}\n  {type(error).__name__}: {error}")
        print(
            f"{compared} of {tried} models were compared, the others are none"
        )
        self.assertEmpty(failures, "\n".join(failures))
        if tried >= 30:  # of fewer it may be that most are none
            self.assertGreaterEqual(compared, 10)
