"""pins: layers that run on devices of their own, by path, name or pattern.

What each key of `layer_devices` means is worked out here, and nowhere else.
"""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from towers.foreign import keras_layers
from towers.placement.pieces import Pieces

# A device, or those of pieces, for all towers; or one for each.
Pin = str | Pieces | Sequence[str] | Sequence[Pieces]
_PATH, _NAME, _PATTERN = range(3)


def layer_paths(models: Sequence[Any]) -> list[tuple[str, Any]]:
    """Layers as "conv2d", or "encoder/conv2d" in a nested model.

    With several models, paths start with the model's name. A layer that several
    others hold has several paths. Operations that are no layers, as of
    `x + y` in a functional model, stand beside the layers.
    """

    def below(layer: Any, prefix: str) -> Iterator[tuple[str, Any]]:
        for child in keras_layers.children(layer):
            yield prefix + child.name, child
            yield from below(child, f"{prefix}{child.name}/")
        for operation in keras_layers.bare_operations(layer):
            yield prefix + operation.name, operation

    if len(models) == 1:
        return list(below(models[0], ""))
    return [
        pair for m in models for pair in ((m.name, m), *below(m, f"{m.name}/"))
    ]


def pinned(
    paths: Sequence[tuple[str, Any]], layer_devices: Mapping[str, Pin]
) -> list[tuple[Any, Pin]]:
    """(layer, where it runs) of all that run elsewhere than their tower.

    A layer's own key beats that of the layer that holds it. Of its own keys a
    path beats a name, and that a pattern. Layers come after those that hold
    them.

    Args:
      paths: of all layers.
      layer_devices: as a placement has it.

    Raises:
      ValueError: a key matches nothing, or a name several layers; or keys that
        count the same say different things of a layer.
    """
    own = _own_keys(paths, layer_devices)
    wheres: dict[int, dict[str, Pin]] = {}  # by layer: by key that decides
    for path, layer in paths:
        nearest = next((own[p] for p in _upwards(path) if p in own), {})
        wheres.setdefault(id(layer), {}).update(nearest)
    # One that several hold comes after the last of them.
    depth = {id(layer): 0 for _, layer in paths}
    for path, layer in paths:
        depth[id(layer)] = max(depth[id(layer)], path.count("/"))
    layers = keras_layers.unique(layer for _, layer in paths)
    pairs = []
    for layer in sorted(layers, key=lambda layer: depth[id(layer)]):
        where = wheres[id(layer)]
        if len(set(where.values())) > 1:
            listing = ", ".join(f"{k!r}: {v!r}" for k, v in where.items())
            path = next(path for path, other in paths if other is layer)
            raise ValueError(
                f"`layer_devices` says different things of {path!r}: "
                f"{listing}. Expected one device, or one list of them; give "
                "the layer's own path, which beats all others, or narrow the "
                "patterns."
            )
        pairs += [(layer, pin) for pin in [*where.values()][:1]]
    return pairs


def _own_keys(
    paths: Sequence[tuple[str, Any]], layer_devices: Mapping[str, Pin]
) -> dict[str, dict[str, Pin]]:
    """By path, the keys that are of this layer, and what they say."""
    ranked: dict[int, dict[str, int]] = {}
    for key in layer_devices:
        rank, layers = _layers_of_key(key, paths)
        for layer in layers:
            ranked.setdefault(id(layer), {})[key] = rank
    return {
        path: {
            key: layer_devices[key]
            for key, rank in ranked[id(layer)].items()
            if rank == min(ranked[id(layer)].values())
        }
        for path, layer in paths
        if id(layer) in ranked
    }


def _layers_of_key(
    key: str, paths: Sequence[tuple[str, Any]]
) -> tuple[int, Sequence[Any]]:
    """Whether a key is a path, a name or a pattern, and of which layers."""
    here = [layer for path, layer in paths if path == key]
    if here:
        return _PATH, here
    named = [(path, layer) for path, layer in paths if layer.name == key]
    if len({id(layer) for _, layer in named}) == 1:
        return _NAME, [named[0][1]]
    if named:
        raise no_layer("layer_devices", key, [path for path, _ in named])
    try:
        pattern = re.compile(key)
    except re.error:
        pattern = None
    matched = [p for p in paths if pattern and pattern.fullmatch(p[0])]
    if not matched:
        raise no_layer("layer_devices", key, [path for path, _ in paths])
    return _PATTERN, [layer for _, layer in matched]


def _upwards(path: str) -> Iterator[str]:
    """A path, that of the layer which holds it, and so on."""
    while path:
        yield path
        path = path.rpartition("/")[0]


def no_layer(argument: str, name: str, paths: list[str]) -> ValueError:
    """The error for a name that is no layer's, or could be several layers'."""
    bare = re.sub(r"[^\w/]", "", name)  # of a pattern
    near = [
        *difflib.get_close_matches(name, paths, n=3),
        *difflib.get_close_matches(bare, paths, n=3),
    ]
    if all(path.endswith(f"/{name}") for path in paths):
        return ValueError(
            f"`{argument}` names {name!r}, which could be any of "
            f"{', '.join(sorted(paths))}. Give the path."
        )
    pattern = ", and no path matches it as a pattern"
    return ValueError(
        f"`{argument}` names {name!r}, but the model has no such layer"
        f"{pattern if argument == 'layer_devices' else ''}. The nearest are "
        f"{', '.join([*dict.fromkeys(near)] or sorted(paths)[:10])}."
    )
