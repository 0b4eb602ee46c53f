"""scopes: which tower and layer an op belongs to, by its name."""

import re

# A second call of towers in one graph has another number behind: "tower_0_1".
_TOWER = re.compile(r"(?:^|.*/)tower_(\d+)(?:_\d+)?/(.+)")
_BACKWARD = re.compile(r"(^|/)gradients(_\d+)?/|_grad(_\d+)?/")
# What a layer's ops are wrapped in, which is no layer.
_INSIDE = re.compile(
    r"(while|cond|TensorArray\w*|ReverseV2|(Stateful)?PartitionedCall|\w+_grad)"
    r"(_\d+)?"
)


def tower_of(name: str) -> tuple[int, str] | None:
    """The tower's number, and what an op is called in there.

    None of an op that is no tower's.
    """
    match = _TOWER.match(name)
    return (int(match[1]), match[2]) if match else None


def layer_of(name: str) -> str:
    """The path of the layer ("encoder/dense") that an op in a tower is of.

    Args:
      name: of the op, inside its tower's scope.

    Returns:
      "" for an op outside of layers.
    """
    parts = name.split("/")
    ends = [i for i, part in enumerate(parts) if _INSIDE.fullmatch(part)]
    return "/".join(parts[: ends[0] if ends else -1])


def is_backward(name: str) -> bool:
    """Whether an op is one of a gradient."""
    return _BACKWARD.search(name) is not None
