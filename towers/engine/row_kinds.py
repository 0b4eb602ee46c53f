"""row_kinds: how a tensor is made of the rows of a tower's shard.

What is none of these kinds is None: nothing is known of how it adds up.
"""

import dataclasses
from collections.abc import Iterable, Sequence


@dataclasses.dataclass(frozen=True)
class Total:
    """What has no rows: n ** power times what is the same in all towers.

    Or, if `summed`, n ** power times a sum over rows. So a mean is a sum of
    power -1, and n itself, the number of rows, has power 1.

    Attributes:
      summed: whether it is summed over rows.
      power: of the number of rows.
      exact: whether it is the number of rows.
    """

    summed: bool = False
    power: int = 0
    exact: bool = False

    @property
    def as_sum(self) -> "Total":
        """As a sum over rows: n is the sum of ones."""
        return self if self.summed else Total(True, self.power - 1)


@dataclasses.dataclass(frozen=True)
class OfRows:
    """What has an axis of rows, each entry of which is made of one row.

    Attributes:
      axis: of the rows.
      per: so many entries for each row; None if that is not known.
      power: that of the number of rows by which each entry is multiplied.
      counted: whether there are as many for each row.
      uniform: whether all entries are the same.
      order: in which order entries are, if not row by row.
    """

    axis: int
    per: int | None = 1
    power: int = 0
    counted: bool = True
    uniform: bool = False
    order: str = ""

    def at(self, axis: int) -> "OfRows":
        return dataclasses.replace(self, axis=axis)


@dataclasses.dataclass(frozen=True)
class Vector:
    """A vector of totals of different kinds, as a shape is."""

    of: tuple[Total, ...]


RowKind = Total | OfRows | Vector | None
RowKinds = Sequence[RowKind]
SAME, COUNT = Total(), Total(power=1, exact=True)
# For each value of a ragged tensor which row it is of.
SEGMENTS = OfRows(0, None, counted=False, order="segments")
SUM, MEAN = Total(True, 0), Total(True, -1)


def is_count(kind: RowKind) -> bool:
    """Whether this is a power of the number of rows, times the same."""
    return isinstance(kind, Total) and not kind.summed


def vector(kinds: Iterable[RowKind]) -> RowKind:
    """That of totals, one for each entry."""
    each = tuple(kinds)
    if all(kind == SAME for kind in each):
        return SAME
    totals = tuple(kind for kind in each if isinstance(kind, Total))
    return Vector(totals) if len(totals) == len(each) else None


def agreed(kinds: RowKinds) -> RowKind:
    """The one kind that all are of, as their sum is.

    What is the same in all towers is its mean over rows, too.
    """
    each: list[Total] = []
    for kind in kinds:
        if isinstance(kind, Vector):
            each += kind.of
        elif isinstance(kind, Total):
            each.append(dataclasses.replace(kind, exact=False))
        else:
            return None
    if any(kind.summed for kind in each):
        each = [kind.as_sum for kind in each]
    return each[0] if len(set(each)) == 1 else None


def rearranged(kind: RowKind) -> RowKind:
    """The kind of what has no rows, with the same entries in other places."""
    return None if isinstance(kind, OfRows) else agreed([kind])


def product(one: Total, other: Total) -> RowKind:
    if one.summed and other.summed:
        return None
    return Total(one.summed or other.summed, one.power + other.power)


def quotient(one: Total, other: Total) -> RowKind:
    if other.summed:
        return None
    return Total(one.summed, one.power - other.power)


def together(kinds: RowKinds) -> OfRows | None:
    """The kind of tensors of rows that are joined along another axis."""
    rows = [kind for kind in kinds if isinstance(kind, OfRows)]
    alike = {
        dataclasses.replace(kind, uniform=False, per=None) for kind in rows
    }
    if len(rows) < len(kinds) or len(alike) != 1:
        return None
    per = next((kind.per for kind in rows if kind.per is not None), None)
    return dataclasses.replace(alike.pop(), per=per)


def either(kinds: RowKinds) -> RowKind:
    """The kind of what is one of several, whichever that is."""
    one = kinds[0]
    if all(kind == one for kind in kinds):
        return one
    if any(isinstance(kind, OfRows) for kind in kinds):
        # A list that is empty is the same in all towers.
        return together([kind for kind in kinds if kind != SAME])
    return agreed(kinds)
