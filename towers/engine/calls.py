"""calls: a tower's forward pass, and its backward pass, as functions of their own.

A function is called under the tower's device, and its gradient is a call like it,
which takes what the forward pass has kept. Either way of calling is the call's
own: XLA compiles for one device, so it gets no step, but what one tower computes;
and what TensorFlow does not rewrite before the first step need not be all of it.
"""

import contextlib
import enum
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from towers.engine import boundary
from towers.engine.unoptimized import unoptimized
from towers.foreign import tf_nodes
from towers.foreign.tf_gradients import unrecorded

_LOOPS = ("While", "StatelessWhile")


class How(enum.Enum):
    """How towers are built: op by op into the step, or called in it."""

    BUILT = enum.auto()
    COMPILED = enum.auto()  # by XLA
    AS_IS = enum.auto()  # not rewritten first

    @property
    def options(self) -> dict[str, Any]:
        """Those of the `tf.function`."""
        if self is How.COMPILED:
            return {"jit_compile": True}
        # Inlined, it would be rewritten with all the rest.
        return {"experimental_attributes": {tf_nodes.NOT_INLINED: True}}

    def opened(self) -> Any:
        """The context in which the towers' function is called."""
        here = self is How.AS_IS
        return unoptimized() if here else contextlib.nullcontext()


def made_called(
    how: How, scope: str, function: Callable[..., Any], argument: Any
) -> tuple[Any, Any]:
    """`function(argument)`, and the function that gives its gradients.

    Args:
      how: compiled, or as it is.
      scope: the tower's name scope, for the call.
      function: builds the tower.
      argument: a nest of tensors on its device.
    """
    tensors = boundary.tensors_of(argument)
    if how is How.COMPILED:
        _check_dtypes(tensors)
    nests: list[Any] = []

    def tower(*given: tf.Tensor) -> list[tf.Tensor]:
        inside = iter(given)
        result = function(
            tf.nest.map_structure(
                lambda x: None if x is None else next(inside),
                argument,
                expand_composites=True,
            )
        )
        nests.append(result)
        return boundary.tensors_of(result)

    specs = [tf.TensorSpec(x.shape, x.dtype) for x in tensors]
    traced = tf.function(
        tower, autograph=False, **how.options
    ).get_concrete_function(*specs)
    with unrecorded(), tf.name_scope(scope), how.opened():
        results = iter(traced(*tensors))

    def outside(x: tf.Tensor) -> Any:
        result = next(results)
        stops = x.dtype.is_floating and not boundary.has_gradient(x)
        return tf.stop_gradient(result) if stops else result

    loops = [
        op.name for op in traced.graph.get_operations() if op.type in _LOOPS
    ]

    def differentiate(
        results: Sequence[tf.Tensor],
        tensors: Sequence[tf.Tensor],
        upstream: Sequence[Any],
    ) -> list[Any]:
        if loops and how is How.COMPILED:
            raise ValueError(
                f"`jit_compile=True` cannot train the loop {loops[0]!r}: what "
                "a loop keeps for its gradient cannot leave an XLA program. "
                "Expected no recurrent layers, or such with unroll=True; or "
                "leave out jit_compile=True."
            )
        with how.opened():
            return boundary.differentiated(results, tensors, upstream)

    result = tf.nest.map_structure(
        lambda x: None if x is None else outside(x),
        nests[-1],
        expand_composites=True,
    )
    return result, differentiate


def _check_dtypes(tensors: Sequence[tf.Tensor]) -> None:
    """Raises if a tower is given what XLA has no numbers for."""
    for x in tensors:
        if x.dtype in (tf.string, tf.variant, tf.resource):
            raise ValueError(
                f"`jit_compile=True` compiles a tower by XLA, which takes "
                f"numbers only, but an input is of dtype {x.dtype.name}. "
                "Expected the model to be called with numbers; look words up "
                "before, or leave out jit_compile=True."
            )
