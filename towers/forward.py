"""forward: each tower on its own device, there and back."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tensorflow as tf

from towers import alike, meeting
from towers.own_gradient import own_gradient, recorded

Join = Callable[[Sequence[meeting.Call]], Sequence[Any]]


def run_towers(
    functions: Sequence[Callable[..., Any]],
    devices: Sequence[str],
    arguments: Sequence[Any],
    elsewhere: Mapping[int, str] | None = None,
    join: Join | None = None,
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
        return _run_in_step(functions, devices, arguments, elsewhere, join)
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
    tensors = _distinct(_leaves(argument))
    made: list[Any] = []

    @own_gradient
    def run(*tensors: tf.Tensor) -> Any:
        taken = _taken(argument, tensors, device, elsewhere)
        result, differentiate = (make or _made)(function, taken)
        made.append(result)
        # What has no gradient need not be asked for one, with zeros.
        results = [x for x in _leaves(result) if _has_gradient(x)]

        def backward(*upstream: Any, variables: Any = ()) -> list[Any]:
            _check_known(variables)
            with tf.device(device):
                return differentiate(results, tensors, upstream)

        return results, backward

    with tf.device(device):
        results = iter(run(*tensors))
    return _replaced(made[0], results)


def _made(function: Callable[..., Any], taken: Any) -> tuple[Any, Any]:
    """What the function makes, and what makes its gradients."""
    return function(taken), _gradients


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
    given = _leaves(taken)
    device, graph = given[0].device, given[0].graph  # the device in full
    forth = makers[0].make(lambda: function(taken), given, device, scope)

    def differentiate(
        results: Sequence[tf.Tensor],
        tensors: Sequence[tf.Tensor],
        upstream: Sequence[Any],
    ) -> Any:
        def gradients() -> Any:
            return _gradients(results, tensors, upstream)

        above = _leaves(upstream)
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
        kind = tuple(type(g).__name__ for g in upstream)
        back = makers[1].make(
            gradients, [*seen, *given, *tensors, *above], device, scope, kind
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
    flat = _leaves(made)
    results = [x for x in flat if x.dtype.is_floating]

    @own_gradient
    def run(*_: tf.Tensor) -> Any:
        def backward(*upstream: Any) -> list[Any]:
            return _again(
                lambda: _gradients(results, tensors, upstream),
                [*tensors, *_leaves(upstream)],
            )

        return [tf.identity(x) for x in results], backward

    given = iter(run(*tensors))
    return tf.nest.map_structure(
        lambda x: next(given) if x is not None and x.dtype.is_floating else x,
        made,
        expand_composites=True,
    )


def _run_in_step(
    functions: Sequence[Callable[..., Any]],
    devices: Sequence[str],
    arguments: Sequence[Any],
    elsewhere: Mapping[int, str],
    join: Join,
) -> list[Any]:
    """As `run_towers`, for towers that meet: one gradient for all of them.

    A custom gradient is one op with one device. So that each tower's tensors
    stay on its own, the joint one has a part for each tower at both ends, and
    in between only scalars: a tape comes to the gradients of all `leave` first,
    which note what comes from above, then to that of `cross`, which
    differentiates all towers at once, and then to those of `enter`, which hand
    out what it found.
    """
    n = len(functions)
    everything = _distinct([x for a in arguments for x in _leaves(a)])
    given = iter(everything)
    tensors = [[next(given) for _ in _leaves(a)] for a in arguments]

    def watched(i: int, argument: Any) -> Any:
        with tf.GradientTape() as tape:
            result = functions[i](argument)
        _check_known(tape.watched_variables())
        return result

    said: dict[int, Sequence[Any]] = {}
    found: dict[int, Sequence[Any]] = {}

    def enter(i: int) -> tf.Tensor:
        @own_gradient
        def token(*tensors: tf.Tensor) -> Any:
            def backward(_: Any) -> Sequence[Any]:
                return found.pop(i)

            return tf.zeros([]), backward

        with tf.device(devices[i]):
            return token(*tensors[i])

    entered = [enter(i) for i in range(n)]
    taken = [
        _taken(arguments[i], tensors[i], devices[i], elsewhere)
        for i in range(n)
    ]
    made = meeting.in_step(
        [functools.partial(watched, i, taken[i]) for i in range(n)],
        [token.device for token in entered],  # in full
        join,
    )
    results = [[x for x in _leaves(m) if _has_gradient(x)] for m in made]

    @own_gradient
    def cross(*tokens: tf.Tensor) -> Any:
        def backward(*_: Any) -> Sequence[tf.Tensor]:
            pairs = [
                (y, g)
                for i in sorted(said)
                for y, g in zip(results[i], said[i])
            ]
            said.clear()
            gradients = iter(
                _gradients(
                    [y for y, _ in pairs], everything, [g for _, g in pairs]
                )
            )
            for i in range(n):
                with tf.device(devices[i]):
                    found[i] = [_final(next(gradients)) for _ in tensors[i]]
            return [tf.zeros([])] * n

        return [tf.identity(token) for token in tokens], backward

    def leave(i: int, token: tf.Tensor) -> Any:
        @own_gradient
        def outputs(token: tf.Tensor) -> Any:
            def backward(*upstream: Any) -> tf.Tensor:
                said[i] = upstream
                return tf.zeros([])

            return [tf.stop_gradient(x) for x in results[i]], backward

        with tf.device(devices[i]):
            return outputs(token) if results[i] else []

    with tf.device(devices[0]):
        tokens = cross(*entered)
    return [_replaced(made[i], iter(leave(i, tokens[i]))) for i in range(n)]


def _taken(
    argument: Any,
    tensors: Sequence[tf.Tensor],
    device: str,
    elsewhere: Mapping[int, str],
) -> Any:
    """The argument, taken to the device.

    A loop places what it hands from step to step beside where that came from:
    it must come from this device, or every step asks the other.
    """
    here = []
    for i, tensor in enumerate(tensors):
        with tf.device(elsewhere.get(i, device)):
            here.append(tf.identity(tensor))
    given = iter(here)
    return tf.nest.map_structure(
        lambda x: None if x is None else next(given),
        argument,
        expand_composites=True,
    )


def _leaves(nest: Any) -> list[tf.Tensor]:
    flat = tf.nest.flatten(nest, expand_composites=True)
    return [x for x in flat if x is not None]


def _distinct(tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    """With copies of what is there twice, as each gets a gradient."""
    seen: set[int] = set()
    distinct = []
    for tensor in tensors:
        again = id(tensor) in seen and tensor.dtype.is_floating
        seen.add(id(tensor))
        distinct.append(tf.identity(tensor) if again else tensor)
    return distinct


def _replaced(made: Any, results: Any) -> Any:
    """What was made, with `results` for what has a gradient."""
    return tf.nest.map_structure(
        lambda x: next(results) if _has_gradient(x) else x,
        made,
        expand_composites=True,
    )


def _has_gradient(x: tf.Tensor | None) -> bool:
    return x is not None and x.dtype.is_floating and x.op.type != "StopGradient"


def _check_known(variables: Sequence[tf.Variable]) -> None:
    if variables:
        raise ValueError(
            "The tower reads the trainable variables "
            f"{[v.name for v in variables]}, which belong to no model "
            "that it was given, so their gradient would be lost. Make "
            "them weights of a layer, or pass their model too."
        )


def _gradients(
    results: Sequence[tf.Tensor],
    tensors: Sequence[tf.Tensor],
    upstream: Sequence[Any],
) -> list[Any]:
    wanted = [
        (y, g)
        for y, g in zip(results, upstream)
        if y.dtype.is_floating and g is not None
    ]
    if not wanted:
        return [None] * len(tensors)
    return tf.compat.v1.gradients(
        [y for y, _ in wanted],
        list(tensors),
        grad_ys=[g for _, g in wanted],
        colocate_gradients_with_ops=True,
        stop_gradients=list(tensors),  # one may be made from another, outside
    )


def _final(gradient: Any) -> Any:
    """A gradient that says so when it is differentiated again.

    Towers in step are built in threads, which a tape does not see, so it would
    leave out what goes by way of them.
    """
    if gradient is None:
        return None
    if isinstance(gradient, tf.IndexedSlices):
        values = _final(gradient.values)
        return tf.IndexedSlices(values, gradient.indices, gradient.dense_shape)

    @own_gradient
    def final(gradient: tf.Tensor) -> Any:
        def backward(_: Any) -> Any:
            raise RuntimeError(
                "A gradient of towers that meet (synchronized batch norm, "
                "all_towers) was differentiated again, which towers do not "
                "support. Expected one gradient of the gathered outputs; or "
                "leave out synchronized=True."
            )

        return tf.identity(gradient), backward

    return final(gradient)
