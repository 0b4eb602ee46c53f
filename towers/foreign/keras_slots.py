"""keras_slots: what an optimizer keeps of variables that are cut.

Keras has no public word for its internals that this file touches: `_variables`,
`_trainable_variables`, `_trainable_variables_indices`, `_tracker`, `_var_key` and
`_exclude_from_weight_decay`, nor TensorFlow for what its checkpoints find below an
object (`_trackable_children`) or Keras for a scope in which attributes are not tracked
(`DotNotTrackScope`). `keras_slots_test.py` fails when one of them changes.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras.src.utils.tracking import DotNotTrackScope

from towers.foreign.keras_numbers import held_optimizers
from towers.foreign.keras_optimizer import optimizer_variables
from towers.foreign.keras_tracking import like
from towers.foreign.keras_updates import trained

# Those of Keras's that look at a variable as a whole.
_OF_WHOLE = ("Adafactor", "Lamb", "Muon")


def check_by_piece(optimizer: Any) -> None:
    """Raises unless an optimizer treats each number by itself.

    Raises:
      ValueError: it looks at whole variables.
    """
    for one in held_optimizers(optimizer):
        name = type(one).__name__
        why = f"{name} looks at whole variables"
        if getattr(one, "clipnorm", None):
            why = "`clipnorm` is of the norm of each variable"
        elif not any(
            isinstance(one, getattr(keras.optimizers, kind, ()))
            for kind in _OF_WHOLE
        ):
            continue
        raise ValueError(
            f"The optimizer {one.name!r} cannot train a layer in pieces: {why}, "
            "and would see each piece alone. Expected SGD, Adam, AdamW, Nadam, "
            "RMSprop, Adagrad, Adadelta, Adamax, Ftrl or Lion, with "
            "`global_clipnorm` or `clipvalue` if it is to clip."
        )


def replace_trained(
    optimizer: Any,
    old: Sequence[Any],
    new: Sequence[Any],
    join: Callable[[Sequence[np.ndarray]], np.ndarray],
    cut: Callable[[np.ndarray], Sequence[np.ndarray]],
) -> None:
    """Has an optimizer train variables in the place of others, slots and all.

    Args:
      optimizer: built or not.
      old, new: variables, which are as one.
      join: of values of the old ones, that one.
      cut: of that one, values of the new ones.
    """
    for one in held_optimizers(optimizer):
        variables = trained(one)
        places = [i for i, v in enumerate(variables) if v is old[0]]
        if places:
            _replace(one, places[0], old, new, lambda x: cut(join(x)))


def _replace(
    optimizer: Any,
    place: int,
    old: Sequence[Any],
    new: Sequence[Any],
    recut: Callable[[Sequence[np.ndarray]], Sequence[np.ndarray]],
) -> None:
    variables, end = trained(optimizer), place + len(old)
    instead: dict[int, list[Any]] = {}  # by the old slot
    lists = {
        name: slots
        for name, slots in vars(optimizer).items()
        if isinstance(slots, list)
        and len(slots) == len(variables)
        and name not in ("_variables", "_trainable_variables")
        and all(x is None or isinstance(x, keras.Variable) for x in slots)
    }
    with DotNotTrackScope():
        for name, slots in lists.items():
            before, after = list(slots[place:end]), [None] * len(new)
            if before[0] is not None:
                values = recut([slot.numpy() for slot in before])
                after = [
                    like(slot, x, v.value.device, _path(slot, old[0], v))
                    for slot, x, v in zip(before[:1] * len(new), values, new)
                ]
                instead.update((id(slot), []) for slot in before)
                instead[id(before[0])] = after
            setattr(optimizer, name, [*slots[:place], *after, *slots[end:]])
        now = [*variables[:place], *new, *variables[end:]]
        optimizer._trainable_variables = now
        key = optimizer._var_key
        optimizer._trainable_variables_indices = {
            key(v): i for i, v in enumerate(now)
        }
        excluded: set[Any] = getattr(
            optimizer, "_exclude_from_weight_decay", set()
        )
        if key(old[0]) in excluded:
            excluded.update(map(key, new))
        optimizer._variables = [
            slot
            for before in optimizer._variables
            for slot in instead.get(id(before), [before])
        ]
    config, ids = optimizer._tracker.config, optimizer._tracker.stored_ids
    config["variables"] = config["variables"][0], optimizer._variables
    ids["variables"] = {id(v) for v in optimizer._variables}


def _path(slot: Any, old: Any, new: Any) -> str:
    """A slot's path, in which Keras has that of its variable."""
    before, after = (v.path.replace("/", "_") for v in (old, new))
    return slot.path.replace(before, after, 1)


