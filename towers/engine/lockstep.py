"""lockstep: towers that meet, with one gradient for all of them."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from towers.engine import boundary, closure, meeting
from towers.foreign.tf_gradients import own_gradient

Join = Callable[[Sequence[meeting.Call]], Sequence[Any]]


def run_in_step(
    tasks: Sequence[boundary.Task],
    join: Join,
    held: Sequence[boundary.Held] = (),
) -> list[Any]:
    """As `forward.run_towers`, for towers that meet.

    A custom gradient is one op with one device. So that each tower's tensors
    stay on its own, the joint one has a part for each tower at both ends, and
    in between only scalars: a tape comes to the gradients of all `leave` first,
    which note what comes from above, then to that of `cross`, which
    differentiates all towers at once, and then to those of `enter`, which hand
    out what it found.
    """
    n = len(tasks)
    leaves = [boundary.tensors_of(task.argument) for task in tasks]
    everything = boundary.distinct([x for flat in leaves for x in flat])
    copies = iter(everything)
    tensors = [[next(copies) for _ in flat] for flat in leaves]

    def built(i: int, argument: Any) -> Any:
        with tf.GradientTape() as tape:
            result = tasks[i].function(argument)
        boundary.check_nothing_lost(tape.watched_variables(), (), held)
        return result

    graph = tf.compat.v1.get_default_graph()
    before = len(graph.get_operations())
    upstreams: dict[int, Sequence[Any]] = {}
    by_tower: dict[int, list[Any]] = {}

    def enter(i: int) -> tf.Tensor:
        def token(*tensors: tf.Tensor) -> Any:
            def backward(_: Any) -> Sequence[Any]:
                return by_tower.pop(i)

            return tf.zeros([]), backward

        with tf.device(tasks[i].device):
            return own_gradient(token, tasks[i].elsewhere)(*tensors[i])

    entered = [enter(i) for i in range(n)]
    brought = [boundary.argument_here(*each) for each in zip(tasks, tensors)]
    own = closure.differing(tensors, [boundary.tensors_of(x) for x in brought])
    nests = meeting.in_step(
        [functools.partial(built, i, brought[i]) for i in range(n)],
        [token.device for token in entered],  # in full
        join,
        [closure.Ownership(names, set(), before) for names in own],
    )
    lost = boundary.lost(graph.get_operations()[before:], everything, held)
    results = [
        [x for x in boundary.tensors_of(m) if boundary.has_gradient(x)]
        for m in nests
    ]

    @own_gradient
    def cross(*tokens: tf.Tensor) -> Any:
        def backward(*_: Any) -> Sequence[tf.Tensor]:
            boundary.check_nothing_lost((), lost)
            pairs = [
                (y, g)
                for i in sorted(upstreams)
                for y, g in zip(results[i], upstreams[i])
            ]
            upstreams.clear()
            gradients = iter(
                boundary.differentiated(
                    [y for y, _ in pairs], everything, [g for _, g in pairs]
                )
            )
            for i, task in enumerate(tasks):
                by_tower[i] = []
                for k in range(len(tensors[i])):
                    with tf.device(task.elsewhere.get(k, task.device)):
                        by_tower[i].append(_final(next(gradients)))
            return [tf.zeros([])] * n

        return [tf.identity(token) for token in tokens], backward

    def leave(i: int, token: tf.Tensor) -> Any:
        @own_gradient
        def outputs(token: tf.Tensor) -> Any:
            def backward(*upstream: Any) -> tf.Tensor:
                upstreams[i] = upstream
                return tf.zeros([])

            return [tf.stop_gradient(x) for x in results[i]], backward

        with tf.device(tasks[i].device):
            return outputs(token) if results[i] else []

    with tf.device(tasks[0].device):
        tokens = cross(*entered)
    return [
        boundary.replaced(nests[i], iter(leave(i, tokens[i]))) for i in range(n)
    ]


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
                "all_towers, ragged rows made dense) was differentiated again, "
                "which towers do not support. Expected one gradient of the "
                "gathered outputs; or leave out synchronized=True."
            )

        return tf.identity(gradient), backward

    return final(gradient)
