"""notes: what is noted of one tower's replay, and whose it is."""

import contextlib
import contextvars
from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow as tf

from towers.engine import errand, host
from towers.foreign.patches import bound
from towers.keras_model.fixed_rows import Masks
from towers.keras_model.kinds import Kind
from towers.keras_model.moments import Moments

_notes: contextvars.ContextVar[Any] = contextvars.ContextVar(
    "notes", default=None
)


def notes_here() -> Any:
    """The notes of the replay that is under way in this thread, or None."""
    return _notes.get()


class Notes:
    """What hooks note of one replay, in the thread that it runs in.

    Attributes:
      training: the phase that layers go by.
      stateless: what holds the values of variables.
      tower: its number.
          draws: what it draws by seeds, see `tower_draws.Own`; None leaves that alone.
      place: where the tower's rows are; None if that is not asked for.
          masks: those that are constants, if it is a tower.
      home: the tower's device.
      device: that of the pinned layer whose call it is in, if it is in one.
      scopes: the name scopes of the calls that it is in, outermost first.
      moments, layer_outputs: as those of a `Replay`.
      sums: the losses that are sums over rows.
      body: the TensorFlow graph that it is in, besides those of its loops.
    """

    def __init__(
        self,
        graph: Any,
        scope: str,
        training: bool | None,
        stateless: Any,
        tower: int = 0,
        draws: Any = None,
    ):
        self.tower = tower
        self.draws = draws
        self.place = draws and draws.place
        self.masks = Masks(self.place) if self.place else None
        self.home = host.device_here()
        self.device: str | None = None
        self.training = training
        self.stateless = stateless
        self.scopes = [scope]
        self.moments: dict[int, list[Moments]] = {}
        self.layer_outputs: dict[str, list[Any]] = {}
        self.sums: list[tf.Tensor] = []
        self.graph = graph
        self.body = tf.compat.v1.get_default_graph()

    def state(self, value: tf.Tensor) -> tf.Tensor:
        """A variable's value, as the tower reads it: a generator's may differ."""
        if self.draws is None or errand.is_run() or tf.executing_eagerly():
            return value
        return self.draws.state(self.path, value)

    @property
    def is_outright(self) -> bool:
        """Whether it is in no loop or function, and no gradient is taken."""
        follower = self.stateless.follower
        return (
            tf.compat.v1.get_default_graph() is self.body
            and (follower is None or follower.is_idle)
            and not errand.is_run()
        )

    def again(
        self, stateless: Any, scopes: Sequence[str], draws: Any
    ) -> "Notes":
        """Other notes of the same tower, in the calls of `scopes`."""
        notes = Notes(
            self.graph, "", self.training, stateless, self.tower, draws
        )
        notes.scopes = list(scopes)
        notes.home, notes.device = self.home, self.device
        return notes

    @property
    def path(self) -> str:
        """Of the layer whose call it is in; "" outside of layers."""
        return self.scopes[-1][len(self.scopes[0]) : -1]

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        with bound(_notes, self):
            yield

    @staticmethod
    def of(graph: Any) -> "Notes | None":
        """The notes of the current replay, if that is one of `graph`."""
        notes = _notes.get()
        return notes if notes is not None and notes.graph is graph else None


def note_update(variable: Any, before: tf.Tensor) -> None:
    """Notes that a tower updates a variable, if that is for all towers.

    Args:
      variable: one of the model's.
      before: its value in the tower.

    Raises:
      ValueError: a function of `all_towers` updates it, but of its towers only
        one would hear of that.
    """
    notes = _notes.get()
    if notes is None or not errand.is_run():
        return
    graph = notes.graph
    kind = graph.kinds[graph.index_of(variable)]
    if kind is Kind.SEED:
        errand.note_draw(variable, before)
    elif kind is not Kind.METRIC:
        raise ValueError(
            f"The function that all_towers was given updates {variable.path!r}"
            ", which it does in one tower only. Expected it to return the new "
            "value, and the layer to assign that, as in "
            "self.count.assign(all_towers(function, x))."
        )
