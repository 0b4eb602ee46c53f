"""containers: what dicts, lists and tuples hold, whoever made them.

A container may hold itself, as a layer's list of blocks may: Keras trains and saves
such a model. `tf.nest` would not come back from it.
"""

from collections.abc import Iterator, Mapping
from typing import Any


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """What is no container in a nest, each container looked into once.

    Args:
      value: a nest of mappings, lists and tuples.
      name: of the nest, with which the leaves' names begin.

    Yields:
      `(name, leaf)`, as in `("blocks[0]['norm']", layer)`.
    """
    seen: set[int] = set()

    def inside(value: Any, name: str) -> Iterator[tuple[str, Any]]:
        children: Any
        if isinstance(value, Mapping):
            children = value.items()
        elif isinstance(value, (list, tuple)):
            children = enumerate(value)
        else:
            yield name, value
            return
        if id(value) not in seen:
            seen.add(id(value))
            for key, child in children:
                yield from inside(child, f"{name}[{key!r}]")

    return inside(value, name)
