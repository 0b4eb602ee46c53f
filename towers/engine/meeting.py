"""meeting: towers that compute something together, in step.

What a tower hands to `all_towers` deep inside a layer is a part only; the
whole is known when all towers have come that far. So each tower is built in a
thread of its own, one thread at a time, and waits there for the others.
"""

import dataclasses
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from towers.engine import closure, errand
from towers.engine.all_towers import current, meanwhile
from towers.foreign import tf_autograph
from towers.foreign.patches import bound
from towers.foreign.tf_custom_gradients import in_custom_gradient
from towers.foreign.tf_gradients import own_gradient

_STOP = object()  # an answer that ends a thread


@dataclasses.dataclass(frozen=True)
class Call:
    """What one tower says in a call of `all_towers`.

    Attributes:
      function: of the whole values.
      values: the tower's parts.
      shared: what is not joined; None for nothing.
      split: whether results are dealt out by rows.
      pure: whether the function takes nothing else, no weight either.
      scope: where in the graph the tower is.
      tower: who says it.
    """

    function: Callable[..., Any]
    values: tuple[Any, ...]
    shared: Any
    split: bool
    pure: bool
    scope: str
    tower: "_Builder"

    def run(self, values: Any, device: str, scope: str) -> Any:
        """What the function makes of all towers' values, a nest of tensors.

        It runs inside this tower, where weights are the tower's.

        Args:
          values: nests like those of the call.
          device, scope: where.
        """
        return self.tower.run(
            errand.Errand(
                self.function, values, self.shared, self.scope, device, scope
            )
        )


class _Builder:
    """A thread that builds one tower, when it is its turn."""

    def __init__(
        self,
        function: Callable[[], Any],
        device: str,
        ownership: closure.Ownership,
    ):
        self.steps: list[tuple[Any, tf.Tensor]] = []
        self._ownership = ownership
        self._status = tf_autograph.status()
        self.graph = tf.compat.v1.get_default_graph()
        self.result: Any = None
        self.shared: list[tf.Tensor] = []
        self.dealt: list[tf.Tensor] = []
        self._answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._messages: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._thread = threading.Thread(
            target=self._main, args=(function, device), daemon=True
        )

    def go_on(self, answer: Any) -> Any:
        """The tower's next call of `all_towers`; None if it has its result."""
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._answers.put(answer)
        message = self._messages.get()
        if isinstance(message, BaseException):
            raise message
        return message

    def run(self, task: errand.Errand) -> Any:
        """Runs a function of all towers in the thread of this one."""
        (result,) = self.go_on(task)
        self.steps = task.steps
        return result

    def close(self) -> None:
        """Ends the thread, wherever it is."""
        if self._thread.ident is not None:
            self._answers.put(_STOP)
            self._thread.join()

    def ask(
        self,
        function: Callable[..., Any],
        values: tuple[Any, ...],
        split: bool,
        shared: Any,
        pure: bool,
        asker: str,
    ) -> Any:
        if in_custom_gradient():
            raise ValueError(
                f"{asker} was called inside a custom gradient (keras.remat, "
                "RematScope, tf.recompute_grad, tf.custom_gradient), which "
                "calls it again in its backward pass, where no other tower is. "
                "Expected a call outside of it."
            )
        graph = tf.compat.v1.get_default_graph()
        if graph is not self.graph:
            raise ValueError(
                f"{asker} was called in {graph.name!r}, a loop, a tf.cond "
                "or a tf.function inside a tower, where the other towers "
                "cannot follow. Expected a call beside it; hand its result in."
            )
        values = tf.nest.map_structure(tf.convert_to_tensor, values)
        scope = graph.get_name_scope()
        for value in tf.nest.flatten(values):
            if not value.shape.rank:
                raise ValueError(
                    "The values of all_towers must have a first axis, by which "
                    f"those of all towers are joined; got shape {value.shape} "
                    f"in {scope!r}. Give a scalar one, as with x[tf.newaxis]."
                )
        message: Any = Call(function, values, shared, split, pure, scope, self)
        while isinstance(answer := self._asking(message), errand.Errand):
            with bound(current, None):  # inside, whole values are there
                message = (answer.result(self._ownership),)
        if answer is _STOP:
            raise SystemExit  # ends a thread, past `except Exception`
        results, steps = answer
        for seed, step in steps:
            seed.assign(seed.value + step)
        kept = self._ownership.own if split else self._ownership.same
        kept.update(x.name for x in tf.nest.flatten(results))
        more = [
            x
            for x in closure.tensors(function, shared)
            if getattr(x, "graph", None) is self.graph
        ]
        answer = _answered(results, [values, more])
        whose = self.dealt if split else self.shared
        whose += tf.nest.flatten(answer)
        return answer

    def _asking(self, message: Any) -> Any:
        """The answer to a message; while it is awaited, others go on."""
        with meanwhile():
            self._messages.put(message)
            return self._answers.get()

    def _main(self, function: Callable[[], Any], device: str) -> None:
        current.set(self)
        with (
            self._status,
            self.graph.as_default(),
            tf.device(None),
            tf.device(device),
        ):
            try:
                self.result = function()
                self._messages.put(None)
            except SystemExit:
                raise
            except BaseException as error:  # whatever the model raises
                self._messages.put(error)
            # A graph is left in the reverse order of entering it.
            while self._answers.get() is not _STOP:
                self._messages.put(None)


