"""TowerModel and to_multi_gpu: towers behind the face of a Keras model."""

import contextlib
import copy
import dataclasses
import functools
import inspect
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from towers.build import build_call
from towers.export import export_towers
from towers.foreign import (
    keras_compile,
    keras_layers,
    tf_autograph,
)
from towers.foreign.keras_saving import TemplateProxy
from towers.keras_model import checks
from towers.keras_model.calls import (
    ModelCall,
    call_signature,
    model_call,
    signed,
)
from towers.keras_model.parameters import Placed, move_variable, place_variables
from towers.placement.placement import Placement, check_count, check_placement
from towers.verbs.gather import check_rule
from towers.wrapper.loss_on_towers import loss_on_towers
from towers.wrapper.own_steps import layers_in_towers

# What a template, or a subclass of TowerModel, may do in its own way.
STEPS = (
    "train_step",
    "test_step",
    "predict_step",
    "compute_loss",
    "compute_metrics",
)


class TowerModel(TemplateProxy):
    """A Keras model whose forward and backward pass run in towers.

    `compile`, `fit`, `evaluate`, `predict`, `train_on_batch`, callbacks and
    weights are those of Keras, with Keras's own training step. `batch_size`
    is the global one: with 2 equal towers and `batch_size=128`, each tower
    sees 64 rows. The wrapper shares its template's variables and moves them,
    with the optimizer's, to the parameter device. A compiled template hands
    on what it was compiled with, its very optimizer included.

    With `loss_on_towers`, `fit` and `evaluate` compute losses and metrics in
    the towers, from their shards of targets and sample weights, and gather
    sums of a few numbers: outputs never leave their tower. The values are the
    plain model's. What cannot be put together from shards is refused by name,
    as are losses and metrics of Keras that look at other rows (`Circle`, or
    `axis=0`). Of a function of your own towers cannot know: each of its values
    must be that of one row, and of no other.

    What is written is the plain model, optimizer included, so that any number
    of towers, or none, loads it: by `save`, `keras.saving.save_model`,
    `save_weights`, callbacks and `tf.train.Checkpoint`. `copy.deepcopy` gives
    a TowerModel on the same devices, with a copy of the template;
    `keras.models.clone_model` and pickling give the plain model. Attributes
    and methods of a template of your own class are there, and `isinstance`
    knows that class.

    A template's own `compile`, `train_step`, `test_step`, `compute_loss` or
    `compute_metrics` is used. What a step calls as `self(x)` runs in towers, and
    so does each layer or model of the template that it calls by itself, as
    `self.encoder(x)`: shared by the rows of that call, gathered, and its state
    applied before the next. What has no rows, or makes something of all of
    them, as a layer that returns a loss, is called once, beside the outputs.
    XLA (`jit_compile`) would put all towers on one device and stays off.

    >>> model = keras.Sequential([keras.Input([3]), keras.layers.Dense(2)])
    >>> model = towers.TowerModel(model, towers.Placement.cpus(2))
    >>> model.compile("sgd", "mse")
    >>> _ = model.fit(np.ones([8, 3]), np.ones([8, 2]), batch_size=4, verbose=0)
    >>> model.predict(np.ones([5, 3]), verbose=0).shape
    (5, 2)

    Args:
      model: the template, a Keras 3 model.
      placement: where towers, parameters, inputs and outputs live.
      merge: how outputs are gathered, see `gather_outputs`. One that is no
        batch, as a weight is none, needs another rule than "concat".
      loss_on_towers: whether towers compute losses and metrics themselves.
      whole: keys of a dict of inputs, or positions in a list, that are no
        batch: every tower gets them as they are, see `split_batch`. Feed them by a
        `tf.data.Dataset`, as arrays in `fit` must all have the same rows. Names
        of further arguments of a call too: `model(x, table=table)`.
      **kwargs: as for `keras.Model`: `name`.

    Raises:
      TypeError: `model` is no Keras model, or `placement` no `Placement`.
      ValueError: a merge rule is unknown.
      RuntimeError: made under a `tf.distribute` strategy.
    """

    train_function: Any

    def __init__(
        self,
        model: keras.Model,
        placement: Placement,
        merge: Any = "concat",
        loss_on_towers: bool = False,
        whole: Sequence[Any] = (),
        **kwargs: Any,
    ):
        checks.check_model(model)
        check_placement(placement)
        if tf.distribute.has_strategy():
            strategy = type(tf.distribute.get_strategy()).__name__
            raise RuntimeError(
                f"TowerModel was made under a tf.distribute {strategy}, which "
                "places ops itself. Make the model and the wrapper outside "
                "`strategy.scope()`."
            )
        if isinstance(model, TowerModel):
            raise TypeError(
                "`model` is a TowerModel already. Wrap its `template` instead."
            )
        for rule in tf.nest.flatten(merge):
            check_rule(rule)
        kwargs.setdefault("name", model.name)
        if type(self).call is TowerModel.call:
            # Keras goes by the signature of what it will call.
            call = signed(self.call, call_signature(model))
            object.__setattr__(self, "call", call)
        # The template converts its inputs itself, on the tower.
        super().__init__(dtype=model.dtype_policy, autocast=False, **kwargs)
        self.placement = placement
        self.merge = merge
        self.loss_on_towers = loss_on_towers
        self.whole = tuple(whole)
        self.supports_jit = False
        self.supports_masking = True
        self._functions: dict[Any, Any] = {}
        self.rows_kept: dict[Any, bool] = {}  # see `layers_in_towers`
        self._placed = Placed()
        self._ran = False  # anything in towers
        self.template = model  # whose attributes are set from now on
        own = self._own("compute_loss")
        if own is not None:
            keras_compile.use_compute_loss(self, own)
        if keras_layers.is_built(model):
            self.built = True
            place_variables(model, placement)
            self._placed.note(self)
        self._placed.place_new(self)
        if model.compiled:
            if model.jit_compile:
                warnings.warn(
                    f"The template {model.name!r} was compiled to use XLA, by "
                    'jit_compile=True or, on a machine with GPUs, by "auto". '
                    "XLA would put all towers on one device, so this model "
                    "trains without it. Compile the template with "
                    "jit_compile=False to say that this is meant.",
                    stacklevel=2,
                )
            self._compile_as_template()

    def build(self, input_shape: Any) -> None:
        """Nothing: the template is built from its first inputs, in `call`."""
        self.built = True

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """The gathered outputs, like the template's."""
        if len(args) == 1:
            checks.check_given(self.template, args[0])
        signature = call_signature(self.template)
        if (
            kwargs.get("mask", ()) is None
            and "mask" not in signature.parameters
        ):
            kwargs.pop("mask")  # of a subclass, whose `call` has one
        call = model_call(args, kwargs, self.whole, signature)
        return self.run_in_towers(self.template, call)

    def compute_mask(self, inputs: Any, previous_mask: Any) -> None:
        """None: masks come with the gathered outputs."""
        return None

    def run_in_towers(self, layer: keras.Layer, call: ModelCall) -> Any:
        """Calls the template, or a layer of it: updates, losses and all.

        Returns:
          The gathered outputs.
        """
        self._ran = True
        if tf.executing_eagerly():
            self._forget_if_moved()
            function, adders = self._function(layer, call)
            outputs, notes, losses = function(call.batch)
        else:
            adders = []
            outputs, notes, losses = self._step(layer, call, adders)
        keras_layers.set_notes(outputs, notes)
        for adder, loss in zip(adders, losses):
            adder.add_loss(loss)
        return outputs

    def _function(self, layer: keras.Layer, call: ModelCall) -> Any:
        """Steps of this kind as a `tf.function`, and what adds their losses."""
        adders: list[keras.Layer] = []

        def step(batch: Any) -> Any:
            again = dataclasses.replace(call, batch=batch)
            return self._step(layer, again, adders)

        function = tf.function(step, autograph=False, reduce_retracing=True)
        try:
            key = (id(layer), call.kind)
            return self._functions.setdefault(key, (function, adders))
        except TypeError:  # an argument has no hash
            return function, adders

    def _step(
        self, layer: keras.Layer, call: ModelCall, adders: list[keras.Layer]
    ) -> Any:
        checks.ensure_called(layer, call)
        self._placed.place_new(self)
        graph = build_call(
            layer,
            call,
            self.placement,
            "concat" if call.inside else self.merge,
            part_of=self.template if call.inside else None,
        )
        graph.apply_updates()
        notes = keras_layers.get_notes(graph.outputs)
        adders[:] = graph.adders
        return graph.outputs, notes, graph.losses[: len(adders)]

    def _forget_if_moved(self) -> None:
        """Makes functions again that read variables which have moved since.

        None that Keras has is dropped: a callback may be the one who asks, and
        `fit` goes on with what it has.
        """
        new = self._placed.place_new(self)
        if not self._placed.note(self) and not new:
            return
        self._functions.clear()
        if self.train_function is not None:
            self._make_train_function()
        if self.test_function is not None:
            super().make_test_function(force=True)
        if self.predict_function is not None:
            super().make_predict_function(force=True)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """As the template's own, or Keras's; optimizers go to the parameters.

        Raises:
          ValueError: `jit_compile=True`, which would undo the placement.
        """
        if kwargs.get("jit_compile") is True or (
            len(args) > 7 and args[7] is True
        ):
            raise ValueError(
                "`jit_compile=True` compiles the step into one XLA program on "
                "one device, which would undo the placement. Expected False "
                'or "auto"; leave it out.'
            )
        if keras_compile.overridden(self.template, ("compile",)):
            # It keeps what it is given where the template's methods look.
            self.template.compile(*args, **kwargs)
            if self.template.compiled:
                self._compile_as_template()
        else:
            super().compile(*args, **kwargs)
            self._place()

    def _compile_as_template(self) -> None:
        """Takes on what the template was compiled with, very objects."""
        super().compile(**keras_compile.compile_arguments(self.template))
        self._is_lent = True
        self._place()

    def _place(self) -> None:
        """Puts the optimizers beside the parameters."""
        place_variables(self, self.placement)

    def _beside_outputs(self, function: Any) -> Any:
        """The function, with what has no device on the output device."""

        @functools.wraps(function)
        def placed(*args: Any) -> Any:
            with tf.device(self.placement.output_device):
                return function(*args)

        return placed

    def _gather_metrics(self) -> bool:
        """Moves compiled metrics to the outputs; whether any moved."""
        if not self.compiled:
            return False
        device = str(self.placement.output_device)
        return any(
            [
                move_variable(v, device)
                for v in keras_compile.Compiled.of(self).variables
            ]
        )

    def make_train_function(self, force: bool = False) -> None:
        self._check_steps()
        self._forget_if_moved()
        self._build_optimizer()
        if self._gather_metrics() or force or self.train_function is None:
            self._make_train_function()

    def _build_optimizer(self) -> None:
        """Makes slots eagerly, and not while the step is traced.

        Not of one that Keras gave to a template which has others of its own.
        """
        if (
            self.optimizer
            and not self.optimizer.built
            and not keras_compile.overridden(self.template, ("compile",))
            and keras_layers.is_built(self.template)
            and self.trainable_variables
        ):
            self.optimizer.build(self.trainable_variables)

    def _make_train_function(self) -> None:
        super().make_train_function(force=True)
        self.train_function = self._beside_outputs(self.train_function)

    def make_test_function(self, force: bool = False) -> Any:
        self._check_steps()
        self._forget_if_moved()
        return super().make_test_function(self._gather_metrics() or force)

    def make_predict_function(self, force: bool = False) -> Any:
        self._forget_if_moved()
        return super().make_predict_function(force)

    def _own(self, name: str) -> Any:
        """The template's own step, for this model, or None."""
        mine = keras_compile.overridden(self, (name,), TowerModel)
        if mine or not keras_compile.overridden(self.template, (name,)):
            return None
        step = getattr(type(self.template), name).__get__(self)
        return tf_autograph.converted(step)

    def _check_steps(self) -> None:
        own = self._own_steps()
        if self.loss_on_towers and own:
            raise ValueError(
                f"{type(self).__name__} of {type(self.template).__name__} has "
                f"its own {', '.join(own)}, which would need the gathered "
                "outputs. Expected Keras's own with `loss_on_towers=True`; "
                "leave that out."
            )

    # Keras's own steps, or the template's; what carries no device of its own,
    # the loss and the metrics, stays beside the gathered outputs.
    def train_step(self, data: Any) -> Any:
        with self._at_outputs():
            if not self.loss_on_towers:
                return self._stepped("train_step", data)
            with tf.GradientTape() as tape:
                loss = self._loss_on_towers(data, training=True)
                if self.optimizer is not None:
                    loss = self.optimizer.scale_loss(loss)
            variables = self.trainable_variables
            if variables:
                gradients = tape.gradient(loss, variables)
                self.optimizer.apply_gradients(zip(gradients, variables))
            return self.get_metrics_result()

    def test_step(self, data: Any) -> Any:
        with self._at_outputs():
            if not self.loss_on_towers:
                return self._stepped("test_step", data)
            self._loss_on_towers(data, training=False)
            return self.get_metrics_result()

    def predict_step(self, data: Any) -> Any:
        with self._at_outputs():
            return self._stepped("predict_step", data)

    @contextlib.contextmanager
    def _at_outputs(self) -> Iterator[None]:
        """Where a step is taken; layers that one of its own calls are towers."""
        with tf.device(self.placement.output_device):
            if self._own_steps():
                with layers_in_towers(self):
                    yield
            else:
                yield

    def _own_steps(self) -> list[str]:
        """What the template, or a subclass of this one, does in its own way."""
        return [
            *keras_compile.overridden(self.template, STEPS),
            *keras_compile.overridden(self, STEPS, TowerModel),
        ]

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        own = self._own("compute_loss")
        return (own or super().compute_loss)(*args, **kwargs)

    def compute_metrics(self, *args: Any, **kwargs: Any) -> Any:
        own = self._own("compute_metrics")
        return (own or super().compute_metrics)(*args, **kwargs)

    def reset_metrics(self) -> None:
        own = self._own("reset_metrics")
        (own or super().reset_metrics)()

    def get_metrics_result(self) -> Any:
        own = self._own("get_metrics_result")
        return (own or super().get_metrics_result)()

    def _stepped(self, name: str, data: Any) -> Any:
        """Takes a step, the template's own if it has one."""
        own = self._own(name)
        if own is None:
            if name != "predict_step":
                self._build_compiled(data)
            return getattr(super(), name)(data)
        result = own(data)
        if not self._ran:
            raise ValueError(
                f"The template {type(self.template).__name__} has a {name} of its "
                "own that calls neither the model, as `self(...)`, nor any of "
                "its layers, so nothing of it would run in towers. Expected "
                "such a call; or write the step with towers.build_towers and "
                "its `tower_fn`."
            )
        return result

    def _build_compiled(self, data: Any) -> None:
        """Makes what losses and metrics need before the step would.

        Where that cannot be, the step does it, or says what is wrong.
        """
        x, y, weights = keras.utils.unpack_x_y_sample_weight(data)
        own = ("compute_loss", "compute_metrics")
        if (
            keras_layers.is_built(self.template)
            and self.merge == "concat"
            and not keras_compile.overridden(self, own, TowerModel)
            and not keras_compile.overridden(self.template, own)
        ):
            with contextlib.suppress(Exception):
                outputs = checks.output_spec(self.template, x)
                keras_compile.Compiled.of(self).build(y, outputs, weights)

    def _loss_on_towers(self, data: Any, training: bool) -> tf.Tensor:
        x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
        checks.check_given(self.template, x)
        checks.ensure_built(self.template, x, self.whole)
        self._placed.place_new(self)
        return loss_on_towers(self, data, training)

    def compute_output_spec(self, *args: Any, **kwargs: Any) -> Any:
        if self.merge == "concat":
            if not keras_layers.is_built(self.template):
                self.template(*args, **kwargs)
                self._placed.place_new(self)
            if (
                "training"
                not in inspect.signature(self.template.call).parameters
            ):
                kwargs.pop("training", None)
            return self.template.compute_output_spec(*args, **kwargs)
        return super().compute_output_spec(*args, **kwargs)

    def summary(self, *args: Any, **kwargs: Any) -> None:
        """Prints the placement, then the template's summary."""
        (kwargs.get("print_fn") or print)(str(self.placement))
        self.template.summary(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "TowerModel":
        return TowerModel(
            copy.deepcopy(self._lent(), memo),
            self.placement,
            self.merge,
            self.loss_on_towers,
            self.whole,
            name=self.name,
        )

    def export(
        self,
        filepath: str,
        format: str = "tf_saved_model",
        verbose: bool | None = None,
        input_signature: Any = None,
        placement: Any = "own",
        **kwargs: Any,
    ) -> None:
        """Writes a SavedModel that holds the towers, see `export_towers`.

        Args:
          filepath: a folder that does not exist yet.
          format: "tf_saved_model"; others have no devices, and are written
            from the template by Keras.
          verbose: whether to say where it is.
          input_signature: as for `keras.Model.export`.
          placement: "own" for that of this model, a `Placement` for other
            devices, or None for no devices at all.
          **kwargs: for other formats.

        Raises:
          TypeError: a leaf of `input_signature`, or an argument, is of the
            wrong kind.
          ValueError: `filepath` exists, the format can hold no placement, or
            an argument is one of another backend.
        """
        if format != "tf_saved_model":
            if isinstance(placement, Placement):
                raise ValueError(
                    f"A file of format {format!r} can hold no `placement`. "
                    'Expected format="tf_saved_model"; or leave it out.'
                )
            self.template.export(
                filepath,
                format=format,
                verbose=verbose,
                input_signature=input_signature,
                **kwargs,
            )
            return
        if kwargs:
            of_jax = set(kwargs) <= {"is_static", "jax2tf_kwargs"}
            raise (ValueError if of_jax else TypeError)(  # as Keras has it
                f"export does not take {', '.join(kwargs)} with format "
                '"tf_saved_model" of TensorFlow. Leave that out.'
            )
        if placement == "own":
            placement = self.placement
        export_towers(
            self.template,
            filepath,
            placement,
            input_signature,
            self.merge,
            whole=self.whole,
        )
        if verbose:
            print(f"Saved towers at {filepath!r}: {placement}")


def to_multi_gpu(
    model: keras.Model,
    n_gpus: int,
    parameter_device: Any = "/CPU:0",
    merge: Any = "concat",
    loss_on_towers: bool = False,
    whole: Sequence[Any] = (),
) -> TowerModel:
    """Wraps a model in one tower per GPU, in one line before `compile()`.

    Looking for GPUs starts TensorFlow: set memory growth before. `batch_size`
    in `fit` is the global one, split over the GPUs. On a machine without GPUs,
    the same towers run on logical CPU devices:

    >>> model = keras.Sequential([keras.Input([3]), keras.layers.Dense(2)])
    >>> try:
    ...     model = towers.to_multi_gpu(model, n_gpus=64)
    ... except ValueError as error:
    ...     model = towers.TowerModel(model, towers.Placement.cpus(2))
    >>> model.compile("sgd", "mse")

    Args:
      model: a Keras 3 model.
      n_gpus: how many GPUs, the first ones that TensorFlow sees.
      parameter_device: where variables and the optimizer live.
      merge: how outputs are gathered, see `gather_outputs`.
      loss_on_towers: whether towers compute losses and metrics themselves.
      whole: inputs that every tower gets whole, see `TowerModel`.

    Returns:
      A `TowerModel`.

    Raises:
      TypeError: `model` is no Keras model, or `n_gpus` no integer.
      ValueError: `n_gpus` is below 1, or there are fewer GPUs.
      RuntimeError: called under a `tf.distribute` strategy.
    """
    checks.check_model(model)
    check_count("n_gpus", n_gpus)
    try:
        placement = Placement.gpus(n_gpus, parameter_device=parameter_device)
    except ValueError as error:
        message = str(error).replace("`n` asks", "`n_gpus` asks")
        raise ValueError(message) from error
    return TowerModel(model, placement, merge, loss_on_towers, whole)
