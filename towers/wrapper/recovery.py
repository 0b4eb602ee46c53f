"""recovery: what a `TowerModel` does when a worker is lost."""

import dataclasses
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from towers.cluster import cluster as clusters
from towers.cluster.lost import WorkerLost
from towers.foreign import keras_compile, keras_layers, keras_optimizer
from towers.keras_model.layer_graph import variables_of
from towers.placement.placement import Placement
from towers.wrapper.repeated_step import BroughtStep, RepeatedStep

_FIT = inspect.signature(keras.Model.fit)
_POLICIES = ("raise", "continue")


class Recovery:
    """How a model ends when a worker is lost, or goes on without it.

    Args:
      model: a `TowerModel`, with its placement and `on_lost`.

    Attributes:
      whole_placement: that of all workers, when some are lost.
      lost_workers: the addresses of those that had some of its variables.

    Raises:
      ValueError: `on_lost` is unknown, or cannot be met with this placement.
    """

    def __init__(self, model: Any):
        if model.on_lost not in _POLICIES:
            raise ValueError(
                f"`on_lost` must be one of {', '.join(map(repr, _POLICIES))}; "
                f"got {model.on_lost!r}."
            )
        self._model = model
        self.whole_placement: Placement = model.placement
        self.lost_workers: tuple[str, ...] = ()
        if self._goes_on:
            check_can_continue(model.placement)
        clusters.hold(self)

    def fit_arguments(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What `fit` is called with, and a callback that takes workers back."""
        if not self._goes_on:
            return args, kwargs
        names = list(_FIT.parameters)[1 : len(args) + 1]
        arguments = {**dict(zip(names, args)), **kwargs}
        callbacks = arguments.get("callbacks")
        rejoin = _Rejoin(self)
        if isinstance(callbacks, keras.callbacks.CallbackList):
            callbacks.append(rejoin)
        else:
            some = (
                callbacks
                if isinstance(callbacks, (list, tuple))
                else [callbacks]
            )
            arguments["callbacks"] = [*filter(None, some), rejoin]
        return (), arguments

    def check_compiled(self) -> None:
        """Refuses what "continue" cannot do with what a model is compiled to."""
        if not self._goes_on:
            return
        model, problems = self._model, []
        if model.steps_per_execution != 1:
            problems.append(f"steps_per_execution={model.steps_per_execution}")
        if model.run_eagerly:
            problems.append("run_eagerly=True")
        if tf.config.functions_run_eagerly():
            problems.append("tf.config.run_functions_eagerly(True)")
        if "train_step" in model.own_steps():
            problems.append("a `train_step` of the model's own")
        if problems:
            raise ValueError(
                '`on_lost` is "continue", which takes Keras\'s own step again '
                f"when a worker is lost, but there is {', and '.join(problems)}. "
                'Leave that out; or use on_lost="raise", and go on from a '
                "checkpoint (keras.callbacks.BackupAndRestore)."
            )

    @property
    def takes_steps(self) -> bool:
        """Whether steps are `repeated`, and not taken by Keras's own function."""
        return self._goes_on or self._brings

    def repeated(self, step: Callable[..., Any]) -> RepeatedStep:
        """A step that is taken again when a worker is lost, if that is asked."""
        kind = RepeatedStep if self._goes_on else BroughtStep
        return kind(step, self.placed_now, self.go_on)

    @property
    def _goes_on(self) -> bool:
        return self._model.on_lost == "continue"

    @property
    def _brings(self) -> bool:
        """Whether what a step says is on a worker, and is to be brought."""
        model = self._model
        return (
            clusters.connected() is not None
            and clusters.task_of(str(model.placement.output_device)) is not None
            and model.steps_per_execution == 1
            and not model.run_eagerly
        )

    def placed_now(self) -> tuple[str, ...]:
        """The towers' devices, for which a step is made."""
        return tuple(self._model.placement.devices)

    def towers_now(self) -> list[int]:
        """Places, in `whole_placement`, of the towers that there are now."""
        here = set(self._model.placement.devices)
        devices = self.whole_placement.devices
        return [i for i, device in enumerate(devices) if device in here]

    def go_on(self) -> None:
        """Goes on with the workers that there are now.

        Raises:
          WorkerLost: there is none.
        """
        cluster = clusters.current()
        lost = cluster.lost()
        cluster.update()
        before = self.whole_placement
        here = set(cluster.devices())
        kept = [
            i
            for i, device in enumerate(before.devices)
            if clusters.task_of(device) is None or device in here
        ]
        weights = None
        if before.weights is not None:
            weights = [before.weights[i] for i in kept]
            weights = weights if sum(weights) else None
        if not kept:
            raise WorkerLost(cluster.lost(), "No tower is left.")
        devices = [before.devices[i] for i in kept]
        self._warn_of_change(cluster, lost, devices)
        if tuple(devices) != self.placed_now():
            placement = dataclasses.replace(
                before, devices=devices, weights=weights
            )
            object.__setattr__(self._model, "placement", placement)
            self._model.tower_calls.forget()

    def _warn_of_change(
        self, cluster: clusters.Cluster, lost: list[str], devices: list[str]
    ) -> None:
        """Says which workers are lost, and which are back.

        Args:
          cluster: theirs.
          lost: addresses of those that were lost, before the cluster was updated.
          devices: of the towers that there are from now on.
        """
        before = self.placed_now()
        gone = cluster.addresses([d for d in before if d not in devices])
        back = cluster.addresses([d for d in devices if d not in before])
        again = [text for text in lost if text not in (*gone, *back)]
        changes = [
            f"{what} {', '.join(texts)}"
            for what, texts in (
                ("lost", gone),
                ("back:", back),
                ("started anew:", again),
            )
            if texts
        ]
        if changes:
            n = len(self.whole_placement.devices)
            warnings.warn(
                f"Workers of {self._model.name!r}: {'; '.join(changes)}. Going "
                f"on in {len(devices)} of {n} towers.",
                stacklevel=2,
            )

    def catch_up(self) -> None:
        """Goes on without workers that were lost since the last step."""
        cluster = clusters.connected()
        if self._goes_on and cluster is not None:
            if cluster.lost() or not cluster.has(self.placed_now()):
                self.go_on()

    def take_back(self) -> None:
        """Takes back the workers that have returned."""
        cluster = clusters.connected()
        if cluster is not None and cluster.is_behind():
            self.go_on()

    def lose(self, tasks: set[int], workers: tuple[str, ...]) -> list[Any]:
        """Gives up the variables of workers; what they were.

        To touch one would be to wait without end, or worse.
        """
        gone = []
        for variable in _all_variables(self._model):
            value = keras_layers.raw(variable)
            if isinstance(value, LostValue) or value is variable:
                continue
            if clusters.task_of(value.device) in tasks:
                lost = LostValue(workers)
                keras_layers.replace_raw(variable, lost)
                gone.append(value)
        if gone:
            self.lost_workers = workers
        return gone


def _all_variables(model: Any) -> list[Any]:
    """Those of the template, the optimizers, losses and metrics that are made."""
    variables = list(variables_of(model.template))
    for optimizer in keras_compile.optimizers(model):
        pairs = keras_optimizer.optimizer_variables(optimizer)
        variables += [variable for variable, _ in pairs]
    if model.compiled:
        variables += keras_compile.Compiled.of(model).variables
    return list(
        {id(v): v for v in variables if keras_layers.is_made(v)}.values()
    )


class LostValue:
    """What stands for the value of a variable whose worker is lost."""

    def __init__(self, workers: tuple[str, ...]):
        self.__dict__["workers"] = workers

    def __getattr__(self, name: str) -> Any:
        raise WorkerLost(self.__dict__["workers"])

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise WorkerLost(self.workers)

    def __tf_tensor__(self, *args: Any, **kwargs: Any) -> Any:
        raise WorkerLost(self.workers)


class _Rejoin(keras.callbacks.Callback):
    """Workers that have come back join at the next epoch."""

    def __init__(self, recovery: Recovery):
        super().__init__()
        self._recovery = recovery

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._recovery.take_back()


def check_can_continue(placement: Placement) -> None:
    """Raises unless only towers are on workers, of a cluster."""
    towards = (
        'Go on from a checkpoint instead: on_lost="raise", and '
        "keras.callbacks.BackupAndRestore."
    )
    if clusters.connected() is None:
        raise ValueError(
            '`on_lost` is "continue", but this process has no cluster. Make a '
            "towers.Cluster first, and the placement by Placement.workers."
        )
    if callable(placement.parameter_device):
        raise ValueError(
            '`on_lost` is "continue", for which parameters must be on this '
            "process, but `parameter_device` is a policy, and what is on a "
            f"worker is lost with it. {towards}"
        )
    for name in ("parameter_device", "input_device", "output_device"):
        device = getattr(placement, name)
        if clusters.task_of(device) is not None:
            raise ValueError(
                f'`on_lost` is "continue", but `{name}` is {device!r}, on a '
                f"worker, and what is there is lost with it. {towards}"
            )
    pins = placement.pinned_devices
    if any(clusters.task_of(device) is not None for device in pins):
        raise ValueError(
            '`on_lost` is "continue", but `layer_devices` puts layers, and '
            f"their variables, on workers. {towards}"
        )
