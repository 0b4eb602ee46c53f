"""tf_custom_gradients: what user code differentiates by itself, in a tower.

`tf.custom_gradient`, and `tf.recompute_grad` and `keras.remat` with it, asks
which *variables* its function reads, and a `GradientTape` watches those that
are read. In a tower a weight is a tensor, of which neither would hear. TensorFlow
has no public words to tell them: custom gradients all go through
`_graph_mode_decorator`, which listens by a `VariableWatcher` and looks for more by
`_get_dependent_variables`; and a tape knows by `_watch_accessed_variables` whether
it is to watch. `tf_custom_gradients_test.py` fails when one of them changes.
"""

import contextlib
import contextvars
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf
from tensorflow.python import pywrap_tfe
from tensorflow.python.ops import custom_gradient

from towers.foreign.patches import CountedPatches, bound

Function = Callable[..., Any]
Opens = Callable[[], contextlib.AbstractContextManager[None]]
_follower: contextvars.ContextVar["Follower | None"] = contextvars.ContextVar(
    "follower", default=None
)


class Follower:
    """What a tower does about the gradients that its code takes by itself.

    Args:
      copy_of: the tower's copy of a variable, or None.
      resumption: called when a custom gradient's function is about to run;
        returns what opens the tower again, as it is then, for its backward
        pass.
    """

    def __init__(
        self, copy_of: Callable[[Any], Any], resumption: Callable[[], Opens]
    ):
        self.copy_of = copy_of
        self.resumption = resumption
        self.inside = 0  # so many custom gradients' functions
        self.read: dict[int, tf.Tensor] = {}  # in the innermost one
        self.tapes: list[tf.GradientTape] = []
        self.is_opaque = (
            False  # whether one is a user's, who knows what it reads
        )

    @property
    def is_idle(self) -> bool:
        """Whether no gradient is taken here and now."""
        return not self.inside and not self.tapes

    def heard(self, copy: tf.Tensor) -> None:
        """Tells those who listen that a trainable variable's copy is read."""
        if self.inside:
            # To a watcher, a variable is what has these two.
            copy.handle = copy
            copy.trainable = True
            pywrap_tfe.TFE_Py_VariableWatcherVariableAccessed(copy)
            self.read[id(copy)] = copy
        for tape in self.tapes:
            tape.watch(copy)

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """While open, follows what the current thread differentiates."""
        with _FOLLOWED.opened(), bound(_follower, self):
            yield


def in_custom_gradient() -> bool:
    """Whether this is called by a custom gradient's function, in a tower."""
    follower = _follower.get()
    return follower is not None and follower.inside > 0


def _followed(
    function: Function, follower: Follower, kwargs: dict[str, Any]
) -> Function:
    """A custom gradient's function, whose backward pass finds the tower."""

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        module = getattr(function, "__module__", None) or ""
        if module.split(".")[0] not in ("tensorflow", "keras"):
            follower.is_opaque = True
        resumed = follower.resumption()
        around, follower.read = follower.read, {}
        follower.inside += 1
        try:
            result, gradient = function(*args, **kwargs)
        finally:
            follower.inside -= 1
            read, follower.read = follower.read, around
        # While something is computed to be computed again, no tape listens.
        for copy in read.values():
            follower.heard(copy)

        def backward(*upstream: Any, **variables: Any) -> Any:
            with resumed():
                return gradient(*upstream, **variables)

        # TensorFlow looks there for an argument `variables`.
        backward.__signature__ = inspect.signature(  # type: ignore[attr-defined]
            gradient, follow_wrapped=False
        )
        return result, backward

    return call


def _differentiable(nest: Any) -> bool:
    return any(
        tf.is_tensor(x) and x.dtype.is_floating for x in tf.nest.flatten(nest)
    )


def _patches() -> list[tuple[Any, str, Any]]:
    """What takes the place of what TensorFlow calls."""
    import keras  # here it is known to be Keras 3

    decorator = custom_gradient._graph_mode_decorator
    variables = custom_gradient._get_dependent_variables
    handle = keras.Variable.handle
    enter, leave = tf.GradientTape.__enter__, tf.GradientTape.__exit__

    def decorated(function: Function, args: Any, kwargs: Any) -> Any:
        follower = _follower.get()
        if follower is not None and not _differentiable(kwargs):
            # TensorFlow refuses `training=True`, as layers get it.
            function = _followed(function, follower, kwargs)
            kwargs = {}
        return decorator(function, args, kwargs)

    def dependent(*args: Any, **kwargs: Any) -> Any:
        """In a tower none, as what it reads are copies."""
        return [] if _follower.get() else variables(*args, **kwargs)

    def entered(tape: tf.GradientTape) -> Any:
        follower = _follower.get()
        if follower is not None and tape._watch_accessed_variables:
            follower.tapes.append(tape)
        return enter(tape)

    def left(tape: tf.GradientTape, *error: Any) -> Any:
        follower = _follower.get()
        if follower is not None and tape in follower.tapes:
            follower.tapes.remove(tape)
        return leave(tape, *error)

    def handle_of(variable: keras.Variable) -> Any:
        """What a tape takes gradients for, when it is given a variable."""
        follower = _follower.get()
        copy = follower.copy_of(variable) if follower else None
        return handle.fget(variable) if copy is None else copy

    return [
        (keras.Variable, "handle", property(handle_of)),
        (custom_gradient, "_graph_mode_decorator", decorated),
        (custom_gradient, "_get_dependent_variables", dependent),
        (tf.GradientTape, "__enter__", entered),
        (tf.GradientTape, "__exit__", left),
    ]


_FOLLOWED = CountedPatches(_patches)