def _answered(answer: Any, values: Any) -> Any:
    """The answer, on this device, for gradients of all towers only.

    A tape inside a tower would see no way from the answer to what the tower
    said, or what the function closes over, and take it for a constant; so there
    is one, which it cannot go.
    """
    tensors = tf.nest.flatten(answer)

    @own_gradient
    def given(*both: tf.Tensor) -> Any:
        def backward(*upstream: Any) -> list[Any]:
            if isinstance(current.get(), _Builder):
                raise RuntimeError(
                    "A tower took a gradient of what it got from all_towers, or "
                    "of a synchronized batch norm, by itself, while the other "
                    "towers are not there yet. Expected the gradient of the "
                    "gathered outputs, taken outside of the `tower_fn`."
                )
            return [*upstream, *[None] * (len(both) - len(tensors))]

        return [tf.identity(x) for x in both[: len(tensors)]], backward

    given_here = given(*tensors, *tf.nest.flatten(values))
    return tf.nest.pack_sequence_as(answer, given_here)


def in_step(
    functions: Sequence[Callable[[], Any]],
    devices: Sequence[str],
    join: Callable[[Sequence[Call]], Sequence[Any]],
    ownerships: Sequence[closure.Ownership],
) -> list[Any]:
    """Runs functions side by side, in a graph, from meeting to meeting.

    Args:
      functions: one per tower; they may call `all_towers`.
      devices: one device name per tower.
      join: from the towers' calls to one answer per tower.
      ownerships: per tower, which tensors are its own.

    Returns:
      What each function returned.

    Raises:
      ValueError: they do not all make the same calls.
    """
    tf.compat.v1.get_default_graph().switch_to_thread_local()
    towers = [_Builder(*each) for each in zip(functions, devices, ownerships)]
    answers: Sequence[Any] = [None] * len(towers)
    try:
        while True:
            calls = [t.go_on(a) for t, a in zip(towers, answers)]
            requests = [call for call in calls if call is not None]
            if not requests:
                return [tower.result for tower in towers]
            _check_same(calls)
            joined = join(requests)
            # A seed from which one tower drew for all goes on in all.
            drawn = [t.steps for t in towers]
            answers = [
                (answer, sum(drawn[:i] + drawn[i + 1 :], []))
                for i, answer in enumerate(joined)
            ]
            for tower in towers:
                tower.steps = []
    finally:
        for tower in reversed(towers):
            tower.close()


def _check_same(calls: Sequence[Call | None]) -> None:
    first = calls[0]
    for i, call in enumerate(calls):
        if call is None or first is None:
            here = next(c.scope for c in calls if c is not None)
            there = next(t for t, c in enumerate(calls) if c is None)
            raise ValueError(
                "All towers must call all_towers equally often, but tower "
                f"{there} has finished where another calls it in {here!r}. "
                "Expected calls that do not depend on the tower or its rows."
            )
        try:
            tf.nest.assert_same_structure(first.values, call.values)
            tf.nest.assert_same_structure(first.shared, call.shared)
            same = _kind(first) == _kind(call)
        except (TypeError, ValueError):
            same = False
        if not same:
            raise ValueError(
                "All towers must make the same calls of all_towers, but tower "
                f"{i} calls it in {call.scope!r} where tower 0 calls it in "
                f"{first.scope!r}, with another function or other values."
            )
        closure.check_alike(
            first.function, call.function, first.shared, call.shared, call.scope
        )


def _kind(call: Call) -> tuple[Any, ...]:
    code = getattr(call.function, "__code__", type(call.function))
    return code, getattr(call.function, "__name__", ""), call.split
