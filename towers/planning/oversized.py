"""oversized: layers that are larger than any device may hold, in pieces on all."""

from collections.abc import Sequence

import keras

from towers.keras_model.pieces.rules import CUTTABLE, objections, sizes_of
from towers.placement.pieces import Pieces, column_wise, row_wise
from towers.planning.steps import Step


def cut_up(
    steps: Sequence[Step],
    loads: Sequence[Sequence[int]],
    bounds: Sequence[float],
    devices: Sequence[str],
) -> dict[int, Pieces]:
    """By their places, layers that exceed each device's limit, and their pieces.

    Of a table the rows are shared out, of others units, filters or heads. One that
    cannot be cut is left out.

    Args:
      steps: what a model calls.
      loads: the bytes of each, by kind.
      bounds: how many bytes each device may hold.
      devices: their names.
    """
    by_place = {}
    for i, (step, load) in enumerate(zip(steps, loads)):
        if sum(load) > max(bounds) and isinstance(step.layer, CUTTABLE):
            is_table = isinstance(step.layer, keras.layers.Embedding)
            pieces = (row_wise if is_table else column_wise)(devices)
            if not any(objections(step.layer, pieces)):
                by_place[i] = pieces
    return by_place


def shares(load: Sequence[int], n: int) -> list[tuple[int, ...]]:
    """What each of `n` devices holds of a layer, by kind."""
    return [*zip(*(sizes_of(size, n) for size in load))]
