"""model_calls: what a model is called with: what towers share by rows, and the rest."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from towers.foreign import keras_layers
from towers.verbs.batch import (
    Batch,
    checked_batch,
    refuse_divided,
    whole_leaves,
    whole_paths,
)

_TENSORS = (tf.Tensor, tf.RaggedTensor, tf.SparseTensor)
_LIKE_TENSORS = (np.ndarray, tf.Variable, keras.Variable)


@dataclasses.dataclass(frozen=True)
class MaskedPlace:
    """Where a tensor is in a batch, and where its Keras mask is."""

    tensor: int
    mask: int | None


@dataclasses.dataclass(frozen=True)
class ModelCall:
    """A call of a model: tensors by rows or whole, and all else as it is.

    It is a `tower_fn` that makes this call of a model with a shard of `batch`.

    Attributes:
      arguments: (args, kwargs), with a `MaskedPlace` for each tensor.
      batch: the tensors, and the masks that Keras attached to them.
      whole: positions of those that every tower gets as they are.
      training: the phase that the model is told, if any.
      inside: whether the layer's `__call__` is under way already, so that its
        `call` is next.
    """

    arguments: Any
    batch: list[Any]
    whole: list[int]
    training: bool | None = None
    inside: bool = False

    @property
    def has_rows(self) -> bool:
        """Whether there is anything to share."""
        return len(self.whole) < len(self.batch)

    @property
    def kind(self) -> tuple[Any, ...]:
        """What is equal for calls that differ in their tensors only."""
        values = [(type(x), x) for x in tf.nest.flatten(self.arguments)]
        nest = tf.nest.map_structure(lambda _: 0, self.arguments)
        return (str(nest), *values, *self.whole, self.training, self.inside)

    def shared(self, each: Sequence[Any] | None = None) -> Batch:
        """The tensors, as the batch that towers get.

        Args:
          each: None, or those that each tower has already.
        """
        whole = [i in self.whole for i in range(len(self.batch))]
        return Batch(self.batch, whole, each)

    def bound(self, shard: Sequence[Any]) -> Any:
        """(args, kwargs), with the tensors of a shard of `batch`."""

        def tensor(value: Any) -> Any:
            if not isinstance(value, MaskedPlace):
                return value
            leaf = shard[value.tensor]
            if value.mask is not None:
                keras_layers.set_mask(leaf, shard[value.mask])
            return leaf

        return tf.nest.map_structure(tensor, self.arguments)

    def inputs(self, shard: Sequence[Any]) -> Any:
        """The first argument, with the tensors of a shard of `batch`."""
        args, kwargs = self.bound(shard)
        return [*args, *kwargs.values()][0]

    def __call__(self, model: Any, shard: Sequence[Any]) -> Any:
        args, kwargs = self.bound(shard)
        if self.inside:
            return model.call(*args, **kwargs)
        if self.training is not None:
            kwargs = {**kwargs, "training": self.training}
        return model(*args, **kwargs)


def model_call(
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    whole: Sequence[Any] = (),
    signature: inspect.Signature | None = None,
    training: bool | None = None,
    inside: bool = False,
) -> ModelCall:
    """What a model is called with, cut into what is shared and what is not.

    Tensors, arrays and variables are shared by rows, unless they are scalars or
    named in `whole`. Everything else is a value that every tower gets.

    Args:
      args, kwargs: what the model is called with, first of all its inputs.
      whole: names of arguments; what is none is a key of, or a position in, the
        inputs, see `split_batch`. A tuple names what lies deeper.
      signature: names the arguments, those too that are not given.
      training, inside: as of a `ModelCall`.

    Raises:
      TypeError: inputs that come alone are no tensors.
      ValueError: rows are known to differ, there are none, or `whole` names what
        is not there.
    """
    names, others = _names(signature)
    names += [f"argument {i}" for i in range(len(names), len(args))]
    if not inside and training is None:
        args, kwargs, training = _phased(args, kwargs, names)
    training = bool(training) if isinstance(training, np.bool_) else training
    others |= {*names[1:], *kwargs}
    others -= {*names[:1]}  # that is the inputs
    paths = whole_paths(whole)
    inputs = [path for path in paths if path[0] not in others]
    if len(args) == 1 and not inside and not _tensors(kwargs):
        checked = checked_batch(args[0], whole=inputs).nest
        keras_layers.set_notes(checked, keras_layers.get_masks(args[0]))
        args = [checked]
    batch: list[Any] = []
    labels: list[str] = []
    undivided: list[int] = []

    def added(value: Any, label: str, alone: bool) -> int:
        if alone or value.shape.rank == 0:
            undivided.append(len(batch))
        batch.append(value)
        labels.append(label)
        return len(batch) - 1

    def cut(value: Any, name: str) -> Any:
        def place(leaf: Any, alone: bool) -> Any:
            if not isinstance(leaf, _TENSORS + _LIKE_TENSORS):
                return leaf
            mask = keras_layers.get_mask(leaf)
            if not isinstance(leaf, _TENSORS):
                leaf = tf.convert_to_tensor(leaf)
            i = added(leaf, name, alone)
            return MaskedPlace(
                i, None if mask is None else added(mask, name, alone)
            )

        below = [path[1:] for path in paths if path[0] == name]
        alone = whole_leaves(value, below if name in others else inputs)
        flat = [place(x, w) for x, w in zip(tf.nest.flatten(value), alone)]
        return tf.nest.pack_sequence_as(value, flat)

    arguments = (
        [cut(value, name) for value, name in zip(args, names)],
        {name: cut(value, name) for name, value in kwargs.items()},
    )
    call = ModelCall(arguments, batch, undivided, training, inside)
    rows = {
        (labels[i], x.shape[0])
        for i, x in enumerate(batch)
        if i not in undivided and x.shape.rank and x.shape[0] is not None
    }
    if len({n for _, n in rows}) > 1:
        listing = ", ".join(f"{n} of `{label}`" for label, n in sorted(rows))
        raise ValueError(
            "Towers share the rows of a call's tensors, but these have "
            f"different rows: {listing}. Expected the same of all; name in "
            "`whole` what is no batch, so that every tower gets it as it is."
        )
    if not inside and not call.has_rows:
        raise ValueError(
            "A call of towers must have at least one tensor to share by rows; "
            f"got {args!r} and {kwargs!r}."
        )
    return call


def shared_call(
    inputs: Any,
    own: Sequence[Any] | None,
    arguments: Mapping[str, Any],
    whole: Sequence[Any],
    training: bool | None,
) -> tuple[ModelCall, Batch]:
    """What `build_towers` calls a model with, and the batch that towers get.

    Args:
      inputs: the first argument.
      own: None, or in the place of `inputs` those of each tower.
      arguments: further ones, by name.
      whole, training: as for `model_call`.

    Raises:
      ValueError: `arguments` are to be split, though towers have their rows; or
        as for `model_call`.
    """
    if own is not None:
        refuse_divided(arguments, whole)
    calls = [
        model_call([x], arguments, whole, None, training)
        for x in ([inputs] if own is None else own)
    ]
    return calls[0], calls[0].shared(own and [call.batch for call in calls])


def call_signature(model: keras.Model) -> inspect.Signature:
    """That of a model's `call`, and what else Keras takes of a call of it.

    That is a phase, of any model, and what the model has registered.
    """
    signature = inspect.signature(model.call)
    parameters = list(signature.parameters.values())
    others = ["training", *sorted(keras_layers.context_arguments(model))]
    more = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
        for name in others
        if name not in signature.parameters
    ]
    last = parameters[-1:]
    if last and last[0].kind is inspect.Parameter.VAR_KEYWORD:
        parameters[-1:] = [*more, *last]
    else:
        parameters += more
    return signature.replace(parameters=parameters)


def signed(
    function: Callable[..., Any], signature: inspect.Signature
) -> Callable[..., Any]:
    """The function, with a signature that it says it has."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    call.__signature__ = signature  # type: ignore[attr-defined]
    return call


def _phased(
    args: Sequence[Any], kwargs: Mapping[str, Any], names: Sequence[str]
) -> tuple[Sequence[Any], Mapping[str, Any], bool | None]:
    """Arguments without the phase that is among them, and the phase."""
    by_name = dict(kwargs)
    if "training" in names[: len(args)]:
        i = names.index("training")
        args, rest = args[:i], args[i:]
        by_name.update(zip(names[i:], rest))
    return args, by_name, by_name.pop("training", None)


def _names(signature: inspect.Signature | None) -> tuple[list[str], set[str]]:
    """Of the arguments that may come by position, and of all others."""
    if signature is None:
        return ["inputs"], set()
    parameters = signature.parameters.values()
    by_position = [
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
    ]
    names = [p.name for p in parameters if p.kind in by_position]
    by_name = inspect.Parameter.KEYWORD_ONLY
    return names, {p.name for p in parameters if p.kind is by_name}


def _tensors(nest: Any) -> bool:
    return any(
        isinstance(x, _TENSORS + _LIKE_TENSORS) for x in tf.nest.flatten(nest)
    )
