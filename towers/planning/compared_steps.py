"""compared_steps: the same step, of a plain model and in towers, and nothing changed.

Neither assigns what a user would miss: variables, seeds and the generators of Python
and NumPy are put back, and the optimizer only says what it would do.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from towers.builder import build_towers
from towers.engine.graphs import as_function, as_graphs
from towers.foreign import keras_compile, keras_layers, tf_random
from towers.foreign.keras_compile import Compiled
from towers.foreign.keras_saving import overridden
from towers.foreign.keras_self import compiled_as
from towers.keras_model.layer_graph import variables_of
from towers.placement.placement import Placement
from towers.planning.measure import mean_square
from towers.report.recording import eager_variables

_STATE_OF_GENERATOR = 4  # numbers, at most
_ROUNDING = {"float16": 2**-10, "bfloat16": 2**-7, "float64": 2**-52}
# By kind, arrays by the name of an output or a variable.
Arrays = dict[str, dict[str, Any]]


class CompiledAnew(keras.Model):
    """What a model was compiled to, once more, with no variable of the model's.

    Args:
      model: whose outputs are judged.
      compiled: which was compiled for it: itself, or the `TowerModel` around it.
    """

    _is_lent = False  # as `compiled_as` asks

    def __init__(self, model: keras.Model, compiled: keras.Model):
        super().__init__()
        object.__setattr__(self, "template", model)  # not a layer of this one
        names = getattr(model, "output_names", None)
        if names is not None:
            self.output_names = names
        if compiled.compiled:
            arguments = keras_compile.compile_arguments(compiled)
            # Its loss alone is asked.
            arguments |= {"optimizer": "sgd", "metrics": None}
            self.compile(**{**arguments, "weighted_metrics": None})


class ComparedSteps:
    """The steps of a model, plain and in towers, on one batch.

    Args:
      model: a built model.
      placement: of the towers.
      batch: inputs, targets and sample weights.
      options: of `build_towers`.
      compiled: which was compiled for it: itself, or the `TowerModel` around it.

    Attributes:
      notes: what is done otherwise than in a `fit`.
      rounding: that of the coarsest dtype that a layer computes in.
      names: by a variable's id what it is called.
      beside: targets and weights.
    """

    def __init__(
        self,
        model: keras.Model,
        placement: Placement,
        batch: tuple[Any, Any, Any],
        options: Mapping[str, Any],
        compiled: keras.Model,
    ):
        self.model, self.placement = model, placement
        self.compiled = compiled
        self.options = dict(options)
        self.notes: list[str] = []
        self.variables = variables_of(model)
        dtypes = {x.compute_dtype for x in keras_layers.all_layers(model)}
        self.rounding = max(_ROUNDING.get(d, 2**-23) for d in dtypes)
        self._judge = CompiledAnew(model, compiled)
        self.names = _named(self.variables)
        self.x, *self.beside = batch
        if "train_step" in overridden(model, ["train_step"]):
            self.notes.append(
                f"The train_step of {type(model).__name__} itself is not run: "
                "its call, loss and gradients are."
            )

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """While open, what happens to variables and generators is put back."""
        states = _states(self.variables)
        before = [v.read_value() for v in states]
        try:
            with tf_random.nothing_drawn():
                yield
        finally:
            for variable, value in zip(states, before):
                variable.assign(value)

    @contextlib.contextmanager
    def moved(self, seed: int) -> Iterator[Any]:
        """While open, weights are a rounding away; yields inputs that are, too."""
        generator = np.random.default_rng(seed)

        def away(value: Any) -> Any:
            signs = generator.choice([-1.0, 1.0], value.shape)
            return (value * (1 + self.rounding * signs)).astype(value.dtype)

        with self.kept():
            for variable in map(keras_layers.raw, self.variables):
                if variable.dtype.is_floating:
                    variable.assign(away(variable.numpy()))
            yield tf.nest.map_structure(
                lambda x: (
                    tf.constant(away(x.numpy()))
                    if isinstance(x, tf.Tensor) and x.dtype.is_floating
                    else x
                ),
                self.x,
            )

    def plain(self) -> "StepResults":
        """The plain model's numbers, of given inputs."""

        def predict(x: Any) -> Any:
            return self.model(x, training=False)

        def step(x: Any, y: Any, weights: Any) -> Any:
            with tf.GradientTape() as tape:
                outputs = self.model(x, training=True)
                terms = list(self.model.losses)
                added = len(terms) - len(_regularized(self.model))
                losses = self._losses(x, y, outputs, weights, terms, added)
            return outputs, losses[0], self._gradients(tape, losses[1]), []

        return StepResults(self, predict, step, [])

    def towers(self) -> "StepResults":
        """The same in towers."""
        updated: list[Any] = []

        def build(x: Any, training: bool) -> Any:
            return build_towers(
                self.model, x, self.placement, training, **self.options
            )

        def predict(x: Any) -> Any:
            return build(x, False).outputs

        def step(x: Any, y: Any, weights: Any) -> Any:
            with tf.GradientTape() as tape:
                graph = build(x, True)
                added = graph.n_input_losses
                with tf.device(str(self.placement.output_device)):
                    losses = self._losses(
                        *(x, y, graph.outputs, weights, graph.losses, added)
                    )
            updated[:] = [variable for variable, _ in graph.updates]
            state = [value for _, value in graph.updates]
            gradients = self._gradients(tape, losses[1])
            return graph.outputs, losses[0], gradients, state

        return StepResults(self, predict, step, updated)

    def weights(self, values: Arrays) -> dict[str, Any] | None:
        """What the optimizer makes of gradients; None if that cannot be asked."""
        compiled = self.compiled
        trained = self.model.trainable_variables
        if not (compiled.compiled and trained) or compiled.optimizer is None:
            return None
        try:
            optimizer = _copied(compiled.optimizer, trained)
            names = [self.names[id(v)] for v in trained]
            gradients = zip(map(values["gradients"].get, names), trained)
            pairs = [(tf.constant(g), v) for g, v in gradients if g is not None]
            with self.kept():
                optimizer.apply(*zip(*pairs))
                return {
                    name: keras_layers.raw(v).numpy()
                    for name, v in zip(names, trained)
                }
        except Exception as error:  # of an optimizer of the user's, say
            line = str(error).strip().partition("\n")[0]
            self.note(
                "Weights after a step are not compared, as the optimizer could not "
                f"be copied: {type(error).__name__}: {line}"
            )
            return None

    def note(self, sentence: str) -> None:
        """Adds a sentence to the notes, once."""
        self.notes += [sentence] * (sentence not in self.notes)

    def outputs_named(self, outputs: Any) -> dict[str, Any]:
        """Arrays by the names of the outputs."""
        leaves = [x for x in tf.nest.flatten(outputs) if x is not None]
        names = list(getattr(self.model, "output_names", None) or ())
        if isinstance(outputs, dict) and len(outputs) == len(leaves):
            names = sorted(map(str, outputs))
        elif len(names) != len(leaves) or len(set(names)) < len(names):
            names = [f"output {i}" for i in range(len(leaves))]
        return {name: x.numpy() for name, x in zip(names, leaves)}

    def _losses(
        self,
        x: Any,
        y: Any,
        outputs: Any,
        weights: Any,
        terms: Any,
        added: int,
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """The loss, and what an optimizer would have differentiated.

        Args:
          x, y, outputs, weights: of the batch.
          terms: what layers and regularisers add.
          added: how many of those depend on the inputs.
        """
        loss = self._loss(x, y, outputs, weights, list(terms), added)
        optimizer = getattr(self.compiled, "optimizer", None)
        return loss, optimizer.scale_loss(loss) if optimizer else loss

    def _loss(
        self, x: Any, y: Any, outputs: Any, weights: Any, terms: Any, added: int
    ) -> tf.Tensor:
        compiled = self._judge.compiled and Compiled.of(self._judge).loss
        own = overridden(self.model, ["compute_loss"])
        if own and y is not None and self.compiled.compiled:
            if not added:
                arguments = {"x": x, "y": y, "y_pred": outputs}
                arguments["sample_weight"] = weights
                taken = inspect.signature(self.model.compute_loss).parameters
                if "training" in taken:
                    arguments["training"] = True
                with compiled_as(self._judge):
                    return tf.convert_to_tensor(
                        self.model.compute_loss(**arguments)
                    )
            self.note(
                "The loss is Keras's, and not that of the model's own "
                "compute_loss, as layers add losses."
            )
        if compiled and y is not None:
            terms.append(compiled(y, outputs, weights))
        elif compiled or not self.compiled.compiled or not terms:
            self.note(
                "The loss is the mean of the outputs' squares, as "
                + ("there is no `y`." if compiled else "none is compiled.")
            )
            terms.append(mean_square(outputs))
        return tf.add_n([tf.reduce_sum(tf.cast(x, tf.float32)) for x in terms])

    def _gradients(self, tape: tf.GradientTape, loss: tf.Tensor) -> list[Any]:
        grads = tape.gradient(loss, self.model.trainable_variables)
        return [None if g is None else tf.convert_to_tensor(g) for g in grads]


class StepResults:
    """What a model predicts, and what a step of it gives, as arrays.

    Args:
      steps: whose model and batch it is.
      predict: `f(inputs)`, made a graph here.
      step: `f(inputs, targets, weights)`: outputs, loss, gradients, state.
      updated: the variables whose state that is, once it was traced.
    """

    def __init__(
        self,
        steps: ComparedSteps,
        predict: Callable[..., Any],
        step: Callable[..., Any],
        updated: list[Any],
    ):
        self._steps, self._updated = steps, updated
        self._predict = as_function(predict, "predict")
        self._step = as_function(step, "step")

    def __call__(
        self, x: Any, run: Callable[..., Any] = lambda f, *args: f(*args)
    ) -> Arrays:
        """The values, by kind and name; what changes is put back.

        Args:
          x: the inputs.
          run: what runs the step, `run(step, *args)`.
        """
        steps = self._steps
        with steps.kept(), as_graphs():
            predictions = steps.outputs_named(self._predict(x))
        with steps.kept(), as_graphs():
            results = run(self._step, x, *steps.beside)
            state = {
                steps.names[id(v)]: keras_layers.raw(v).numpy()
                for v in steps.variables
            }
        outputs, loss, gradients, updates = results
        for variable, value in zip(self._updated, updates):
            state[steps.names[id(variable)]] = value.numpy()
        trained = steps.model.trainable_variables
        return {
            "predictions": predictions,
            "outputs": steps.outputs_named(outputs),
            "loss": {"loss": loss.numpy()},
            "gradients": {
                steps.names[id(v)]: g.numpy()
                for v, g in zip(trained, gradients)
                if g is not None
            },
            "state": state,
        }


def _copied(optimizer: Any, variables: Any) -> Any:
    """An optimizer like this one, with the values of its slots."""
    copied = type(optimizer).from_config(optimizer.get_config())
    copied.build(variables)
    if optimizer.built:
        for mine, its in zip(
            copied.variables, optimizer.variables, strict=True
        ):
            mine.assign(its)
    return copied


def _regularized(model: keras.Model) -> list[Any]:
    """Variables whose regularisers are among a model's losses."""
    return [v for v in model.trainable_variables if v.regularizer is not None]


def _named(variables: Any) -> dict[int, str]:
    """By a variable's id its path, counted where several have one."""
    names: dict[int, str] = {}
    for variable in variables:
        path = name = variable.path
        n = 1
        while name in names.values():
            n += 1
            name = f"{path} ({n})"
        names[id(variable)] = name
    return names


def _states(variables: Any) -> list[tf.Variable]:
    """A model's variables, and those of generators that are nobody's."""
    own = [keras_layers.raw(v) for v in variables]
    ids = {id(v) for v in own}
    return own + [
        v
        for v in eager_variables()
        if v.dtype.is_integer
        and id(v) not in ids
        and v.shape.rank == 1
        and (v.shape[0] or 0) <= _STATE_OF_GENERATOR
        and v.is_initialized()
    ]
