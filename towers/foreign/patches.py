"""patches: attributes, a context's variables and options, others for a while."""

import contextlib
import contextvars
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tensorflow as tf

_ABSENT = object()


@contextlib.contextmanager
def patched(*patches: tuple[Any, str, Any]) -> Iterator[None]:
    """While open, attributes have other values; then they are as they were.

    Of an instance it is the attribute of that instance alone, set past what its
    class does about attributes: Keras tracks them.

    Args:
      *patches: (owner, name, value); the owner is an instance, a class or a
        module.
    """
    before: list[tuple[Any, str, Any]] = []
    try:
        for owner, name, value in patches:
            before.append((owner, name, vars(owner).get(name, _ABSENT)))
            _setter(owner).__setattr__(owner, name, value)
        yield
    finally:
        for owner, name, value in reversed(before):
            if value is _ABSENT:
                _setter(owner).__delattr__(owner, name)
            else:
                _setter(owner).__setattr__(owner, name, value)


@contextlib.contextmanager
def bound(variable: contextvars.ContextVar[Any], value: Any) -> Iterator[None]:
    """While open, a variable of the current context has another value."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


@contextlib.contextmanager
def optimizing(**options: Any) -> Iterator[None]:
    """While open, TensorFlow's graph optimizer has other options.

    Where they were not set before, they are then false, or 0.
    """
    config = tf.config.optimizer
    settings = config.get_experimental_options()
    before = {x: settings.get(x, type(value)()) for x, value in options.items()}
    config.set_experimental_options(options)
    try:
        yield
    finally:
        config.set_experimental_options(before)


class CountedPatches:
    """Patches that may be open several times, in several threads.

    They are there once for all, from the first that opens them to the last.

    Args:
      patches: makes those that `patched` takes.
    """

    def __init__(self, patches: Callable[..., Sequence[tuple[Any, str, Any]]]):
        self._patches = patches
        self._lock = threading.Lock()
        self._stack = contextlib.ExitStack()
        self._open = 0

    @contextlib.contextmanager
    def opened(self, *args: Any) -> Iterator[None]:
        """While open, attributes are those of `patches(*args)`."""
        with self._lock:
            if not self._open:
                self._stack.enter_context(patched(*self._patches(*args)))
            self._open += 1
        try:
            yield
        finally:
            with self._lock:
                self._open -= 1
                if not self._open:
                    self._stack.close()


def _setter(owner: Any) -> Any:
    # Not `isinstance`, which asks proxies what they stand for.
    for kind in (type, types.ModuleType):
        if issubclass(type(owner), kind):
            return kind
    return object
