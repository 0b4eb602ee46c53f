"""cuts: which layers of a model are computed in pieces, and where these live."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

from towers.keras_model.pieces.joined import Joined
from towers.keras_model.pieces.rules import (
    Weight,
    cut_layers,
    sizes_of,
    weights_of,
)
from towers.placement.pieces import Pieces


@dataclasses.dataclass(frozen=True)
class Cuts:
    """What of a model is computed in pieces.

    Attributes:
      pins: by a layer's id where its pieces are, for all towers or for each.
      homes: by a piece's id its device, one for all towers or one for each.
      weights: what of these layers is cut, and into how many pieces.
      unready: paths of layers whose variables are not in these pieces, and why.
      paths: of all these layers.
    """

    pins: Mapping[int, Any] = dataclasses.field(default_factory=dict)
    homes: Mapping[int, Any] = dataclasses.field(default_factory=dict)
    weights: Sequence[tuple[Weight, Any]] = ()
    unready: Mapping[str, str] = dataclasses.field(default_factory=dict)
    paths: Sequence[str] = ()

    def of(self, layer: Any, tower: int) -> Pieces | None:
        """Where a layer's pieces are for a tower; None if it is in none."""
        pin = self.pins.get(id(layer))
        return pin[tower] if isinstance(pin, tuple) else pin

    def check_outputs(self, layer_outputs: Sequence[str]) -> None:
        """Raises if outputs are wanted of what a layer in pieces holds.

        Raises:
          ValueError: those of attention's projections are, which nobody has whole.
        """
        for name in layer_outputs:
            for path in self.paths:
                if name.startswith(f"{path}/"):
                    raise ValueError(
                        f"`layer_outputs` names {name!r}, but {path!r}, which "
                        "holds it, is computed in pieces, and no tensor has all "
                        f"of it. Expected {path!r} itself, or a placement that "
                        "leaves it whole."
                    )

    def refuse(self) -> NoReturn:
        """Raises, as a layer is not in its pieces yet.

        Raises:
          ValueError: names the first, which is whole, or in other pieces.
        """
        path, why = next(iter(self.unready.items()))
        raise ValueError(
            f"`layer_devices` asks for {path!r} in pieces, but it {why}. "
            "Expected towers.place_variables(model, placement), or a "
            "TowerModel, to cut it before towers are built."
        )


def cuts_of(
    paths: Sequence[tuple[str, Any]], pinned: Sequence[tuple[Any, Any]]
) -> Cuts:
    """What is to be computed in pieces.

    Args:
      paths: of all layers.
      pinned: layers and where they run, those that hold others first.

    Raises:
      ValueError: a layer cannot be cut; names it by its path.
    """
    pins = cut_layers(paths, pinned)
    layers = {id(layer): (path, layer) for path, layer in reversed(paths)}
    homes: dict[int, Any] = {}
    weights: list[tuple[Weight, Any]] = []
    unready: dict[str, str] = {}
    for i, pin in pins.items():
        path, layer = layers[i]
        if not layer.built:
            continue
        for weight in weights_of(layer, by_of(pin)):
            weights.append((weight, pin))
            if is_cut(weight, count_of(pin)):
                pieces = weight.value.pieces
                homes.update(zip(map(id, pieces), places_of(pin)))
            else:
                unready[path] = _state(weight, pin)
    names = [layers[i][0] for i in pins]
    return Cuts(pins, homes, weights, unready, names)


def by_of(pin: Any) -> str:
    return (pin[0] if isinstance(pin, tuple) else pin).by


def count_of(pin: Any) -> int:
    return len(pin[0] if isinstance(pin, tuple) else pin)


def places_of(pin: Any) -> Iterable[Any]:
    """By piece its device, or one for each tower."""
    if isinstance(pin, tuple):
        return zip(*(pieces.devices for pieces in pin))
    return pin.devices


def is_cut(weight: Weight, pieces: int) -> bool:
    """Whether a variable is in so many pieces, along that axis."""
    value = weight.value
    return (
        isinstance(value, Joined)
        and value.axis == weight.axis
        and value.sizes == sizes_of(value.shape[weight.axis], pieces)
    )


def _state(weight: Weight, pin: Any) -> str:
    value = weight.value
    if not isinstance(value, Joined):
        return "is still whole"
    return (
        f"is in {len(value.pieces)} pieces along axis {value.axis}, not in "
        f"{count_of(pin)} along {weight.axis}"
    )


NONE = Cuts()
