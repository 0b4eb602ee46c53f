"""keras_self: what the methods of a template's class have as `self`.

They were written for one model, which is two now: what Keras's trainer says and
does is the wrapper's, all else is the template's. Keras has no public word for the
class behind `keras.Model(inputs, outputs)`, `Functional`, nor for what `compile`
leaves in a model, `_OF_COMPILE`, nor TensorFlow for what its checkpoints leave
there, `_self_*`. `keras_self_test.py` fails when one changes.
"""

import contextlib
import functools
import inspect
from collections.abc import Iterator
from typing import Any

import keras
from keras.src.models import Functional

from towers.foreign.patches import patched

_OF_COMPILE = (
    "_compile_config",
    "_compile_loss",
    "_compile_metrics",
    "_compiled_trainable_state",
    "_jit_compile",
    "_loss_tracker",
    "_run_eagerly",
    "compiled",
    "loss",
    "optimizer",
    "steps_per_execution",
    "stop_training",
)
# What else Keras keeps in a model that it trains.
_OF_TRAINING = (
    "_distribute_reduction_method",
    "_distributed_dataset",
    "_eval_epoch_iterator",
    "history",
    "loss_weights",
    "stop_evaluating",
    "stop_predicting",
)
_ABSENT = object()


class TemplateSelf:
    """A template, as its methods see it, compiled and called in towers.

    Methods and properties of its class are bound to this again. Nothing of it
    is among its attributes, so that no name of yours meets one of ours.
    """

    __slots__ = ("__weakref__", "_of_towers")

    def __init__(self, model: Any):
        object.__setattr__(self, "_of_towers", model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _wrapper(self)(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        model = _wrapper(self)
        if _is_model_s(model, name):
            return getattr(model, name)
        own = own_attribute(model.template, name)
        if own is not _ABSENT:
            return model.bound(own)
        try:
            return getattr(model.template, name)
        except AttributeError:
            return getattr(model, name)

    def __setattr__(self, name: str, value: Any) -> None:
        model = _wrapper(self)
        own = _of_class(type(model.template), name)
        if hasattr(own, "__set__"):
            own.__set__(self, value)
        else:
            setattr(_owner(model, name), name, value)

    def __delattr__(self, name: str) -> None:
        model = _wrapper(self)
        delattr(_owner(model, name), name)

    @property
    def __class__(self) -> type:  # type: ignore[override]
        return type(_wrapper(self).template)

    @property
    def __dict__(self) -> dict[str, Any]:  # type: ignore[override]
        return vars(_wrapper(self).template)

    def __dir__(self) -> list[str]:
        return dir(_wrapper(self).template)

    def __repr__(self) -> str:
        return repr(_wrapper(self))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return _wrapper(self).__deepcopy__(memo)

    def __reduce__(self) -> Any:
        return _wrapper(self).__reduce__()


def _wrapper(view: TemplateSelf) -> Any:
    return object.__getattribute__(view, "_of_towers")


def _owner(model: Any, name: str) -> Any:
    """The wrapper or its template: who gets an attribute of that name."""
    keras_s = hasattr(keras.Model, name) or is_kept_by_keras(name)
    return model if keras_s else model.template


def _is_model_s(model: Any, name: str) -> bool:
    """Whether a name is one of Keras's that the wrapper answers to."""
    if is_kept_by_keras(name):
        return True
    of_keras = inspect.getattr_static(keras.Model, name, _ABSENT)
    if of_keras is _ABSENT:
        return False
    answered = inspect.getattr_static(type(model), name) is not of_keras
    return answered or _of_class(type(model.template), name) is _ABSENT


def is_kept_by_keras(name: str) -> bool:
    """Whether Keras, or TensorFlow's checkpoints, keep something under a name."""
    return name in _kept_by_keras() or name.startswith("_self_")


@functools.cache
def _kept_by_keras() -> frozenset[str]:
    return frozenset([*vars(keras.Model()), *_OF_COMPILE, *_OF_TRAINING])


def is_own(kind: type) -> bool:
    """Whether a model's class is none of Keras's."""
    return kind not in (keras.Model, keras.Sequential, Functional)


def _of_class(kind: type, name: str) -> Any:
    """The attribute of a name in the user's classes, not those of Keras."""
    of_keras = {*keras.Sequential.__mro__, *Functional.__mro__}
    for base in kind.__mro__:
        if name in vars(base):
            return _ABSENT if base in of_keras else vars(base)[name]
    return _ABSENT


def own_attribute(template: keras.Model, name: str) -> Any:
    """A method or property, unbound, of the user's class, if it has such."""
    own = _of_class(type(template), name)
    mine = name not in vars(template) or hasattr(own, "__set__")
    return own if mine and hasattr(own, "__get__") else _ABSENT


def plain_values(template: keras.Model) -> dict[str, Any]:
    """Attributes of the user's that a graph has as constants."""
    return {
        name: value
        for name, value in vars(template).items()
        if isinstance(value, (bool, int, float, str))
        and not is_kept_by_keras(name)
    }


def is_absent(attribute: Any) -> bool:
    return attribute is _ABSENT


@contextlib.contextmanager
def compiled_as(model: Any) -> Iterator[None]:
    """While open, a template of the user's class is compiled as its wrapper.

    What a function that holds the template sees, or a tower that calls it.
    """
    template = model.template
    if not model.compiled or not is_own(type(template)):
        yield
        return
    lent = {x: vars(model)[x] for x in _OF_COMPILE if x in vars(model)}
    kept = model, "_is_lent", model._is_lent
    with patched(kept, *[(template, name, x) for name, x in lent.items()]):
        yield
        after = {name: vars(template)[name] for name in lent}
    for name, value in after.items():
        if value is not lent[name]:
            setattr(model, name, value)
