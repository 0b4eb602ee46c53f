"""containers: what dicts, lists and tuples hold, whoever made them.

A container may hold itself, as a layer's list of blocks may: Keras trains and saves
such a model. `tf.nest` would not come back from it.
"""

from collections.abc import Iterator, Mapping
from typing import Any


def leaves(value: Any) -> Iterator[Any]:
    """What is no container in a nest, each container looked into once.

    Args:
      value: a nest of mappings, lists and tuples.
    """
    for _, leaf in _inside(value, (), set()):
        yield leaf


def named_leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """As `leaves`, with their names.

    Args:
      value: a nest of mappings, lists and tuples.
      name: of the nest, with which the leaves' names begin.

    Yields:
      `(name, leaf)`, as in `("blocks[0]['norm']", layer)`.
    """
    for keys, leaf in _inside(value, (), set()):
        yield name + "".join(f"[{key!r}]" for key in keys), leaf


def _inside(
    value: Any, keys: tuple[Any, ...], ids: set[int]
) -> Iterator[tuple[tuple[Any, ...], Any]]:
    children: Any
    if isinstance(value, Mapping):
        children = value.items()
    elif isinstance(value, (list, tuple)):
        children = enumerate(value)
    else:
        yield keys, value
        return
    if id(value) not in ids:
        ids.add(id(value))
        for key, child in children:
            yield from _inside(child, (*keys, key), ids)
