"""folding: what is the same several times in a model, to be drawn once."""

import dataclasses
from collections.abc import Collection, Hashable, Iterator, Sequence

_LEAST = 3  # steps that a fold must save


@dataclasses.dataclass(frozen=True)
class Block:
    """Steps that come several times, one after the other.

    Attributes:
      start: the first step.
      length: how many steps one of them has.
      count: how often they come.
    """

    start: int
    length: int
    count: int

    @property
    def end(self) -> int:
        """The number of the step after the last repetition."""
        return self.start + self.length * self.count

    def first(self, step: int) -> int:
        """The step of the first repetition that a step of any is like."""
        return self.start + (step - self.start) % self.length


def repeated(
    kinds: Sequence[Hashable], edges: Collection[tuple[int, int]]
) -> list[Block]:
    """The blocks of a chain of steps, which save most first, in their order.

    Each is wired within as the first is, takes what the one before gives, as the
    second does, and gives to nothing else but the next; but for the last.

    Args:
      kinds: of each step what makes it like another.
      edges: from which step to which.
    """
    blocks, free = [], [True] * len(kinds)
    for block in sorted(
        _candidates(kinds), key=lambda b: (-b.length * (b.count - 1), b.length)
    ):
        wired = _as_wired(block, edges)
        if wired is not None and all(free[wired.start : wired.end]):
            free[wired.start : wired.end] = [False] * (wired.end - wired.start)
            blocks.append(wired)
    return sorted(blocks, key=lambda block: block.start)


def _candidates(kinds: Sequence[Hashable]) -> Iterator[Block]:
    """Runs of steps that repeat, by the kinds of their layers alone."""
    n = len(kinds)
    for length in range(1, n // 2 + 1):
        same = [kinds[i] == kinds[i + length] for i in range(n - length)]
        start = 0
        while start < len(same):
            run = start
            while run < len(same) and same[run]:
                run += 1
            # Where in the run a block begins, its wires tell.
            for first in range(start, run):
                for count in range((run - first) // length + 1, 1, -1):
                    if length * (count - 1) >= _LEAST:
                        yield Block(first, length, count)
            start = run + 1


def _as_wired(block: Block, edges: Collection[tuple[int, int]]) -> Block | None:
    """The block, if all are wired alike; None if they are not."""
    within: list[set[tuple[int, int]]] = [set() for _ in range(block.count)]
    taken: list[set[tuple[int, int]]] = [set() for _ in range(block.count)]
    for maker, taker in edges:
        source, target = (
            (step - block.start) // block.length
            if block.start <= step < block.end
            else None
            for step in (maker, taker)
        )
        at = maker - block.start, taker - block.start
        if target is not None and source == target:
            offset = target * block.length
            within[target].add((at[0] - offset, at[1] - offset))
        elif target is not None and target > 0:
            if source != target - 1:
                return None
            offset = target * block.length
            taken[target].add((at[0] - offset, at[1] - offset))
        elif source is not None and source < block.count - 1:
            return None
    alike = all(w == within[0] for w in within) and all(
        t == taken[1] for t in taken[2:]
    )
    return block if alike and taken[1] else None
