"""pieces: a layer that is cut, and the device of each of its pieces."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

COLUMN_WISE, ROW_WISE = "column_wise", "row_wise"


@dataclasses.dataclass(frozen=True)
class Pieces:
    """Where the pieces of a layer are.

    Attributes:
      by: "column_wise", of what comes out, or "row_wise", of what goes in.
      devices: one for each piece.
    """

    by: str
    devices: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.devices)

    def __repr__(self) -> str:
        return f"{self.by}({list(self.devices)!r})"

    def __str__(self) -> str:
        return f"{', '.join(self.devices)}, {self.by}"

    def resolved(
        self, argument: str, resolve: Callable[[str, Any], str]
    ) -> "Pieces":
        """The same, with each device as a placement spells it."""
        named = [
            resolve(f"{argument}.devices[{i}]", device)
            for i, device in enumerate(self.devices)
        ]
        return Pieces(self.by, tuple(named))


def column_wise(devices: Sequence[str]) -> Pieces:
    """A layer in pieces, each of which computes some of the outputs.

    Units, filters or heads are shared out, or the width of an embedding, and the
    weights with them: no device holds them all. A batch goes to all pieces, and
    what they compute is put side by side; or stays where it is, for a layer that is
    cut row-wise into as many.

    >>> placement = towers.Placement(["/CPU:0"], layer_devices={
    ...     "up": towers.column_wise(["/CPU:0", "/CPU:1"])})
    >>> placement.layer_devices
    {'up': column_wise(['/CPU:0', '/CPU:1'])}

    Args:
      devices: that of each piece, in the order of the outputs; repeats allowed.
        Sizes differ by at most one, larger pieces first.

    Returns:
      A value for `Placement(layer_devices=...)`: for all towers, or in a list with
      one per tower, that all have as many pieces.

    Raises:
      TypeError: `devices` is no list.
      ValueError: `devices` is empty.
    """
    return _pieces(COLUMN_WISE, devices)


def row_wise(devices: Sequence[str]) -> Pieces:
    """A layer in pieces, each of which takes some of the inputs.

    The rows of its kernel are shared out: each piece computes a sum over its part of
    the inputs, these are added on the tower, and bias and activation come after.
    Of an embedding the rows of the table are: each id is looked up in the piece that
    has it, so that ids and rows are all that crosses.

    >>> towers.row_wise(["/CPU:0", "/CPU:1"])
    row_wise(['/CPU:0', '/CPU:1'])

    Args:
      devices: that of each piece, in the order of the inputs; repeats allowed.
        Sizes differ by at most one, larger pieces first.

    Returns:
      A value for `Placement(layer_devices=...)`, as of `column_wise`.

    Raises:
      TypeError: `devices` is no list.
      ValueError: `devices` is empty.
    """
    return _pieces(ROW_WISE, devices)


def _pieces(by: str, devices: Any) -> Pieces:
    if isinstance(devices, str) or not isinstance(devices, Sequence):
        raise TypeError(
            f"`devices` of {by} must be a list of device names, one per piece; "
            f'got {devices!r}. Write {by}(["/GPU:0", "/GPU:1"]).'
        )
    if not devices:
        raise ValueError(
            f"`devices` of {by} is empty, so a layer has no pieces. Expected at "
            "least one device name."
        )
    return Pieces(by, tuple(devices))
