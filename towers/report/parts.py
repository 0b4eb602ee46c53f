"""parts: what a transfer holds, and what people call it."""

import dataclasses
from collections.abc import Sequence

# What crosses, and how people call one of that kind.
PART_KINDS = {
    "parameters": "weights of",
    "gradients": "gradient of",
    "batch": "batch",
    "batch gradients": "gradient of the batch",
    "outputs": "outputs",
    "output gradients": "gradient of the outputs",
    "activations": "activations of",
    "activation gradients": "gradient of activations, from",
    "state": "state",
    "rest": "",
}
_MOST = 3  # of a kind are named
WITHIN = ("activations", "activation gradients")


@dataclasses.dataclass(frozen=True)
class Part:
    """What a transfer holds of one variable or layer.

    Attributes:
      kind: one of `PART_KINDS`.
      layer: the path of the layer that it is of; "" if of none.
      name: the variable's, from the layer on; "" if it is of none.
      bytes: what it came to; None where that is not known.
    """

    kind: str
    layer: str = ""
    name: str = ""
    bytes: int | None = None

    def __str__(self) -> str:
        of = self.name or self.layer
        words = PART_KINDS[self.kind]
        if not words:
            return of
        if words.endswith((" of", " from")):
            return f"{words} {of or '?'}"
        return f"{words} {of}" if self.kind == "state" and of else words


def parts_in_words(parts: Sequence[Part]) -> str:
    """Parts of a transfer in words: "weights of dense/kernel, dense/bias"."""
    lines = []
    for kind in dict.fromkeys(part.kind for part in parts):
        own = list(dict.fromkeys(str(p) for p in parts if p.kind == kind))
        words = f"{PART_KINDS[kind]} "
        names = [own[0], *(text.removeprefix(words) for text in own[1:])]
        more = f" and {len(names) - _MOST} more" * (len(names) > _MOST)
        lines.append(", ".join(names[:_MOST]) + more)
    return "; ".join(filter(None, lines))


def summed_parts(
    parts: Sequence[Part], sizes: Sequence[int]
) -> tuple[Part, ...]:
    """Each part once, with its bytes."""
    sums: dict[Part, int] = {}
    for part, size in zip(parts, sizes):
        sums[part] = sums.get(part, 0) + size
    return tuple(
        dataclasses.replace(part, bytes=size) for part, size in sums.items()
    )


def merged_parts(parts: Sequence[Part], size: int | None) -> Part:
    """Parts whose own bytes are not known, as one."""
    kinds, layers = {p.kind for p in parts}, {p.layer for p in parts}
    return Part(
        kinds.pop() if len(kinds) == 1 else "rest",
        layers.pop() if len(layers) == 1 else "",
        ", ".join(dict.fromkeys(p.name for p in parts if p.name)),
        size,
    )
