"""batch: what came in, as tensors of equal rows, and which of them go whole."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import tensorflow as tf


class BatchPerTower(NamedTuple):
    """A batch of which each tower has its own part, on its own machine.

    Attributes:
      towers: one nest of tensors [rows, ...] per tower.
    """

    towers: tuple[Any, ...]


@runtime_checkable
class ReadByTowers(Protocol):
    """Inputs of which each tower reads its own, as `per_tower` makes them."""

    def batch_per_tower(self, placement: Any) -> BatchPerTower:
        """The next batch of a placement's towers, in this graph or at once."""


@dataclasses.dataclass(frozen=True)
class Batch:
    """What came in: tensors whose rows agree, where that is known.

    Attributes:
      nest: of tensors [rows, ...]; None for an input that is left out.
      whole: for each leaf whether every tower gets it as it is.
      each: None, or one such nest per tower, which has it already; `nest` is
        the first.
    """

    nest: Any
    whole: Sequence[bool]
    each: Sequence[Any] | None = None


def whole_leaves(batch: Any, whole: Sequence[Any]) -> list[bool]:
    """For each leaf whether it goes to every tower whole.

    Raises:
      TypeError: `whole` is no list.
      ValueError: `whole` names something that the batch has not.
    """
    return tf.nest.flatten(_marked(batch, whole_paths(whole)))


def whole_paths(whole: Sequence[Any]) -> list[tuple[Any, ...]]:
    """What `whole` names, each as a tuple of keys.

    Raises:
      TypeError: it is no list.
    """
    if isinstance(whole, str) or not isinstance(whole, Sequence):
        raise TypeError(
            "`whole` must be a list of names, or positions, of inputs that "
            f"every tower gets whole; got {whole!r}."
        )
    return [key if isinstance(key, tuple) else (key,) for key in whole]


def _marked(batch: Any, paths: Sequence[tuple[Any, ...]]) -> Any:
    """A nest like `batch` of bools: whether a leaf is below one of `paths`."""
    if not paths or () in paths:
        return tf.nest.map_structure(lambda _: bool(paths), batch)
    children: dict[Any, Any] = {}
    if isinstance(batch, Mapping):
        children = dict(batch)
    elif isinstance(batch, (list, tuple)):
        children = dict(enumerate(batch))
    unknown = [path[0] for path in paths if path[0] not in children]
    if unknown:
        raise ValueError(
            f"`whole` names {unknown[0]!r}, but the inputs have "
            f"{list(children)}. Expected keys of a dict of inputs, or "
            "positions in a list; a tuple of those for what lies deeper."
        )
    marked = {
        key: _marked(child, [path[1:] for path in paths if path[0] == key])
        for key, child in children.items()
    }
    return marked if isinstance(batch, Mapping) else list(marked.values())


def checked_batch(
    batch: Any, argument: str = "inputs", whole: Sequence[Any] = ()
) -> Batch:
    """The batch as tensors, once and for all.

    Raises:
      TypeError: a leaf is no tensor, or `whole` no list.
      ValueError: a leaf is a scalar, the rows disagree, or `whole` names what
        is not there.
    """

    def convert(path_index: int, value: Any, undivided: bool) -> Any:
        where = f"`{argument}`" + (
            f" (leaf {path_index})" if path_index or nested else ""
        )
        if value is None:
            return None
        tensor = value
        if not isinstance(value, (tf.RaggedTensor, tf.SparseTensor)):
            try:
                tensor = tf.convert_to_tensor(value)
            except (TypeError, ValueError) as error:
                raise TypeError(
                    f"{where} must be a tensor or an array; got {value!r}."
                ) from error
        if not undivided and not tensor.shape.rank:
            raise ValueError(
                f"{where} must have a first axis of rows to split; got shape "
                f"{tensor.shape}. Give each row its own value, as with "
                "tf.repeat, or name the input in `whole`, so that every tower "
                "gets it as it is."
            )
        return tensor

    if isinstance(batch, BatchPerTower):
        raise TypeError(
            f"`{argument}` is a batch of towers.per_tower, of which each tower "
            "has its part already. Expected a batch to split; give that one to "
            "build_towers."
        )
    nested = tf.nest.is_nested(batch)
    undivided = whole_leaves(batch, whole)
    flat = [
        convert(i, x, w)
        for i, (x, w) in enumerate(zip(tf.nest.flatten(batch), undivided))
    ]
    divided = [x for x, w in zip(flat, undivided) if x is not None and not w]
    if not divided:
        raise ValueError(
            f"`{argument}` must hold at least one tensor to split; got "
            f"{batch!r}."
        )
    rows = [x.shape[0] for x in divided]
    if len({r for r in rows if r is not None}) > 1:
        raise ValueError(
            f"All leaves of `{argument}` must have the same number of rows; "
            f"got {rows}. Pass inputs whose first axes agree, as a dataset's do "
            "with .batch(rows), and name in `whole` those that are not batched."
        )
    return Batch(tf.nest.pack_sequence_as(batch, flat), undivided)


def checked_each(each: Sequence[Any], whole: Sequence[Any]) -> Batch:
    """The same of what each tower has already, one nest per tower."""
    checked = [
        checked_batch(nest, f"inputs of tower {i}", whole)
        for i, nest in enumerate(each)
    ]
    nests = [batch.nest for batch in checked]
    return dataclasses.replace(checked[0], each=nests)


def own_inputs(inputs: Any, placement: Any) -> Sequence[Any] | None:
    """What each tower has already, if it reads its own; else None.

    Args:
      inputs: what `build_towers` is given.
      placement: of the towers.
    """
    if isinstance(inputs, ReadByTowers):
        inputs = inputs.batch_per_tower(placement)
    return inputs.towers if isinstance(inputs, BatchPerTower) else None


def refuse_divided(arguments: Mapping[str, Any], whole: Sequence[Any]) -> None:
    """Raises if `arguments` are to be split: each tower has its own rows."""
    for name, value in arguments.items():
        shapes = [getattr(x, "shape", ()) for x in tf.nest.flatten(value)]
        if (name,) not in whole_paths(whole) and any(map(len, shapes)):
            raise ValueError(
                f"`arguments` hold {name!r}, to be split by rows, but with inputs "
                "of towers.per_tower each tower has its own rows. Put it into "
                "the datasets and use a `tower_fn`, or name it in `whole`."
            )


def is_per_tower(value: Any) -> bool:
    """Whether it is what towers read themselves."""
    return isinstance(value, (ReadByTowers, BatchPerTower))


def hold_per_tower(values: Iterable[Any]) -> bool:
    """Whether one of these, or of what is in a tuple of theirs, is such."""
    parts = [(x, *x) if isinstance(x, tuple) else (x,) for x in values]
    return any([is_per_tower(x) for some in parts for x in some])


def refuse_per_tower(values: Iterable[Any], method: str) -> None:
    """Raises a `ValueError` if one of these is what towers read themselves."""
    if any(map(is_per_tower, values)):
        raise ValueError(
            f"Inputs of towers.per_tower were given to `{method}` of a TowerModel, "
            "which splits whole batches. Expected arrays or tensors. Give what "
            "towers.per_tower returned to `fit`, `evaluate` or `predict`, alone or "
            "as `validation_data`; in a loop of your own, give its batches to "
            "towers.build_towers(model.template, batch, placement, tower_fn=...)."
        )
