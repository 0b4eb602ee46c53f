"""figures: how far numbers are from others, beside what rounding alone makes of them."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# How often rounding of the largest number of a kind is no difference, and how often
# what a change of one rounding in all weights makes of it.
_ROUNDINGS, _TIMES = 8, 8

# The numbers of a kind, by what they are called.
Results = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Figure:
    """How far the numbers of one kind are from the plain model's.

    Attributes:
      kind: such as "gradients".
      distance: of the furthest number, over the largest of what it is measured by:
        all of its kind, or of state and weights its variable. Infinite where what
        is no float differs, or one of both is missing or not finite.
      allowed: the distance that rounding explains.
      worst: which output or variable is the furthest; "" if none differs.
    """

    kind: str
    distance: float
    allowed: float
    worst: str = ""

    @property
    def equal(self) -> bool:
        """Whether rounding explains it."""
        return self.distance <= self.allowed


def figure_of(
    kind: str,
    plain: Results,
    other: Results,
    moved: Sequence[Results],
    rounding: float,
    apart: bool = False,
) -> Figure:
    """How far others are from the plain numbers.

    Args:
      kind: of all of them.
      plain, other: arrays by name.
      moved: the plain model's once more, with weights that are a rounding away.
      rounding: of the model's dtype, relative to 1.
      apart: whether each array is measured by its own largest number.
    """
    sizes = {name: _largest(x) for name, x in plain.items()}
    whole = max(sizes.values(), default=0.0)
    noise = {
        name: max((_distance(x, m.get(name)) for m in moved), default=0.0)
        for name, x in plain.items()
    }
    figures = []
    for name in [*plain, *(set(other) - set(plain))]:
        size = (sizes.get(name, 0.0) if apart else whole) or 1.0
        rough = noise.get(name, 0.0) if apart else max(noise.values())
        allowed = _ROUNDINGS * rounding + _TIMES * rough / size
        far = _distance(plain.get(name), other.get(name)) / size
        figures.append(Figure(kind, far, allowed, name if far else ""))
    return max(
        figures,
        key=lambda one: (not one.equal, one.distance),
        default=Figure(kind, 0.0, 0.0),
    )


def _distance(one: Any, other: Any) -> float:
    """The largest difference between two arrays; nan is equal to nan."""
    if one is None or other is None or one.shape != other.shape:
        return np.inf
    if not one.size:
        return 0.0
    if not _is_inexact(one):
        return 0.0 if np.array_equal(one, other) else np.inf
    a, b = _wide(one), _wide(other)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(invalid="ignore"):
        far = np.where(same, 0.0, np.abs(a - b))
    return float(np.max(np.where(np.isnan(far), np.inf, far)))


def _largest(x: Any) -> float:
    if not x.size or not _is_inexact(x):
        return 0.0
    sizes = np.abs(_wide(x))
    return float(np.max(sizes[np.isfinite(sizes)], initial=0.0))


def _is_inexact(x: Any) -> bool:
    """Whether there is rounding in it; of bfloat16 NumPy knows no kind."""
    return x.dtype.kind in "fc" or "float" in x.dtype.name


def _wide(x: Any) -> Any:
    return x.astype("complex128" if x.dtype.kind == "c" else "float64")
