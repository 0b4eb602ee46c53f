"""forward: each tower on its own device, there and back."""

import functools
from collections.abc import Sequence
from typing import Any

from towers.engine import all_towers, boundary, lockstep
from towers.engine.calls import How, made_called
from towers.engine.copies import Maker, made_alike


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
                boundary.pinned_task(
                    task, functools.partial(made_called, how, task.scope), held
                )
                for task in tasks
            ]
    if len(tasks) == 1:
        return [boundary.pinned_task(tasks[0], held=held)]
    if join is not None:
        return lockstep.run_in_step(tasks, join, held)
    makers, towers = (Maker(), Maker()), []
    with all_towers.by_themselves():
        for task in tasks:
            make = None
            if task.scope:
                make = functools.partial(
                    made_alike, makers, task.scope, determined
                )
            towers.append(boundary.pinned_task(task, make, held))
    return towers
