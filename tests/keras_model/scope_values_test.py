"""What a `keras.StatelessScope` has for variables is what towers read."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import parameterized
from models import chain, close, make, placement, recurrent

import towers

layers = keras.layers
X = tf.constant(np.random.default_rng(0).normal(size=[7, 3]), tf.float32)
PLACEMENTS = [("two", placement(2)), ("three", placement(3, [3, 2, 1]))]


def stateful() -> keras.Model:
    """Statistics, a seed, and losses of each kind."""
    return chain(
        [3],
        layers.Dense(4, activation="tanh", kernel_regularizer="l2"),
        layers.BatchNormalization(synchronized=True),
        layers.GaussianNoise(0.0, seed=3),
        layers.Dense(2, activity_regularizer="l2"),
    )


def dense() -> keras.Model:
    return chain([3], layers.Dense(4, activation="tanh"), layers.Dense(2))


def others(variables: list[keras.Variable]) -> list[tf.Tensor]:
    """Other values for variables than their own."""
    values = [tf.convert_to_tensor(v) for v in variables]
    return [2 * x + tf.cast(1, x.dtype) for x in values]


def numbers(model: keras.Model) -> list[np.ndarray]:
    return [np.array(v.value) for v in model.variables]


class ScopeValuesTest(parameterized.TestCase):
    def same(self, function, model, where) -> None:
        """What a function makes of a model, and of it in towers, changes nothing."""
        expected = function(make(model))
        tower_model = towers.TowerModel(make(model), where)
        before = numbers(tower_model)
        close(function(tower_model), expected)
        close(numbers(tower_model), before, 0)

    @parameterized.named_parameters(
        *((f"eager_{name}", where, False) for name, where in PLACEMENTS),
        *((f"function_{name}", where, True) for name, where in PLACEMENTS),
    )
    @pytest.mark.slow(of=["eager_two", "function_three"])
    def test_stateless_call(self, where, in_function):
        def step(model, weights, state):
            with tf.GradientTape() as tape:
                tape.watch(weights)
                outputs, state, losses = model.stateless_call(
                    weights, state, X, training=True, return_losses=True
                )
                loss = tf.reduce_mean(outputs**2) + tf.add_n(losses)
            gradients = tape.gradient(loss, weights)
            moved = [w - 0.1 * g for w, g in zip(weights, gradients)]
            return moved, state, losses, outputs

        def steps(model):
            weights = others(model.trainable_variables)
            state = others(model.non_trainable_variables)
            seen = []
            for _ in range(2):
                weights, state, *rest = step(model, weights, state)
                seen += rest
            return weights, state, seen, model(X)

        self.same(
            (lambda model: tf.function(steps)(model)) if in_function else steps,
            stateful,
            where,
        )

    @parameterized.named_parameters(PLACEMENTS)
    @pytest.mark.slow(of=["_two"])
    def test_gradients_of_gradients(self, where):
        def maml(model):
            weights = others(model.trainable_variables)
            with tf.GradientTape() as outer:
                outer.watch(weights)
                with tf.GradientTape() as inner:
                    inner.watch(weights)
                    outputs, _ = model.stateless_call(weights, [], X[:5])
                    loss = tf.reduce_mean(outputs**2)
                gradients = inner.gradient(loss, weights)
                fast = [w - 0.1 * g for w, g in zip(weights, gradients)]
                outputs, _ = model.stateless_call(fast, [], X[5:])
                loss = tf.reduce_mean((outputs - 1) ** 2)
            return loss, outer.gradient(loss, weights)

        self.same(maml, dense, where)

    @parameterized.named_parameters(PLACEMENTS)
    @pytest.mark.slow(of=["_two"])
    def test_values_for_some_variables_beside_calls_without(self, where):
        def calls(model):
            kernel, *_ = model.trainable_variables
            seen = [model(X)]
            for value in others([kernel, kernel * 3.0]):
                with keras.StatelessScope([(kernel, value)]):
                    seen.append(model(X))
                with keras.StatelessScope():
                    seen.append(model(X))
            return seen

        self.same(calls, dense, where)

    @parameterized.named_parameters(
        *((f"eager_{name}", where, False) for name, where in PLACEMENTS),
        *((f"function_{name}", where, True) for name, where in PLACEMENTS[1:]),
    )
    @pytest.mark.slow(of=["eager_three"])
    def test_build_towers(self, where, in_function):
        model, metric = make(stateful), keras.metrics.MeanSquaredError()

        def both(models, x):
            outputs = models["model"](x, training=True)
            models["metric"].update_state(tf.zeros_like(outputs), outputs)
            return outputs

        def plain():
            outputs = both({"model": model, "metric": metric}, X)
            return outputs, model.losses

        def in_towers():
            graph = towers.build_towers(
                {"model": model, "metric": metric},
                X,
                where,
                training=True,
                tower_fn=both,
            )
            graph.apply_updates()
            return graph.outputs, graph.losses

        variables = model.variables + metric.variables
        values = others(variables)

        def scoped(call):
            with tf.GradientTape() as tape:
                tape.watch(values)
                with keras.StatelessScope(
                    zip(variables, values), collect_losses=True
                ) as scope:
                    outputs, losses = call()
                loss = tf.reduce_sum(outputs**2) + tf.add_n(losses)
            state = [scope.get_current_value(v) for v in variables]
            return outputs, losses, state, tape.gradient(loss, values[:2])

        before = numbers(model)
        step = tf.function(scoped) if in_function else scoped
        close(step(in_towers), scoped(plain))
        close(numbers(model), before, 0)

    @parameterized.named_parameters(PLACEMENTS)
    @pytest.mark.slow(of=["_two"])
    def test_loss_on_towers(self, where):
        def step(model):
            model.compile("sgd", "mse", metrics=["mae"])
            model.loss_on_towers = True
            model.evaluate(X, tf.ones([7, 2]), verbose=0)
            variables = model.trainable_variables
            with keras.StatelessScope(zip(variables, others(variables))):
                result = model.test_step((X, tf.ones([7, 2])))
            return result["loss"], result["mae"]

        self.same(step, dense, where)

    def test_states_of_rows(self):
        def two_batches(model):
            state = model.layers[0].states
            with keras.StatelessScope(zip(state, others(state))) as scope:
                outputs = model(X[:, None]), model(X[:, None])
                kept = [scope.get_current_value(v) for v in state]
            return *outputs, kept, [tf.convert_to_tensor(v) for v in state]

        def keeping():
            return keras.Sequential(
                [keras.Input([1, 3], 7), layers.SimpleRNN(4, stateful=True)]
            )

        self.same(two_batches, keeping, placement(3, [3, 2, 1]))

    def test_a_layer_in_a_step_of_ones_own(self):
        class Own(keras.Model):
            def __init__(self):
                super().__init__()
                self.encoder, self.head = layers.Dense(4), layers.Dense(2)
                self.ran_on = set()

            def call(self, x):
                return self.head(self.encoder(x))

            def train_step(self, data):
                weights = others(self.encoder.trainable_variables)
                with tf.GradientTape() as tape:
                    tape.watch(weights)
                    x, _ = self.encoder.stateless_call(weights, [], data)
                    self.ran_on.add(x.op.type)
                    loss = tf.reduce_mean(self.head(x) ** 2)
                gradients = tape.gradient(loss, weights)
                self.optimizer.apply_gradients(
                    zip(gradients, self.encoder.trainable_variables)
                )
                return {"loss": loss}

        def trained(model):
            model.compile("sgd")
            history = model.fit(X, batch_size=4, shuffle=False, verbose=0)
            return history.history["loss"], numbers(model)

        def own():
            model = Own()
            model(X)
            return model

        plain, template = make(own), make(own)
        in_towers = towers.TowerModel(template, placement(2))
        close(trained(in_towers), trained(plain))
        self.assertNotEqual(template.ran_on, plain.ran_on)  # gathered

    def test_unbuilt(self):
        def model():
            one = keras.initializers.GlorotUniform(3)
            return keras.Sequential([layers.Dense(4, kernel_initializer=one)])

        def called(model):
            with keras.StatelessScope():
                outputs = model(X)
            return outputs, model(X), numbers(model)

        in_towers = towers.TowerModel(model(), placement(2))
        close(called(in_towers), called(model()))

    def test_graph_of_a_session(self):
        model = make(stateful)
        values = [x.numpy() for x in others(model.variables)]

        def run(call):
            with tf.Graph().as_default() as graph:
                given = [tf.constant(x) for x in values]
                x = tf.compat.v1.placeholder(tf.float32, [None, 3])
                with keras.StatelessScope(
                    zip(model.variables, given), collect_losses=True
                ) as scope:
                    outputs, losses = call(x)
                    state = [
                        scope.get_current_value(v) for v in model.variables
                    ]
                gradients = tf.compat.v1.gradients(
                    tf.reduce_sum(outputs**2) + tf.add_n(losses), given[:2]
                )
                initial = tf.compat.v1.global_variables_initializer()
            self.assertEmpty(graph.get_collection("update_ops"))
            with tf.compat.v1.Session(graph=graph) as session:
                session.run(initial)
                results = [outputs, losses, state, gradients]
                return session.run(results, {x: X.numpy()})

        def in_towers(x):
            graph = towers.build_towers(model, x, placement(3, [3, 2, 1]), True)
            graph.apply_updates()
            return graph.outputs, graph.losses

        def plain(x):
            return model(x, training=True), model.losses

        close(run(in_towers), run(plain))

    def test_a_model_that_towers_were_not_given(self):
        model, teacher = make(dense), make(dense)
        teacher.trainable = False
        values = zip(teacher.variables, others(teacher.variables))
        with keras.StatelessScope(values):
            with self.assertRaisesRegex(
                ValueError, "no model that it was give"
            ):
                towers.build_towers(
                    model,
                    X,
                    placement(2),
                    tower_fn=lambda model, x: model(x) - teacher(x),
                )

    @pytest.mark.rare
    def test_loops_and_xla(self):
        def step(model):
            weights = others(model.trainable_variables)
            seeds = others(model.non_trainable_variables)
            x = tf.reshape(tf.tile(X, [1, 5]), [7, 5, 3])
            with tf.GradientTape() as tape:
                tape.watch(weights)
                outputs, _ = model.stateless_call(weights, seeds, x)
                loss = tf.reduce_sum(outputs**2)
            return outputs, tape.gradient(loss, weights)

        self.same(step, recurrent, placement(3, [3, 2, 1]))
