"""keras_numbers: what an optimizer counts and goes by, once on each device.

Each read of a variable is a tensor of its own. So the step, the learning rate or
the scale of a loss would cross by itself for every variable that is updated
elsewhere. While numbers are known, each is read once, beside its variable, and
all of them cross to a device in one tensor.

Keras has no public word for its internals that this file touches: `_iterations`,
`_learning_rate` and `_get_current_learning_rate`; nor has TensorFlow for
`_cached_value`, what a variable is read as. `keras_numbers_test.py` fails when one
of them changes.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from towers.foreign.keras_layers import device_of, raw
from towers.foreign.patches import patched

_KNOWN = "_towers_numbers"


def held_optimizers(optimizer: Any) -> list[Any]:
    """An optimizer, and those inside a LossScaleOptimizer or MultiOptimizer."""
    inner = getattr(optimizer, "inner_optimizer", None)
    held = [inner] if inner is not None else []
    held += getattr(optimizer, "optimizers", [])
    return [optimizer, *(x for one in held for x in held_optimizers(one))]


class Numbers:
    """Scalars that optimizers go by, and their copies on other devices."""

    def __init__(self, numbers: Sequence["_Number"]):
        self._numbers = list(numbers)

    def add(self, value: tf.Tensor, home: str) -> Callable[[], tf.Tensor]:
        """One more; the function tells what it is where numbers are read."""
        number = _Number(value, home)
        self._numbers.append(number)
        return lambda: number.now

    def send(self, devices: Iterable[str]) -> None:
        """Sends what has not been sent to some devices, in one tensor to each.

        Args:
          devices: in full, as variables say them.
        """
        for home in dict.fromkeys(number.home for number in self._numbers):
            for device in devices:
                new = [
                    number
                    for number in self._numbers
                    if number.home == home and device not in number.copies
                ]
                if device == home or len(new) < 2:
                    continue
                with tf.device(home):
                    parcel = tf.concat([_bits(n.value) for n in new], 0)
                with tf.device(device):
                    parts = tf.split(parcel, [_size(n.value) for n in new])
                    for number, part in zip(new, parts):
                        number.copies[device] = _of_bits(part, number.value)

    def here(self, rate: Any) -> Any:
        """What a schedule has told, as it is known where numbers are read now."""
        for number in self._numbers:
            if number.value is rate:
                return number.now
        return rate

    @contextlib.contextmanager
    def at(self, device: str) -> Iterator[None]:
        """While open, numbers are read as their copies on a device.

        But those that were assigned to since they were read, and what is
        assigned to now, are read as they are.
        """
        taken = [
            number
            for number in self._numbers
            if device in number.copies and number.now is number.value
        ]
        for number in taken:
            number.now = number.copies[device]
        try:
            yield
        finally:
            for number in taken:
                if number.now is number.copies[device]:
                    number.now = number.value


@contextlib.contextmanager
def numbers_known(optimizer: Any) -> Iterator[Numbers]:
    """While open, an optimizer's numbers are read once.

    Args:
      optimizer: that, or what holds it, may have its numbers known already.
    """
    all_numbers = getattr(optimizer, _KNOWN, None)
    if all_numbers is not None or tf.executing_eagerly():
        yield all_numbers or Numbers([])
        return
    with contextlib.ExitStack() as stack:
        held = held_optimizers(optimizer)
        numbers: list[_Number] = []
        for one in held:
            for variable in _scalars(one):
                if all(variable is not number.variable for number in numbers):
                    numbers.append(stack.enter_context(_read_once(variable)))
        for one in held:
            rate = one._learning_rate
            if callable(rate) and not isinstance(rate, keras.Variable):
                with tf.device(device_of(one._iterations)):
                    numbers += stack.enter_context(_asked_once(one))
        all_numbers = Numbers(numbers)
        for one in held:
            stack.enter_context(patched((one, _KNOWN, all_numbers)))
        yield all_numbers


class _Number:
    """A scalar, as it was read at home.

    Attributes:
      variable: what it is read from, or None.
      value: what was read.
      home: the device.
      copies: by device.
    """

    def __init__(self, value: tf.Tensor, home: str, variable: Any = None):
        self.variable, self.value, self.home = variable, value, home
        self.copies: dict[str, tf.Tensor] = {}
        self._now = value

    @property
    def now(self) -> tf.Tensor | None:
        """What it is read as; None: anew each time."""
        if self.variable is None:
            return self._now
        return self.variable._cached_value

    @now.setter
    def now(self, value: tf.Tensor) -> None:
        if self.variable is None:
            self._now = value
        else:
            self.variable._cached_value = value


def _scalars(optimizer: Any) -> list[tf.Variable]:
    """The numbers of an optimizer, which has lists of what is each variable's.

    One that holds others counts for itself, and has a rate that nobody asks for.
    """
    own = dict(vars(optimizer))
    if len(held_optimizers(optimizer)) > 1:
        del own["_iterations"], own["_learning_rate"]
    scalars = [
        raw(variable)
        for variable in own.values()
        if isinstance(variable, keras.Variable) and variable.shape == ()
    ]
    return [variable for variable in scalars if _size(variable)]


@contextlib.contextmanager
def _read_once(variable: tf.Variable) -> Iterator[_Number]:
    """While open, reads of a variable are one tensor, until it is assigned to."""
    graph, home = tf.compat.v1.get_default_graph(), device_of(variable)

    def read() -> None:
        with tf.device(home):
            variable._cached_value = variable.read_value()

    def anew(assign: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(assign)
        def assigned(*args: Any, **kwargs: Any) -> Any:
            variable._cached_value = None
            result = assign(*args, **kwargs)
            if tf.compat.v1.get_default_graph() is graph:
                read()
            return result

        return assigned

    names = ("assign", "assign_add", "assign_sub")
    shadows = [
        (variable, name, anew(getattr(variable, name))) for name in names
    ]
    with patched((variable, "_cached_value", None), *shadows):
        read()
        yield _Number(variable._cached_value, home, variable)


@contextlib.contextmanager
def _asked_once(optimizer: Any) -> Iterator[list[_Number]]:
    """While open, a schedule, or a function that tells the rate, is asked once."""
    rate = optimizer._get_current_learning_rate()
    if not isinstance(rate, tf.Tensor) or rate.shape != ():
        yield []
        return
    number = _Number(rate, device_of(optimizer._iterations))
    with patched((optimizer, "_get_current_learning_rate", lambda: number.now)):
        yield [number]


def _size(value: Any) -> int:
    """How many float32 have the bits of a scalar; 0 if none."""
    dtype = value.dtype
    if dtype.is_floating or dtype.is_integer or dtype.is_bool:
        return max(dtype.size // 4, 1)
    return 0


def _bits(value: tf.Tensor) -> tf.Tensor:
    """A scalar of any number's dtype, as float32 with its bits."""
    if value.dtype.size < 4:  # exact
        value = tf.cast(value, tf.float32)
    return tf.reshape(tf.bitcast(value, tf.float32), [-1])


def _of_bits(bits: tf.Tensor, like: tf.Tensor) -> tf.Tensor:
    if like.dtype.size < 4:
        return tf.cast(tf.reshape(bits, []), like.dtype)
    shape = [] if like.dtype.size == 4 else [2]
    return tf.bitcast(tf.reshape(bits, shape), like.dtype)
