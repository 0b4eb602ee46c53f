"""all_towers: what a layer asks of all towers, whoever answers.

Beside a tower there may be others, which meet (`meeting`), none, or some that
do not wait for it.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf

from towers.engine import errand
from towers.foreign.patches import bound

_BY_ITSELF = object()  # a tower that no other waits for
current: contextvars.ContextVar[Any] = contextvars.ContextVar(
    "tower", default=None
)
_meanwhile: contextvars.ContextVar[Callable[[], Any]] = contextvars.ContextVar(
    "meanwhile", default=contextlib.nullcontext
)


@contextlib.contextmanager
def waiting(opened: Callable[[], Any]) -> Iterator[None]:
    """While open, a tower that waits for others opens a context for them."""
    with bound(_meanwhile, opened):
        yield


def meanwhile() -> Any:
    """The context in which other towers are built."""
    return _meanwhile.get()()


def all_towers(
    function: Callable[..., Any],
    *values: Any,
    split: bool = False,
    shared: Any = None,
) -> Any:
    """`function(*values)` of all rows of the batch, inside a tower.

    For layers that look at more than their rows. A layer that calls it in its
    `call` says so with the attribute `needs_all_towers = True`, and a
    `tower_fn` likewise. The parts of all towers are joined on the output
    device, where the function runs once, and its results go to each tower;
    gradients go the same ways back. Outside of towers this is just
    `function(*values)`.

    Besides its values the function may take what is the same in all towers:
    weights, constants, what is computed of those only, and whole results of
    all_towers. It may close over that (`self.kernel`, also a layer that it
    calls) or be given it as `shared`; gradients reach it. What depends on the
    tower's rows would be that of one tower for all, and is refused by name: it
    belongs among the values. So does a number of rows, which Python counts as
    a mere number: count them inside, as in `tf.shape(x)[0]`.

    >>> class Centered(keras.layers.Layer):
    ...     needs_all_towers = True
    ...     def call(self, x):
    ...         return x - towers.all_towers(lambda x: tf.reduce_mean(x, 0), x)
    >>> model = keras.Sequential([keras.Input([1]), Centered()])
    >>> placement = towers.Placement(["/CPU:0", "/CPU:1"])
    >>> graph = towers.build_towers(model, tf.constant([[1.0], [2.0], [6.0]]),
    ...                             placement)
    >>> graph.outputs.numpy().tolist()
    [[-2.0], [-1.0], [3.0]]

    Args:
      function: of the values of all towers, to a nest of tensors.
      *values: nests of dense tensors, [this tower's rows, ...] each, which are
        joined to [all rows, ...]. An empty tower's part is left out.
      split: False gives each tower the whole results; True deals out results
        of shape [all rows, ...], so that each tower gets those of its rows.
      shared: a nest of what is the same in all towers, which is not joined:
        the function's last argument, or that of the name `shared` if it has
        one. None is none.

    Returns:
      What the function returned.

    Raises:
      ValueError: the towers do not all make the same calls, a value is a
        scalar, the call is in a loop or a `tf.cond`, where no other tower is,
        or the function takes what depends on a tower's rows.
      RuntimeError: nothing has said `needs_all_towers`; or a tower
        differentiates the result by itself, inside a `tower_fn`.
    """
    return asked(function, values, split, shared)


def asked(
    function: Callable[..., Any],
    values: tuple[Any, ...],
    split: bool = False,
    shared: Any = None,
    pure: bool = False,
    asker: str = "all_towers",
) -> Any:
    """As `all_towers`; with `pure`, for functions of their values only.

    Errors name the `asker`.
    """
    tower = current.get()
    if tower is None:
        return errand.users_result(function, values, shared)
    if tower is _BY_ITSELF:
        raise RuntimeError(
            "all_towers was called in a tower that runs by itself. Expected "
            "the attribute `needs_all_towers = True` on the layer that calls "
            "it, or on the `tower_fn`, so that towers are built in step."
        )
    return tower.ask(function, values, split, shared, pure, asker)


class NeedsOthers(BaseException):
    """Ends a tower that is built by itself, as it is to be built in step.

    It passes what a layer catches, and Keras.

    Args:
      name: who asks.
      does: what that does for which it needs them, as in "makes ...".
      instead: what does without.
    """

    def __init__(self, name: str, does: str, instead: str):
        super().__init__(name, does, instead)
        self.name, self.does, self.instead = name, does, instead


def met(
    function: Callable[..., Any],
    values: tuple[Any, ...],
    name: str,
    does: str,
    instead: str,
) -> Any:
    """As `asked`, with `pure`, though nobody has said that towers meet.

    Raises:
      NeedsOthers: they do not. Has the last three arguments.
    """
    if current.get() is _BY_ITSELF:
        raise NeedsOthers(name, does, instead)
    asker = f"{name!r}, which {does},"
    return asked(function, values, pure=True, asker=asker)


def is_one_of_many() -> bool:
    """Whether what is built here is one of several towers."""
    return current.get() is not None


class _Only:
    """A tower beside which there is no other."""

    def __init__(self) -> None:
        self.shared: list[tf.Tensor] = []
        self.dealt: list[tf.Tensor] = []

    def ask(
        self,
        function: Callable[..., Any],
        values: tuple[Any, ...],
        split: bool,
        shared: Any,
        pure: bool,
        asker: str,
    ) -> Any:
        result = errand.users_result(function, values, shared)
        answer = tf.nest.map_structure(tf.convert_to_tensor, result)
        whose = self.dealt if split else self.shared
        whose += tf.nest.flatten(answer)
        return answer


def shared() -> list[tf.Tensor]:
    """What `all_towers` has given to this tower as to all others."""
    return list(getattr(current.get(), "shared", ()))


def dealt() -> list[tf.Tensor]:
    """What `all_towers` has given to this tower for its rows."""
    return list(getattr(current.get(), "dealt", ()))


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """While open, `all_towers` computes of one tower, and notes what."""
    with bound(current, _Only()):
        yield


@contextlib.contextmanager
def by_themselves() -> Iterator[None]:
    """While open, towers are built that do not wait for each other."""
    with bound(current, _BY_ITSELF):
        yield
