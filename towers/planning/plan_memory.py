"""plan_memory: what a planned step would hold on each device."""

import collections
import dataclasses
from collections.abc import Sequence

from towers.placement.scopes import is_backward, tower_of
from towers.planning.crossings import PlacedGraph
from towers.report.partitions import Transfer
from towers.report.variables import VariableUse

_ARRIVES = {"parameters": "copies", "batch": "batch"}
# The same bytes, in another shape.
_ALIASES = ("Reshape", "Squeeze", "ExpandDims", "EnsureShape")


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes that a device would hold in a step, as far as its graph tells.

    Attributes:
      variables: parameters, slots and state.
      copies: parameters that come from other devices.
      batch: what comes of the batch from other devices.
      gradients: what towers there make of parameters, and as much as one tower
        sends there.
      activations: what the towers' forward pass makes and their backward pass takes,
        there.
      unknown: how many of those have a size that is not known beforehand.
    """

    variables: int = 0
    copies: int = 0
    batch: int = 0
    gradients: int = 0
    activations: int = 0
    unknown: int = 0

    @property
    def total(self) -> int:
        """All of them: a step needs as much, and what ops take while they run."""
        weights = self.variables + self.copies + self.gradients
        return weights + self.batch + self.activations


def memory_of(
    placed: PlacedGraph,
    transfers: Sequence[Transfer],
    variables: Sequence[VariableUse],
) -> dict[str, Memory]:
    """By device, what a step would hold.

    Args:
      placed: the step's graph.
      transfers: what would cross.
      variables: what it has.
    """
    held: dict[str, collections.Counter[str]] = collections.defaultdict(
        collections.Counter
    )
    for variable in variables:
        held[variable.device]["variables"] += variable.bytes
    sent: dict[str, collections.Counter[str]] = collections.defaultdict(
        collections.Counter
    )
    for transfer in transfers:
        for part in transfer.parts:
            if part.kind in _ARRIVES:
                kind = _ARRIVES[part.kind]
                held[transfer.target][kind] += part.bytes or 0
            elif part.kind == "gradients":
                sent[transfer.target][transfer.source] += part.bytes or 0
    for device, sources in sent.items():
        held[device]["gradients"] += max(sources.values())
    activations, gradients = _of_towers(placed)
    sizes = placed.sizes([tensor for tensor, _ in activations | gradients])
    for kind, values in (
        ("activations", activations),
        ("gradients", gradients),
    ):
        for tensor, device in values:
            size = sizes[tensor]
            held[device]["unknown" if size is None else kind] += (
                1 if size is None else size
            )
    return {d: Memory(**counts) for d, counts in sorted(held.items())}


def _of_towers(
    placed: PlacedGraph,
) -> tuple[set[tuple[str, str]], set[tuple[str, str]]]:
    """Values that backward passes take of forward ones, and that they hand out.

    Each with the device that has it: where it is taken, or where it was made.
    """
    activations, gradients = set(), set()
    for taker, tensor in placed.taken():
        buffer = placed.buffer(tensor, _ALIASES)
        if not _in_tower(buffer):
            continue
        if is_backward(buffer):
            if not is_backward(taker) and placed.is_float(buffer):
                gradients.add((buffer, placed.device_of(buffer)))
        elif is_backward(taker) and _in_tower(taker):
            activations.add((buffer, placed.device_of(taker)))
    return activations, gradients


def _in_tower(name: str) -> bool:
    return tower_of(name) is not None
