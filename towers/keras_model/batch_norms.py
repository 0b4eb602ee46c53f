"""batch_norms: whether towers meet where batch norms take the whole batch's moments.

A tower that asks the others in the midst of its forward pass is to be built beside
them. Whether a batch norm trains only its call tells: by the phase that it is told,
maybe by the model in which it is, which may be called without.
"""

import dataclasses
from typing import Any

import tensorflow as tf

from towers.engine import all_towers
from towers.engine.calls import How
from towers.foreign import keras_layers
from towers.keras_model.rehearsal import Rehearsal


def meet(rehearsal: Rehearsal) -> bool:
    """Whether a batch norm that takes all towers' moments trains.

    A tower is built until then, in a graph that is never run. Where it cannot be,
    and where a layer trains though its model does not, it is found when towers are
    built (`NeedsOthers`).

    Args:
      rehearsal: of a tower's call, whose graph is `hooked`.
    """
    request = rehearsal.request
    if len(request.placement.devices) == 1 or request.how is How.COMPILED:
        return False
    training = request.training
    if training is None and request.users_fn is None:
        phase = keras_layers.phase_here()
        training = False if phase is None else phase
    if training is False:
        return False

    rehearsal = dataclasses.replace(
        rehearsal, request=dataclasses.replace(request, training=training)
    )

    def call(copies: list[tf.Tensor], shard: Any) -> None:
        rehearsal.replay(copies, shard, "trained/")

    try:
        rehearsal.run(call, beside=all_towers.by_themselves)
    except all_towers.NeedsOthers:
        return True
    except Exception:  # whatever the user's layers raise, where they are built
        return False
    return False