def save_as_one(
    optimizer: Any,
    cut: Callable[[], Sequence[Any]],
    joined: Callable[..., Any],
) -> None:
    """Has an optimizer save and load slots of pieces as those of one variable.

    Args:
      optimizer: any.
      cut: gives what is in pieces now.
      joined: makes of slots, an axis, a name and a path what stands for them.
    """
    for one in held_optimizers(optimizer):
        whole = _Whole(one, cut, joined)
        for name, method in (
            ("save_own_variables", whole.save),
            ("load_own_variables", whole.load),
            ("_trackable_children", whole.children),
        ):
            object.__setattr__(one, name, method)


class _Whole:
    """An optimizer as it is in files: that of the plain model.

    Args:
      optimizer, cut, joined: as for `save_as_one`.
    """

    def __init__(self, optimizer: Any, cut: Any, joined: Any):
        self._optimizer, self._cut, self._joined = optimizer, cut, joined
        # TensorFlow asks again for the same.
        self._stand_ins: dict[Any, Any] = {}

    def save(self, store: Any) -> None:
        for i, variable in enumerate(self._whole(self._optimizer.variables)):
            store[str(i)] = variable.numpy()

    def load(self, store: Any) -> None:
        variables = self._whole(self._optimizer.variables)
        if len(store.keys()) != len(variables):
            kind = type(self._optimizer)
            kind.load_own_variables(self._optimizer, store)  # which says so
            return
        for i, variable in enumerate(variables):
            variable.assign(store[str(i)])

    def children(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """What TensorFlow's checkpoints find below the optimizer."""
        kind = type(self._optimizer)
        children = kind._trackable_children(self._optimizer, *args, **kwargs)
        return {
            name: self._list(child) if isinstance(child, list) else child
            for name, child in children.items()
        }

    def _list(self, child: list[Any]) -> Any:
        whole = self._whole(child)
        if len(whole) == len(child):
            return child
        return self._kept(whole, lambda: tf.__internal__.tracking.wrap(whole))

    def _kept(self, of: Sequence[Any], make: Callable[[], Any]) -> Any:
        key = tuple(map(id, of))
        if key not in self._stand_ins:
            self._stand_ins[key] = make()
        return self._stand_ins[key]

    def _whole(self, variables: Sequence[Any]) -> list[Any]:
        """Variables, with what stands for them in the place of cut ones."""
        stands = self._stands()
        each = [stands.get(id(v), v) for v in variables]
        return list({id(x): x for x in each}.values())

    def _stands(self) -> dict[int, Any]:
        """By the id of each piece, and each slot of one, what stands for it."""
        optimizer, cut = self._optimizer, self._cut()
        stands = {id(piece): one for one in cut for piece in one.pieces}
        owners = {id(slot): v for slot, v in optimizer_variables(optimizer)}
        slots: dict[int, list[Any]] = {}  # of each piece, in their order
        for variable in optimizer.variables:
            owner = owners.get(id(variable))
            if id(owner) in stands:
                slots.setdefault(id(owner), []).append(variable)
        for one in cut:
            for own in zip(*(slots.get(id(p), ()) for p in one.pieces)):
                make = functools.partial(
                    *(self._joined, own, one.axis, own[0].name, own[0].path)
                )
                stand = self._kept(own, make)
                stands.update((id(slot), stand) for slot in own)
        return stands
