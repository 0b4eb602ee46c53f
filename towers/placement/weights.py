"""weights: which share of a batch each tower gets."""

import math
from collections.abc import Sequence


def checked_weights(
    weights: Sequence[float] | None, n: int
) -> tuple[float, ...] | None:
    """Shares of the batch, one per tower; None stays, for equal ones.

    Raises:
      TypeError: they are no numbers.
      ValueError: there are not `n`, or they cannot be shares.
    """
    if weights is None:
        return None
    expected = (
        f"`weights` must be {n} non-negative numbers with a positive sum, one "
        "per tower"
    )
    if isinstance(weights, (str, dict)):
        raise TypeError(f"{expected}; got {weights!r}.")
    try:
        checked = tuple(float(weight) for weight in weights)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{expected}; got {weights!r}.") from error
    if (
        len(checked) != n
        or not all(math.isfinite(w) and w >= 0 for w in checked)
        or sum(checked) <= 0
    ):
        raise ValueError(
            f"{expected}; got {list(weights)!r}. For equal shares, leave it "
            "out."
        )
    return checked
