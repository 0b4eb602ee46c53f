"""tf_autograph: what it converts of a program with towers: the user's part.

A `tf.function` of the user's converts all that it calls, libraries too, which
takes longer than building the towers. What is marked here stays as it is, and
what the user hands over, a `tower_fn`, is converted where the user asks for
that, as in a plain `tf.function`.

`do_not_convert` would also switch conversion off for what is called inside, the
user's functions too, and nothing public tells whether a caller is converted. So
this file takes the mark that it leaves, the words that TensorFlow keeps for
Keras, `tf.__internal__.autograph`, and what a `tf.function` was told, `_autograph`.
`tf_autograph_test.py` fails when one changes.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import tensorflow as tf


def keep_as_they_are(members: Iterable[Any], package: str) -> None:
    """Marks functions, and the methods of classes, as not to be converted.

    Args:
      members: functions and classes; anything else is left alone.
      package: methods are marked of classes that are from there.
    """
    mark = dict(vars(tf.autograph.experimental.do_not_convert(lambda: None)))
    mark.pop("__wrapped__", None)
    for function in _functions(members, package):
        vars(function).update(mark)


def _functions(members: Iterable[Any], package: str) -> Iterator[Any]:
    for member in members:
        if inspect.isfunction(member):
            yield member
        if not inspect.isclass(member):
            continue
        for base in member.__mro__:
            if base.__module__.split(".")[0] != package:
                continue
            for value in vars(base).values():
                value = getattr(value, "__func__", value)  # of a class method
                if inspect.isfunction(value):
                    yield value


def status() -> Any:
    """Whether callers are converted; as a context, says so in a thread."""
    return tf.__internal__.autograph.control_status_ctx()


def is_on(function: Any) -> bool:
    """Whether a `tf.function` converts what it calls."""
    return function._autograph


def converted(function: Callable[..., Any] | None) -> Any:
    """A function of the user's, converted if the user's caller is."""
    if function is None or status().status.name != "ENABLED":
        return function
    return tf.__internal__.autograph.tf_convert(function, status())
