"""forward: each tower on its own device, there and back."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tensorflow as tf

from towers import alike, ends, in_step, meeting
from towers.own_gradient import own_gradient, recorded


def run_towers(
    functions: Sequence[Callable[..., Any]],
    devices: Sequence[str],
    arguments: Sequence[Any],
    elsewhere: Mapping[int, str] | None = None,
    join: in_step.Join | None = None,
    scopes: Sequence[str] = (),
) -> list[Any]:
    """Runs `functions[i](arguments[i])` on `devices[i]`, backward included.

    The backward ops of a plain tape carry no device and end on the default
    one. Here each tower is a custom gradient that differentiates itself with
    `tf.gradients`, colocated, under its own device.

    Args:
      functions: one per tower, pure, from a nest of tensors to a nest.
      devices: one device name per tower.
      arguments: one nest of tensors per tower.
      elsewhere: the devices of those tensors, by their place in the flat
        nest, that are not taken to the tower.
      join: answers the towers' calls of `all_towers`, if they make any.
      scopes: the towers' name scopes, if the functions are all the same: then
        towers after the second may be copies.

    Returns:
      One nest of tensors per tower.
    """
    elsewhere = elsewhere or {}
    if len(functions) == 1:
        return [pinned(functions[0], devices[0], arguments[0], elsewhere)]
    if join is not None:
        return in_step.run_in_step(
            functions, devices, arguments, elsewhere, join
        )
    makers = alike.Maker(), alike.Maker()
    with meeting.by_themselves():
        return [
            pinned(
                functions[i],
                devices[i],
                arguments[i],
                elsewhere,
                functools.partial(_made_alike, makers, scopes[i])
                if scopes
                else _made,
            )
            for i in range(len(functions))
        ]


def pinned(
    function: Callable[..., Any],
    device: str,
    argument: Any,
    elsewhere: Mapping[int, str],
    make: Callable[..., Any] | None = None,
) -> Any:
    """`function(argument)`, forward and backward on `device`, in a graph."""
    tensors = ends.distinct(ends.leaves(argument))
    made: list[Any] = []

    @own_gradient
    def run(*tensors: tf.Tensor) -> Any:
        graph = tf.compat.v1.get_default_graph()
        before = len(graph.get_operations())
        taken = ends.taken(argument, tensors, device, elsewhere)
        result, differentiate = (make or _made)(function, taken)
        made.append(result)
        lost = ends.lost(graph.get_operations()[before:], tensors)
        # What has no gradient need not be asked for one, with zeros.
        results = [x for x in ends.leaves(result) if ends.has_gradient(x)]

        def backward(*upstream: Any, variables: Any = ()) -> list[Any]:
            ends.check_nothing_lost(variables, lost)
            with tf.device(device):
                return differentiate(results, tensors, upstream)

        return results, backward

    with tf.device(device):
        results = iter(run(*tensors))
    return ends.replaced(made[0], results)


def _made(function: Callable[..., Any], taken: Any) -> tuple[Any, Any]:
    """What the function makes, and what makes its gradients."""
    return function(taken), ends.gradients


def _made_alike(
    makers: tuple[alike.Maker, alike.Maker],
    scope: str,
    function: Callable[..., Any],
    taken: Any,
) -> tuple[Any, Any]:
    """As `_made`; both may be copied from other towers.

    Args:
      makers: one for the forward passes of all towers, one for the backward.
      scope: the tower's name scope.
      function: builds the tower.
      taken: what of, on its device.
    """
    given = ends.leaves(taken)
    device, graph = given[0].device, given[0].graph  # the device in full
    # A sparse tensor knows its rows, which no tensor that it is made of shows.
    known = tuple(
        str(tf.type_spec_from_value(x))
        for x in tf.nest.flatten(taken)
        if not (x is None or isinstance(x, tf.Tensor))
    )
    forth = makers[0].make(lambda: function(taken), given, device, scope, known)

    def differentiate(
        results: Sequence[tf.Tensor],
        tensors: Sequence[tf.Tensor],
        upstream: Sequence[Any],
    ) -> Any:
        def gradients() -> Any:
            return ends.gradients(results, tensors, upstream)

        above = ends.leaves(upstream)
        if recorded():
            # For a gradient of gradients: no tape saw a copy being made.
            return (
                _again(gradients, [*tensors, *above])
                if forth.copied
                else gradients()
            )
        if tf.compat.v1.get_default_graph() is not graph:
            return gradients()
        seen = [x for op in forth.ops for x in op.outputs]
        names = [x.name for x in above]
        kind = (
            known,
            makers[0].looks(forth),
            *(type(g).__name__ for g in upstream),
            *(names.index(name) for name in names),  # one may be there twice
        )
        back = makers[1].make(
            gradients,
            [*seen, *given, *tensors, *above],
            device,
            scope,
            kind,
            sure=makers[0].shared(forth),
        )
        return back.results

    return forth.results, differentiate


def _again(
    gradients: Callable[[], Any], tensors: Sequence[tf.Tensor]
) -> list[Any]:
    """Gradients that are differentiated as the graph says, not as a tape saw.

    Args:
      gradients: makes them.
      tensors: what they depend on.
    """
    made = gradients()
    flat = ends.leaves(made)
    results = [x for x in flat if x.dtype.is_floating]

    @own_gradient
    def run(*_: tf.Tensor) -> Any:
        def backward(*upstream: Any) -> list[Any]:
            return _again(
                lambda: ends.gradients(results, tensors, upstream),
                [*tensors, *ends.leaves(upstream)],
            )

        return [tf.identity(x) for x in results], backward

    given = iter(run(*tensors))
    return tf.nest.map_structure(
        lambda x: next(given) if x is not None and x.dtype.is_floating else x,
        made,
        expand_composites=True,
    )
