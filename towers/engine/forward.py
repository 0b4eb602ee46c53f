"""forward: each tower on its own device, there and back."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from towers.engine import all_towers, boundary, lockstep
from towers.engine.calls import How, made_called
from towers.engine.copies import Maker, made_alike
from towers.foreign.tf_gradients import own_gradient, own_gradient_of_each


def run_towers(
    tasks: Sequence[boundary.Task],
    join: lockstep.Join | None = None,
    how: How = How.BUILT,
    determined: bool = False,
    held: Sequence[boundary.Held] = (),
) -> list[Any]:
    """Runs each tower's task on its device, backward included.

    The backward ops of a plain tape carry no device and end on the default
    one. Here each tower is a custom gradient that differentiates itself with
    `tf.gradients`, colocated, under its own device.

    Args:
      tasks: one per tower; with scopes, if the functions are all the same.
      join: answers the towers' calls of `all_towers`, if they make any.
      how: whether they are built op by op, or called as functions, and which.
        What is called needs no other tower.
      determined: whether what a tower makes is known to depend on nothing but
        its arguments and the type of its device; else towers are compared.
      held: variables that towers read besides their arguments.

    Returns:
      One nest of tensors per tower.
    """
    if how is not How.BUILT:
        with all_towers.by_themselves():
            return [
                pinned(
                    task, functools.partial(made_called, how, task.scope), held
                )
                for task in tasks
            ]
    if len(tasks) == 1:
        return [pinned(tasks[0], held=held)]
    if join is not None:
        return lockstep.run_in_step(tasks, join, held)
    makers, towers = (Maker(), Maker()), []
    with all_towers.by_themselves():
        for task in tasks:
            make = _built
            if task.scope:
                make = functools.partial(
                    made_alike, makers, task.scope, determined
                )
            towers.append(pinned(task, make, held))
    return towers


def pinned(
    task: boundary.Task,
    make: Callable[..., Any] | None = None,
    held: Sequence[boundary.Held] = (),
) -> Any:
    """A task, forward and backward on its device, in a graph."""
    made: list[Any] = []
    heard = _Followed()
    tensors = boundary.distinct(boundary.leaves(task.argument))

    def run(*tensors: tf.Tensor) -> Any:
        graph = tf.compat.v1.get_default_graph()
        before = len(graph.get_operations())
        here = boundary.brought(task, tensors)
        result, differentiate = (make or _built)(task.function, here)
        made.append(result)
        lost = boundary.lost(graph.get_operations()[before:], tensors, held)
        # What has no gradient need not be asked for one, with zeros.
        results = [
            x for x in boundary.leaves(result) if boundary.has_gradient(x)
        ]

        def backward(*upstream: Any, variables: Any = ()) -> list[Any]:
            boundary.check_nothing_lost(variables, lost, held)
            with tf.device(task.device):
                return differentiate(results, tensors, heard.of(upstream))

        return results, backward

    with tf.device(task.device):
        passed = own_gradient(run, task.elsewhere)(*tensors)
        results = iter(heard.noted(passed))
    return boundary.replaced(made[0], results)


class _Followed:
    """Which results have a gradient: a tape makes zeros of those that have none.

    They would cross to the tower, and be differentiated there. A model that ends
    in a softmax has such a result: Keras's loss takes what is before it.
    """

    def __init__(self) -> None:
        self._places: set[int] = set()

    def noted(self, results: Sequence[tf.Tensor]) -> Sequence[tf.Tensor]:
        """The results, whose gradients are noted on their way."""
        if len(results) < 2:
            return results
        noted = own_gradient_of_each(lambda same: same, self._note, results)
        self._places.clear()  # a forward accumulator has asked for gradients
        return noted

    def of(self, upstream: Sequence[Any]) -> list[Any]:
        """Gradients, with None for those that a tape has made."""
        places = self._places or set(range(len(upstream)))
        self._places = set()
        return [g if k in places else None for k, g in enumerate(upstream)]

    def _note(self, k: int, upstream: Any) -> Any:
        self._places.add(k)
        return upstream


def _built(function: Callable[..., Any], argument: Any) -> tuple[Any, Any]:
    """`function(argument)`, and the function that gives its gradients."""
    return function(argument), boundary.differentiated
